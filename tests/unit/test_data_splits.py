"""Splits never leak, are never empty and do not move between runs."""

from itertools import combinations
from pathlib import Path

import pytest

from mlx_training.assemble import assemble
from mlx_training.config import load_config
from mlx_training.data.rows import Row, write_rows
from mlx_training.data.splits import SplitSpec, load_splits, split_rows
from mlx_training.errors import ConfigError, DataError

ROWS = [Row("p", (), (), "q", "a", id=str(i), group=str(i % 7)) for i in range(50)]


def ids(rows: list[Row]) -> list[str]:
    return [row.id for row in rows]


SPECS = [
    SplitSpec(fraction={"validation": 0.1, "test": 0.2}),
    SplitSpec(fraction={"validation": 0.15, "test": 0.3}, by_group=True),
    SplitSpec(group={"test": [5, "6"], "validation": ["0"]}),
    SplitSpec(group={"test": [5, 6]}, fraction={"validation": 0.2}, by_group=True),
    SplitSpec(group={"test": [5, 6]}, fraction={"validation": 0.2}),
    SplitSpec(group={"train": [1], "test": [2]}),
]


@pytest.mark.parametrize("spec", SPECS)
def test_no_row_and_no_group_is_in_two_splits(spec: SplitSpec) -> None:
    splits = split_rows(ROWS, spec)
    assert list(splits) == [name for name in ("train", "validation", "test") if name in splits]
    for a, b in combinations(splits.values(), 2):
        assert not set(ids(a)) & set(ids(b))
        if spec.by_group or not spec.fraction:
            assert not {row.group for row in a} & {row.group for row in b}
    if "train" not in spec.group:
        assert sum(map(len, splits.values())) == len(ROWS)
    assert {name: ids(rows) for name, rows in split_rows(ROWS, spec).items()} == {k: ids(v) for k, v in splits.items()}


def test_sizes_names_and_seed() -> None:
    by_fraction = split_rows(ROWS, SPECS[0])
    assert {name: len(rows) for name, rows in by_fraction.items()} == {"train": 35, "validation": 5, "test": 10}
    other = split_rows(ROWS, SplitSpec(fraction=SPECS[0].fraction, seed=1))
    assert ids(other["test"]) != ids(by_fraction["test"])
    by_name = split_rows(ROWS, SPECS[3])
    assert {row.group for row in by_name["test"]} == {"5", "6"}
    assert len({row.group for row in by_name["validation"]}) == 1
    assert {row.group for row in split_rows(ROWS, SPECS[5])["train"]} == {"1"}
    assert ids(split_rows(ROWS, SplitSpec())["train"]) == ids(ROWS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SplitSpec(fraction={"test": 0.001}), r"fraction.test: 0.001 of 50 rows is none"),
        (SplitSpec(fraction={"test": 0.99}), "no rows for 'train'"),
        (SplitSpec(group={"test": ["9"]}), "no rows of group '9'; the groups are 0, 1, 2, 3, 4, 5, 6"),
        (SplitSpec(group={"test": list(range(7))}), "no rows for 'train'"),
        (SplitSpec(fraction={"test": 0.05}, by_group=True), "0.05 of 7 groups is none"),
    ],
)
def test_empty_splits_are_errors(spec: SplitSpec, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_rows(ROWS, spec)


def test_groups_are_needed_to_split_by_them() -> None:
    rows = [Row("p", (), (), "q", "a")] * 5
    with pytest.raises(DataError, match="the rows carry no group"):
        split_rows(rows, SplitSpec(fraction={"test": 0.4}, by_group=True))
    with pytest.raises(DataError, match="none: the rows carry no group"):
        split_rows(rows, SplitSpec(group={"test": ["1"]}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fraction": {"valid": 0.1}}, "unknown split 'valid'"),
        ({"fraction": {"train": 0.8}}, "leave out 'train'"),
        ({"fraction": {"validation": 0.5, "test": 0.5}}, "the sum below 1"),
        ({"fraction": {"test": 0}}, "must be above 0"),
        ({"fraction": {"test": 0.1}, "group": {"test": [1]}}, "'test' is defined twice"),
        ({"file": {"test": "t.jsonl"}}, "name the train file too"),
    ],
)
def test_contradictory_specs(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SplitSpec(**fields)


def test_a_group_in_two_splits() -> None:
    with pytest.raises(ConfigError, match="'1' is in both 'test' and 'validation'"):
        split_rows(ROWS, SplitSpec(group={"test": [1], "validation": ["1"]}))


def test_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS[:40])
    write_rows(tmp_path / "b.jsonl", ROWS[40:])
    spec = SplitSpec(file={"train": "a.jsonl", "test": "b.jsonl"}, fraction={"validation": 0.1})
    splits = load_splits(tmp_path, "auto", spec)
    assert ids(splits["test"]) == ids(ROWS[40:])
    assert sorted(ids(splits["train"] + splits["validation"])) == sorted(ids(ROWS[:40]))
    assert len(splits["validation"]) == 4
    same = SplitSpec(file={"train": "a.jsonl", "test": "./a.jsonl"})
    with pytest.raises(ConfigError, match="one file serves two splits"):
        load_splits(tmp_path, "jsonl", same)
    one = load_splits(tmp_path / "a.jsonl", "jsonl", SplitSpec(fraction={"test": 0.5}))
    assert [len(rows) for rows in one.values()] == [20, 20]


def test_har_subjects(shared_data: Path) -> None:
    spec = SplitSpec(group={"test": range(25, 31)}, fraction={"validation": 0.2}, by_group=True)
    splits = load_splits(shared_data / "har_uci" / "har_total_acc_train.npz", "npz", spec)
    subjects = {name: {row.group for row in rows} for name, rows in splits.items()}
    assert subjects["test"] == {"25", "26", "27", "28", "29", "30"}
    assert [len(s) for s in subjects.values()] == [12, 3, 6]


def write_csv(path: Path, labels: str) -> None:
    path.write_text("label,series\n" + "".join(f'{label},"[1, 2, {i}]"\n' for i, label in enumerate(labels)))


@pytest.mark.parametrize(("train", "test", "listed"), [("bca", "ca", "abc"), ("ca", "cb", "acb"), ("ab", "ba", "ab")])
def test_all_files_list_the_same_classes(tmp_path: Path, train: str, test: str, listed: str) -> None:
    """What a prompt lists must not depend on which answers its file happens to hold."""
    write_csv(tmp_path / "a.csv", train)
    write_csv(tmp_path / "b.csv", test)
    spec = SplitSpec(file={"test": "b.csv", "train": "a.csv"})
    for names in ({}, {label: label.upper() for label in listed}):
        splits = load_splits(tmp_path, "auto", spec, label_names=names)
        for row in (*splits["train"], *splits["test"]):
            assert row.options == tuple(names.get(label, label) for label in listed)
            assert row.post_prompt == f"Options: {', '.join(row.options)}. Answer:"
        assert [row.answer for row in splits["test"]] == [names.get(label, label) for label in test]
    assert list(splits) == ["train", "test"]


@pytest.mark.parametrize(("path", "format"), [("", "csv"), ("a.csv", "auto"), ("", "auto")])
def test_another_file_is_asked_as_the_run_is(
    tmp_path: Path, path: str, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--data FILE` with some of the classes: the run's question, and all of its classes."""
    write_csv(tmp_path / "a.csv", "abcabc")
    write_csv(tmp_path / "b.csv", "ab")
    write_csv(tmp_path / "new.csv", "ba")
    (tmp_path / "c.yaml").write_text(f"""
model: {{family: timeseries, encoder: {{patch_size: 1}}}}
dataset:
  path: {tmp_path / path}
  format: {format}
  splits: {{file: {{train: a.csv, test: b.csv}}}}
  options: {{question: 'Which?'}}
training: {{max_steps: 10}}
""")
    config = load_config(tmp_path / "c.yaml", ["evaluation.split=test"])
    row = assemble(config).data.read(tmp_path / "new.csv")[0]
    assert (row.pre_prompt, row.options) == ("Which?", ("a", "b", "c"))
    (tmp_path / "a.csv").rename(tmp_path / "moved.csv")
    if not path:
        assert assemble(config).data.read(tmp_path / "new.csv")[0].options == ("a", "b")
        assert "come from that file alone" in capsys.readouterr().err
