"""Reading a configuration: a YAML file, what it `extends:`, and overrides, checked all at once.

config = load_config("configs/quick_test.yaml", ["training.batch_size=8"])
"""

import copy
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlx_training.config_checks import merge
from mlx_training.config_dataset import Dataset, DatasetOptions, Splits
from mlx_training.config_decoder import DecoderShape
from mlx_training.config_errors import Problem, explain, take_older_spellings
from mlx_training.config_model import FAMILIES, DecoderConfig, TimeSeriesConfig
from mlx_training.config_schema import RunConfig
from mlx_training.configs import find_config
from mlx_training.errors import ConfigError, shown
from mlx_training.yaml_loader import Document, KeyPath, dump_yaml, parse_value, read_yaml

__all__ = [
    "Dataset",
    "DatasetOptions",
    "DecoderConfig",
    "DecoderShape",
    "RunConfig",
    "Splits",
    "TimeSeriesConfig",
    "json_schema",
    "load_config",
    "to_yaml",
]


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a file, or of a shipped name, with `key=value` overrides laid over it.

    Raises ConfigError with one line for every error: `file:line: key: what was given; what is allowed`.
    """
    path = find_config(name)
    document = _read_layers(path, ())
    for override in overrides:
        document = _lay_over(document, _read_override(override))
    problems = document.problems + [_line(p, document.where) for p in take_older_spellings(document.data)]
    experiment = document.data.setdefault("experiment", {})
    if isinstance(experiment, dict):
        experiment.setdefault("name", path.stem)
    config, found = _validate(document.data)
    problems += [_line(problem, document.where) for problem in found]
    if problems:
        problems.sort(key=_place)
        head = [f"{len(problems)} problems in the configuration:"] if len(problems) > 1 else []
        raise ConfigError("\n".join(head + problems))
    assert config is not None
    return config


def to_yaml(config: RunConfig) -> str:
    """The configuration with every default written out; `load_config` reads it back to an equal object."""
    return dump_yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON Schema for editors. A file may `extends:` another, so no key is required in itself."""
    schema = _loosen(_schema())
    extends = {"type": "string", "description": "A configuration to start from, beside this file or shipped."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@functools.cache
def _schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


def _loosen(node: Any) -> Any:
    if isinstance(node, list):
        return [_loosen(item) for item in node]
    if not isinstance(node, dict):
        return node
    loose = {key: _loosen(value) for key, value in node.items() if key != "required" or isinstance(value, dict)}
    if "oneOf" in loose:  # without required keys one mapping may fit several branches
        loose["anyOf"] = loose.pop("oneOf")
    return loose


def _read_layers(path: Path, chain: tuple[Path, ...]) -> Document:
    """A file laid over the one it extends, and so on."""
    here = path.resolve()
    if here in chain:
        raise ConfigError(f"{path}: extends: a cycle: {' -> '.join(p.name for p in (*chain, here))}")
    document = read_yaml(path)
    if "extends" not in document.data:
        return document
    base, source = document.data.pop("extends"), document.where[("extends",)]
    if not isinstance(base, str):
        raise ConfigError(f"{source}: extends: given {base!r}; allowed: the name of one configuration, as text")
    parent = _read_layers(find_config(base, beside=path.parent, source=source), (*chain, here))
    parent.data.pop("output_dir", None)  # a run's name and place are its own
    if isinstance(experiment := parent.data.get("experiment"), dict):
        experiment.pop("name", None)
    return _lay_over(parent, document)


def _lay_over(base: Document, over: Document) -> Document:
    where = {**base.where, **over.where}
    return Document(merge(base.data, over.data), where, base.problems + over.problems)


def _read_override(text: str) -> Document:
    """`training.batch_size=8` as a document of one key."""
    key, equals, value = text.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(re.fullmatch(r"[\w-]+", part) for part in path):
        return Document({}, {}, [f"override: {shown(text[:60], text)} is not key=value, as in training.batch_size=8"])
    try:
        data = parse_value(value, "override")
    except ConfigError as error:
        return Document(
            {}, {}, [f"override: {key}: given {shown(value[:60], key)}; {str(error).removeprefix('override:1: ')}"]
        )
    where: dict[KeyPath, str] = {path: "override"}
    _mark(data, path, where)
    for part in reversed(path):
        data = {part: data}
    return Document(data, where)


def _mark(data: Any, path: KeyPath, where: dict[KeyPath, str]) -> None:
    where[path] = "override"
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        _mark(value, (*path, key), where)


def _validate(data: Mapping[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    """The configuration, or every problem: those of single keys *and* contradictions between the other keys."""
    try:
        return RunConfig.model_validate(data), []
    except ValidationError as error:
        problems = explain(error, data, _schema())
    if any(problem.related for problem in problems):
        return None, problems
    wrong = [problem.path for problem in problems]
    try:
        RunConfig.model_validate(_without(data, wrong))
    except ValidationError as error:
        problems += [p for p in explain(error, data, _schema()) if p.related and not _touches(p.related, wrong)]
    return None, problems


def _without(data: Mapping[str, Any], paths: Sequence[KeyPath]) -> dict[str, Any]:
    """A copy of `data` where the wrong keys are left out, so that the rest can be checked."""
    rest = copy.deepcopy(dict(data))
    for path in paths:
        keys = list(itertools.takewhile(lambda part: isinstance(part, str), path))
        node: Any = rest
        for key in keys[:-1]:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(keys[-1], None)
        if path == ("model", "family"):  # which keys are right depends on it: leave the whole section out
            rest["model"] = {"family": FAMILIES[0]}
    return rest


def _touches(related: Sequence[KeyPath], wrong: Sequence[KeyPath]) -> bool:
    return any(a[: len(b)] == b or b[: len(a)] == a for a in related for b in wrong)


def _line(problem: Problem, where: Mapping[KeyPath, str]) -> str:
    """The problem with its place: of the key, else of what was given inside it, else of what it would stand in."""
    given = [path for path in problem.related if path in where]
    path = next((path for path in given if where[path] == "override"), given[0] if given else problem.path)
    if path not in where:
        path = next((inside for inside in where if inside[: len(path)] == path), path)
    while path not in where:
        path = path[:-1]
    stands = where.get(problem.path, where[path])  # elsewhere, if an override of another key made this one wrong
    place = f" ({problem.path[-1]} stands in {stands})" if stands != where[path] else ""
    return f"{where[path]}: {'.'.join(map(str, problem.path))}: {problem.message}{place}"


def _place(line: str) -> tuple[str, int]:
    match = re.match(r"(.*?):(\d+): ", line)
    return (match[1], int(match[2])) if match else ("~", 0)
