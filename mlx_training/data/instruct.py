"""Instructions with answers: prompts without series."""

from pathlib import Path
from typing import Any

from mlx_training.data.files import describe, read_json_lines, read_json_list
from mlx_training.data.rows import Row
from mlx_training.errors import DataError


def instruct(path: Path) -> list[Row]:
    """A JSON list (or JSON lines) of {"instruction", "input", "output"}: prompts without series.

    The prompt is "### Instruction:", "### Input:" (left out where empty) and "### Response:", each on lines of its
    own (Stanford Alpaca's headings without its preamble); the output is the answer.
    """
    if path.suffix == ".jsonl":
        return [_instruct_row(item, where) for where, item in read_json_lines(path)]
    items = read_json_list(path, "tasks")
    return [_instruct_row(item, f"{path}: task {number}") for number, item in enumerate(items, start=1)]


def _instruct_row(item: Any, where: str) -> Row:
    for field in ("instruction", "output"):
        if not isinstance(item, dict) or not isinstance(item.get(field), str):
            raise DataError(f"{where}: missing field {field!r}, a text")
    given = item.get("input") or ""
    if not isinstance(given, str):
        raise DataError(f"{where}: field 'input' must be text; got {describe(given)}")
    parts = {"Instruction": item["instruction"], "Input": given}
    shown = "".join(f"### {name}:\n{text.strip()}\n\n" for name, text in parts.items() if text.strip())
    return Row(f"{shown}### Response:\n", (), (), "", item["output"], id=where)
