"""JSON that anybody may have written: a value, or a ValueError."""

import math

import pytest

from mlx_training.json_text import MAX_DEPTH, parse_json


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        "9" * 10_000,
        '"\\ud800"',
        '{"\\udfff": 1}',
        b"\xff",
        "{",
        "",
    ],
)
def test_whatever_is_wrong_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_sound_values() -> None:
    assert parse_json('"\\ud83d\\udca5"') == "\U0001f4a5"
    assert math.isnan(parse_json("NaN"))
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert str(parse_json(deep)) == deep
    brackets = '["' + "[" * 1000 + '", "\\"' + "{" * 100 + '"]'
    assert len(parse_json(brackets)) == 2
    assert len(parse_json("[" + "[1]," * 1000 + "[1]]")) == 1001
