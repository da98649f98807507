"""Choose a recipe for real sensors without its test: soft prompt and control, cross-validated over the other subjects.

    python -m tools.har_folds [key=value ...] --data har_total_acc_train.npz --out runs/har_folds

The subjects of configs/timeseries/har.yaml that are not the test are dealt into five folds. Fold k is tested, fold
k + 1 chooses the checkpoint, the other three train; the test subjects of the configuration are not in the file that is
read. Beside each accuracy stands another, of the fold's lying windows turned about x to 12 sides: people lie on any
side, but the few of a fold do not, and an answer must not depend on it. The last line says how the two differ on each
subject, as a mean over seeds. Given again, the command leaves what is finished; another configuration or other data
need another --out.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np

from mlx_training.assemble import RowData, assemble, load_run
from mlx_training.config import RunConfig
from mlx_training.data.augment import AXES, rotation
from mlx_training.data.npz_file import read_npz
from mlx_training.data.rows import Row
from mlx_training.errors import ConfigError
from mlx_training.evaluate import Evaluator
from tools.har_control import TEST, load_control, score_control
from tools.har_report import against_chance, by_subject, configure, ends_in_a_line, gaps_line, run_once

NUM_FOLDS, NUM_SIDES = 5, 12
LYING = "laying"  # the data set's spelling
MODELS = ("main", "control")


def without_test(data: Path, out: Path, overrides: Sequence[str]) -> tuple[Path, list[int]]:
    """A file with all but the test subjects of the configuration, and those that are left.

    Raises what the configuration and its data do, and ConfigError when `out` has folds of other data.
    """
    config = configure(data, out, 0, overrides)
    splits, arrays = config.dataset.splits, read_npz(data)
    assert splits is not None and splits.group is not None, "the configuration splits by subject"
    rows = assemble(config).data
    assert isinstance(rows, RowData)
    rows.rows("train")  # refuses data that are not what the configuration says
    keep = ~np.isin(arrays["subject"], [int(subject) for subject in splits.group.test or ()])
    arrays = {name: a[keep] if a.shape[:1] == keep.shape else a for name, a in arrays.items()}
    path = out / "without_test.npz"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)  # type: ignore[arg-type]
    elif any(not np.array_equal(a, arrays.get(name)) for name, a in read_npz(path).items()):  # type: ignore[arg-type]
        raise ConfigError(f"{out} holds folds of other data than {data}; give another --out, or remove it")
    return path, np.unique(arrays["subject"]).tolist()


def on_any_side(rows: Sequence[Row]) -> list[Row]:
    """The lying windows, each turned about x to `NUM_SIDES` sides."""
    turns = [rotation(np.array([2 * np.pi * side / NUM_SIDES, 0, 0])) for side in range(NUM_SIDES)]
    lying = [row for row in rows if row.answer == LYING and len(row.series) == AXES]
    return [replace(r, series=tuple((turn @ np.stack(r.series)).astype(np.float32))) for r in lying for turn in turns]


def accuracy_on_any_side(name: str, config: RunConfig, run: Path) -> float:
    """Accuracy of a finished fold on its lying windows, turned to all sides; nan where nobody lies."""
    if name == "control":
        backend, model, data = load_control(config, run)
        rows = on_any_side(data.rows(TEST))
        return float(score_control(backend, model, data, rows)[0]["accuracy"]) if rows else math.nan
    loaded = load_run(run)
    assert isinstance(loaded.data, RowData)
    rows = on_any_side(loaded.data.rows(TEST))
    evaluator = Evaluator(loaded.config, loaded.backend, loaded.model, loaded.data)
    return float(evaluator.report("", rows)[0]["accuracy"]) if rows else math.nan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--folds", type=int, choices=range(NUM_FOLDS), nargs="+", default=list(range(NUM_FOLDS)))
    parser.add_argument(
        "--models", choices=MODELS, nargs="+", default=list(MODELS), help="only these (both, for the differences)"
    )
    parser.add_argument("overrides", nargs="*", help="key=value, as for train")
    given = parser.parse_args()
    seeds, folds, models = (list(dict.fromkeys(each)) for each in (given.seeds, given.folds, given.models))
    with ends_in_a_line():
        cross_validate(given.data, given.out, seeds, folds, models, given.overrides)
    return 0


def cross_validate(
    data: Path, out: Path, seeds: Sequence[int], chosen: Sequence[int], models: Sequence[str], overrides: Sequence[str]
) -> None:
    """Train and test, print each fold, the means and the differences by subject.

    Raises what `without_test` and `run_once` do.
    """
    path, subjects = without_test(data, out, overrides)
    folds = [subjects[k::NUM_FOLDS] for k in range(NUM_FOLDS)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    gaps: dict[str, float] = {}
    for k in chosen:
        groups = json.dumps({"validation": folds[(k + 1) % NUM_FOLDS], "test": folds[k]})
        runs: dict[str, list[Path]] = {name: [] for name in models}
        for seed, name in itertools.product(seeds, models):
            run = out / f"{name}_seed{seed}_fold{k}"
            config = configure(path, run, seed, [*overrides, f"dataset.splits.group={groups}"])
            accuracy = run_once(name, config, run)["eval"]["accuracy"]
            runs[name].append(run)
            found[name].append((accuracy, accuracy_on_any_side(name, config, run)))
            print(f"fold {k} (subjects {folds[k]}), seed {seed}, {name}: {_shown(*found[name][-1])}", flush=True)
        if len(runs) == len(MODELS):
            gaps |= by_subject(config, runs["main"], runs["control"])
    print(
        "mean: " + ", ".join(f"{name} {_shown(*map(mean, zip(*pairs, strict=True)))}" for name, pairs in found.items())
    )
    if gaps:
        print(gaps_line(against_chance(gaps)))


def _shown(accuracy: float, turned: float) -> str:
    return f"{accuracy:.3f} " + ("(nobody lies)" if math.isnan(turned) else f"(lying on any side {turned:.3f})")


if __name__ == "__main__":
    sys.exit(main())
