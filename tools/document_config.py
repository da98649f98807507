"""Write the tables of docs/configuration.md from the configuration's own docstrings, types and defaults.

    python tools/document_config.py

What stands above the heading "## Keys" is written by hand and kept.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from mlx_training.config import RunConfig
from mlx_training.config_errors import allowed
from mlx_training.config_model import LanguageConfig, PretrainedConfig, TimeSeriesConfig
from mlx_training.config_section import Section

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
COMMAND = ".venv/bin/python tools/document_config.py"
START = "\n## Keys\n"
LISTS = ("dataset.sources",)  # keys that hold a list of sections
HEADER = "| key | allowed | default | what it does |\n|---|---|---|---|\n"
SCHEMA = RunConfig.model_json_schema()


def page(current: str) -> str:
    """The page with fresh tables below the hand-written part of `current`."""
    introduction, heading, _ = current.partition(START)
    assert heading, f"{PAGE}: no heading {START.strip()!r}"
    sections = [START, f"\nThese tables come from the code: `{COMMAND}` writes them.\n"]
    fields = RunConfig.model_fields
    run = [row for name, field in fields.items() if not _sections(field) for row in _rows(name, field, {})]
    sections.append("\n### The run\n\n" + HEADER + "".join(run))
    for name, field in fields.items():
        for section in _sections(field):
            family = get_args(section.model_fields["family"].annotation)[0] if name == "model" else None
            title = f"`{name}`, family: {family}" if family else f"`{name}`"
            about = f"{section.__doc__}\n\n" if section.__doc__ else ""
            data = {"model": {"family": family}} if family else {}
            sections.append(f"\n### {title}\n\n{about}{HEADER}{''.join(_table(section, name, data))}")
    return introduction + "".join(sections)


def _table(section: type[Section], prefix: str, data: dict[str, Any]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield from _rows(f"{prefix}.{name}", field, data)


def _rows(key: str, field: FieldInfo, data: dict[str, Any]) -> Iterator[str]:
    """The key's row, unless it only groups others, and a row for each key within it that has a description."""
    nested = _sections(field)
    if not nested or field.description or not isinstance(field.default, Section):
        default = "required" if field.is_required() else f"`{_spell(field.default)}`"
        words = allowed(tuple(int(part) if part.isdigit() else part for part in key.split(".")), data, SCHEMA)
        description = " ".join((field.description or "").split()).replace("<", "&lt;")  # <bos> is no HTML
        yield f"| `{key}` | {words} | {default} | {description} |\n"
    for section in nested:
        if any(inner.description for inner in section.model_fields.values()):
            yield from _table(section, f"{key}.0" if key in LISTS else key, data)


def _sections(field: FieldInfo) -> list[type[Section]]:
    """The mappings of known keys that may stand in a field."""
    found = list(dict.fromkeys(_classes(field.annotation)))
    return (
        found
        if any(issubclass(section, TimeSeriesConfig | PretrainedConfig | LanguageConfig) for section in found)
        else found[:1]
    )


def _classes(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _classes(part)


def _spell(value: Any) -> str:
    """A default as the YAML spells it."""
    if isinstance(value, Section):
        value = value.model_dump()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_spell(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_spell, value))}]"
    if isinstance(value, str) and value:
        return value
    return re.sub(r"e-0", "e-", json.dumps(value))


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
