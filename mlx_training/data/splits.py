"""Splits: which rows are train, validation and test. Rows never appear in two splits.

`SplitSpec` takes named splits out of the data in this order; what is left is "train" (unless `group`
names the groups that train: then it is left out):
1. `file`: whole files (`load_splits` reads them); the rest of the spec divides the train file;
2. `group`: whole groups by name, e.g. subjects;
3. `fraction`: a share of what is left, drawn by `seed`: rows, or whole groups with `by_group`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.data.importers import classes_of, load_rows
from mlx_training.data.rows import Row
from mlx_training.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitSpec:
    """What `dataset.splits` says. Keys of the mappings are names of splits."""

    file: Mapping[str, str] = field(default_factory=dict)  # beside dataset.path when that is a folder
    group: Mapping[str, Sequence[str | int]] = field(default_factory=dict)
    fraction: Mapping[str, float] = field(default_factory=dict)  # never "train": it gets the rest
    by_group: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        named = [*self.file, *self.group, *self.fraction]
        for name in named:
            if name not in SPLITS:
                raise ConfigError(f"dataset.splits: unknown split {name!r}; the splits are {', '.join(SPLITS)}")
            if name != "train" and named.count(name) > 1:
                raise ConfigError(f"dataset.splits: {name!r} is defined twice; use one of file, group, fraction for it")
        if "train" in self.fraction:
            raise ConfigError("dataset.splits.fraction: leave out 'train'; it gets what the other splits leave")
        if any(not 0 < share < 1 for share in self.fraction.values()) or sum(self.fraction.values()) >= 1:
            raise ConfigError(
                f"dataset.splits.fraction: {dict(self.fraction)}: each must be above 0, the sum below 1; "
                "train gets the rest"
            )
        for file in self.file.values():
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise ConfigError(f"dataset.splits.file: {file!r} is outside the folder of dataset.path; put it there")
        if self.file and "train" not in self.file:
            raise ConfigError("dataset.splits.file: name the train file too")


def load_splits(path: Path | str, format: str, splits: SplitSpec, **options: Any) -> dict[str, list[Row]]:
    """Read the data of a configuration: `path` is one data file, or the folder of `splits.file`."""
    if not splits.file:
        return split_rows(load_rows(path, format, **options), splits)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    files = {name: (folder / file).resolve() for name, file in splits.file.items()}
    if len(set(files.values())) < len(files):
        raise ConfigError(f"dataset.splits.file: one file serves two splits ({dict(splits.file)}); rows would leak")
    rows = _load_alike(files, format, options)
    return split_rows(rows.pop("train"), splits) | rows


def _load_alike(files: Mapping[str, Path], format: str, options: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows of each split's file. Those of labelled recordings have the same options, the training file's first."""
    rows: dict[str, list[Row]] = {}
    classes: tuple[str, ...] = ()
    for name in sorted(files, key=lambda name: name != "train"):
        rows[name] = load_rows(files[name], format, classes=classes, **options)
        classes = classes_of(rows[name], files[name], format) or classes
    if classes != classes_of(rows["train"], files["train"], format):  # another file has more
        rows = {name: load_rows(file, format, classes=classes, **options) for name, file in files.items()}
    return {name: rows[name] for name in files}


def split_rows(rows: Sequence[Row], splits: SplitSpec) -> dict[str, list[Row]]:
    """Split rows by group, then by fraction. "train" comes first; each split keeps the order of the file."""
    by_group = _take_groups(rows, splits)
    rest = [index for index in range(len(rows)) if not any(index in taken for taken in by_group.values())]
    by_fraction = _take_fractions([rows[index].group for index in rest], splits)
    taken = {name: {rest[i] for i in places} for name, places in by_fraction.items()}
    if "train" in by_group:  # named groups train, and what is in no split is left out
        chosen = {**by_group, **taken}
    else:
        left = set(rest).difference(*taken.values())
        chosen = {"train": left, **by_group, **taken}
    for name, indices in chosen.items():
        if not indices:
            raise DataError(
                f"dataset.splits: no rows for {name!r} ({len(rows)} rows in all); use more rows or other splits"
            )
    return {name: [rows[index] for index in sorted(chosen[name])] for name in SPLITS if name in chosen}


def _take_groups(rows: Sequence[Row], splits: SplitSpec) -> dict[str, set[int]]:
    wanted = {name: {str(group) for group in groups} for name, groups in splits.group.items()}
    known = {row.group for row in rows}
    seen: dict[str, str] = {}
    for name, groups in wanted.items():
        for group in sorted(groups):
            if group not in known:
                shown = ", ".join(sorted(known)[:30]) if known != {""} else "none: the rows carry no group"
                raise DataError(f"dataset.splits.group.{name}: no rows of group {group!r}; the groups are {shown}")
            if group in seen:
                raise ConfigError(f"dataset.splits.group: {group!r} is in both {seen[group]!r} and {name!r}")
            seen[group] = name
    return {name: {i for i, row in enumerate(rows) if row.group in groups} for name, groups in wanted.items()}


def _take_fractions(groups: Sequence[str], splits: SplitSpec) -> dict[str, list[int]]:
    """Places in `groups` (one entry per row) of each fractional split."""
    if not splits.fraction:
        return {}
    units: list[list[int]] = [[i] for i in range(len(groups))]
    unit = "rows"
    if splits.by_group:
        names = sorted(set(groups))
        if names in ([], [""]):
            raise DataError("dataset.splits.by_group: the rows carry no group; set by_group: false or give groups")
        units = [[i for i, group in enumerate(groups) if group == name] for name in names]
        unit = "groups"
    order = np.random.default_rng([splits.seed, len(units)]).permutation(len(units))
    taken: dict[str, list[int]] = {}
    start = 0
    for name, share in splits.fraction.items():
        count = round(share * len(units))
        if count == 0:
            raise DataError(
                f"dataset.splits.fraction.{name}: {share} of {len(units)} {unit} is none; "
                f"use more {unit} or a larger share"
            )
        taken[name] = [i for unit_index in order[start : start + count] for i in units[unit_index]]
        start += count
    return taken
