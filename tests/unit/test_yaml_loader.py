"""YAML: scalars, duplicate keys, positions, and files that must not be read."""

import math

import pytest

from mlx_training.errors import ConfigError
from mlx_training.yaml_loader import MAX_DEPTH, MAX_VALUES, dump_yaml, parse_value, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e-3", 1e-3),
        ("-1E+2", -100.0),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("12", 12),
        ("0x10", 16),
        ("010", 10),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("'3e-4'", "3e-4"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    read = parse_value(text, "override")
    assert read == value and type(read) is type(value)


def test_where_every_key_stands():
    document = parse_yaml("a: 1\nb:\n  c: [x,\n   y]\n", "f.yaml")
    assert document.data == {"a": 1, "b": {"c": ["x", "y"]}}
    assert document.where["a",] == "f.yaml:1"
    assert document.where["b", "c"] == "f.yaml:3"
    assert document.where["b", "c", 1] == "f.yaml:4"


def test_every_duplicate_key_is_reported_with_both_lines():
    document = parse_yaml("a: 1\nb: {c: 1, c: 2}\na: 3\n", "f.yaml")
    assert document.problems == [
        "f.yaml:2: b.c: given twice (first at f.yaml:2); keep one of them",
        "f.yaml:3: a: given twice (first at f.yaml:1); keep one of them",
    ]


def test_keys_are_text_however_they_look():
    document = parse_yaml("1: one\nnull: none\n", "f.yaml")
    assert document.data == {"1": "one", "null": "none"}


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml:1: the file is empty"),
        ("# only a comment\n", "f.yaml:1: the file is empty"),
        ("- a\n- b\n", "f.yaml:1: the top level is a list of 2; it must be a mapping"),
        ("just text", "f.yaml:1: the top level is the text 'just text'"),
        ("a: 1\nb: [1, 2\nc: 3\n", "f.yaml:3: not valid YAML"),
        ("a: 1\n\tb: 2\n", "f.yaml:2: not valid YAML"),
        ("a: \x00", "f.yaml: not valid YAML"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: not valid YAML"),
        ("a: *nowhere\n", "f.yaml:1: not valid YAML"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", "f.yaml:2: not valid YAML: the tag"),
        ("a: !!int x\n", "f.yaml:1: not valid YAML: 'x' cannot be read"),
        ("a: " + "[" * 50_000, f"nested more than {MAX_DEPTH}"),
        ("a: &a [*a]\n", "levels once its aliases"),
        (LAUGHS, f"more than {MAX_VALUES} values"),
    ],
)
def test_unreadable_files_say_where_and_why(text, message):
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "f.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a: "x\\0"', r"f.yaml:1: not valid YAML: a text with the character '\\x00'"),
        ('"\\ud800": 1', "cannot be written"),
        ("a: 0x" + "f" * 5000, "cannot be read as"),
        ("a: 9223372036854775808", "cannot be read as"),
        ("a: " + "9" * 5000, "cannot be read as"),
        ("a: " + "[" * 100_000, "nested more than"),
    ],
)
def test_what_no_file_or_counter_takes(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_yaml(text, "f.yaml")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["{<<: {b: 1}}", "{[1]: 2}"])
def test_keys_that_are_not_read(text):
    assert parse_yaml(text, "f.yaml").problems


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"notes: caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


def test_dumped_values_come_back():
    data = {"a": ["3e-4", "no", "1e3", "12", "", "null", "0o7", "2024-01-01", "é: x"], "b": [1e-5, 1e20, 3, True, None]}
    assert parse_yaml(dump_yaml(data), "f.yaml").data == data
