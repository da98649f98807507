"""Reading JSON that anybody may have written: whatever is wrong with it is a ValueError."""

import json
import re
from typing import Any

MAX_DEPTH = 64  # lists and objects inside each other
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text or UTF-8 file spells; NaN and infinities are numbers, as Python writes them.

    Raises ValueError for anything else than JSON, for more than MAX_DEPTH levels, for whole numbers of thousands of
    digits, and for half characters (lone surrogates), which no file or terminal takes.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    value = json.loads(text)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def what_is_wrong(error: ValueError) -> str:
    """What `parse_json` found, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "half a character, \\ud800 to \\udfff" if isinstance(error, UnicodeEncodeError) else str(error)


def _depth(text: str) -> int:
    depth = deepest = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    return deepest
