"""What hypothesis does to valid text, JSON, arrays and bytes. `draw` is the function that a composite strategy gets."""

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")
Draw = st.DrawFn
PATHS = (
    "../../etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "pipe",
    "loop",
    "inputs",
    "/root",
    "~",
    "x" * 5000,
    "a/../..",
    "",
)
DEEP = 100_000
SCALARS = (
    *("nan", ".nan", ".inf", "-.inf", "-1", "0", "1", "0.5", "1e999", "1e-320", "1e400", "9" * 30, "9" * 5000, "-7.25"),
    *("0x" + "f" * 5000, "0b11"),
    *("true", "null", "~", "''", "[]", "{}", "yes", "0x10", "0o7", "1_000", "2024-01-01", "4294967296", "1.0", "3"),
    *(
        '"\\0"',
        '"\\ud800"',
        '"\\u202e"',
        "\U0001f4a5",
        "ｎｕｌｌ",
        "[1, 2]",
        "{a: 1}",
        "[[[[]]]]",
        '"a\\nb"',
        "k" * 5000,
    ),
    *(
        "!!python/object/apply:os.system ['touch pwned']",
        "!!python/name:os.system",
        "!!binary aGk=",
        "!x 1",
        "!!set {a}",
    ),
    *(
        "&a [*a]",
        "*nowhere",
        "&a {b: *a}",
        "[" * 50 + "]" * 50,
        "{a: " * 5000,
        "[" * DEEP,
        "|",
        ">-",
        "@",
        "`",
        "%",
        "? a",
    ),
    *("questions", "corpus", "text", "npz", "decoder", "timeseries", "opentslm", "opentslm-sp", "bfloat16", "resident"),
    *("eval/accuracy", "[loss]", "[accuracy, macro_f1]", "{encoder: 1, projector: 0}", "test", "train", "cuda", "gpu"),
    *("{train: 259}", "{train: 300000}", "{validation: 0.5}", "{factor: 2}", "[0.9, 1.0]", "[x, y, z]"),
    *PATHS,
)
LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi")
)
YAML_LINES = (
    *(
        "extends: quick_test",
        "extends: config",
        "extends: ../../etc/passwd",
        "extends: [a]",
        "extends: pipe",
        "extends: ''",
    ),
    *(
        "<<: *a",
        "<<: {a: 1}",
        "\tmodel: {}",
        "---",
        "...",
        "%YAML 3.0",
        "? [a]\n: b",
        "- a",
        "{",
        "}",
        ": ",
        "#",
        "\ufeff",
    ),
    *(
        "model: {family: decoder}",
        "dataset: []",
        "training: 3",
        "experiment: null",
        "lr_encoder: 1",
        "device: {type: cpu}",
    ),
    *('"\\0": 1', '"\\ud800": 1', "? ", "\x00", "\x85", "\u2028", LAUGHS, "a: " + "[" * DEEP, "- " * 5000, "a:\n" * 3),
)
# Numbers and nestings that json.dumps would not write as they stand.
JSON_TEXTS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1", "0", "0.5", "1e308", "1e39", "4294967296", "9" * 20, "9" * 400),
    *("9" * 10_000, "true", "false", "null", "[]", "{}", "[[]]", "[[1]]", "[null]", '[1, "2"]', "[true]", "[1, [2]]"),
    *(
        '""',
        '" "',
        '"\\u0000"',
        '"\\ud800"',
        '"\\u202e\U0001f4a5"',
        '"NaN"',
        '"[1, 2]"',
        '"[[[["',
        '"' + "x" * 5000 + '"',
    ),
    *(
        '"[' + "9" * 10_000 + ']"',
        f'"{"[" * DEEP}"',
        '"(' + "1," * 50 + ')"',
        '"{}"',
        '"1"',
        '"step_00000002"',
        "2",
        "1",
    ),
    *(
        "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP,
        "[" * 900 + "]" * 900,
        '{"a":' * 900 + "1" + "}" * 900,
    ),
    *(json.dumps(path) for path in PATHS),
)


def pick(draw: Draw, values: Any) -> Any:
    """One of them."""
    return values[index(draw, len(values))]


def index(draw: Draw, length: int) -> int:
    """A place in something of this length. The draw is the same for all lengths: some files hold times and paths."""
    return draw(st.integers(0, 2**20 - 1)) % max(1, length)


def several(draw: Draw, value: T, change: Callable[[Draw, T], T]) -> T:
    """`value` after one to three changes."""
    for _ in range(draw(st.integers(1, 3))):
        value = change(draw, value)
    return value


def spoil_bytes(draw: Draw, data: bytes) -> bytes:
    """Flipped, cut, doubled or foreign bytes."""
    at, until = sorted((index(draw, len(data)), index(draw, len(data))))
    kind = draw(st.integers(0, 5))
    if kind <= 1:
        return data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at + 1 :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[until:]
    if kind == 4:
        return data[:until] + data[at:]
    return (
        data[:at] + pick(draw, (b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b'"', b"\n")) + data[at:]
    )


def spoil_yaml(draw: Draw, text: str) -> str:
    """Lines deleted, doubled, moved or foreign; values replaced; bytes flipped."""
    kind = draw(st.integers(0, 9))
    lines = text.split("\n")
    at, other = index(draw, len(lines)), index(draw, len(lines))
    values = list(re.finditer(r"(?<=: )[^,{}\n]+|(?<=[\[,] )?\w[\w./-]*(?=:)", text))
    if kind <= 4 and values:
        found = pick(draw, values)
        return text[: found.start()] + pick(draw, SCALARS) + text[found.end() :]
    if kind == 5:
        del lines[at]
    elif kind == 6:
        lines.insert(other, lines[at])
    elif kind == 7:
        lines.insert(at, pick(draw, ("", "  ", "    ")) + pick(draw, YAML_LINES))
    elif kind == 8:
        lines[at] = pick(draw, ("\t", "  ", "- ", "")) + lines[at].strip()
    else:
        return spoil_bytes(draw, text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")
    return "\n".join(lines)


def spoil_json(draw: Draw, value: Any) -> str:
    """JSON of `value` with some of its nodes replaced, left out, doubled, wrapped or renamed."""
    value = json.loads(json.dumps(value))
    put: list[str] = []

    def change(draw: Draw, value: Any) -> Any:
        containers = [value, *_inside(value)] if isinstance(value, list | dict) else []
        holders = [container for container in containers if container]
        if not holders or draw(st.integers(0, 19)) == 0:
            put.append(pick(draw, JSON_TEXTS))
            return f"@{len(put) - 1}@"
        holder = pick(draw, holders)
        key = pick(draw, list(holder) if isinstance(holder, dict) else range(len(holder)))
        kind = draw(st.integers(0, 7))
        if kind <= 4:
            put.append(pick(draw, JSON_TEXTS))
            holder[key] = f"@{len(put) - 1}@"
        elif kind == 5:
            del holder[key]
        elif kind == 6:
            holder[key] = [holder[key]]
        elif isinstance(holder, dict):
            holder[pick(draw, ("", "extra", "Step", "é", "\x00"))] = holder.pop(key)
        else:
            holder.append(holder[key])
        return value

    text = json.dumps(several(draw, value, change))
    return re.sub(r'"@(\d+)@"', lambda found: put[int(found[1])], text)


def _inside(value: Any) -> list[Any]:
    """Every list and mapping below this one."""
    found = [item for item in (value.values() if isinstance(value, dict) else value) if isinstance(item, list | dict)]
    return found + [inner for item in found for inner in _inside(item)]
