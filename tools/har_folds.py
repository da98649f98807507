"""Choose a recipe for real sensors without its test: soft prompt and control, cross-validated over the other subjects.

    python tools/har_folds.py [key=value ...] --data har_total_acc_train.npz --out runs/har_folds

The subjects of configs/timeseries/har.yaml that are not the test are dealt into five folds. Fold k is tested, fold
k + 1 chooses the checkpoint, the other three train; the test subjects of the configuration are not in the file that is
read. Beside each accuracy stands another, of the fold's lying windows turned about x to 12 sides: people lie on any
side, but the few of a fold do not, and an answer must not depend on it. Given again, the command leaves what is
finished.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np

from mlx_training.assemble import RowData, load_run
from mlx_training.config import RunConfig, load_config
from mlx_training.data.augment import rotation
from mlx_training.data.rows import Row
from mlx_training.errors import Interrupted, UserError
from mlx_training.evaluate import Evaluator
from mlx_training.trainer import train
from tools.har_control import TEST, load_control, score_control, train_control
from tools.har_report import CONFIG, configure

NUM_FOLDS, NUM_SIDES = 5, 12
LYING = "laying"  # the data set's spelling
MODELS = ("main", "control")


def without_test(data: Path, out: Path) -> tuple[Path, list[int]]:
    """A file with all but the test subjects of the configuration, and those that are left."""
    splits = load_config(CONFIG, [f"dataset.path={data}"]).dataset.splits
    assert splits is not None and splits.group is not None, "the configuration splits by subject"
    arrays = dict(np.load(data))
    keep = ~np.isin(arrays["subject"], [int(subject) for subject in splits.group.test or ()])
    path = out / "without_test.npz"
    np.savez(path, **{name: a[keep] if a.shape[:1] == keep.shape else a for name, a in arrays.items()})
    return path, np.unique(arrays["subject"][keep]).tolist()


def on_any_side(rows: Sequence[Row]) -> list[Row]:
    """The lying windows, each turned about x to `NUM_SIDES` sides."""
    turns = [rotation(np.array([2 * np.pi * side / NUM_SIDES, 0, 0])) for side in range(NUM_SIDES)]
    lying = [row for row in rows if row.answer == LYING]
    return [replace(r, series=tuple((turn @ np.stack(r.series)).astype(np.float32))) for r in lying for turn in turns]


def accuracy_on_any_side(name: str, config: RunConfig, run: Path) -> float:
    """Accuracy of a finished fold on its lying windows, turned to all sides."""
    if name == "control":
        backend, model, data = load_control(config, run)
        return float(score_control(backend, model, data, on_any_side(data.rows(TEST)))[0]["accuracy"])
    loaded = load_run(run)
    assert isinstance(loaded.data, RowData)
    evaluator = Evaluator(loaded.config, loaded.backend, loaded.model, loaded.data)
    return float(evaluator.report("", on_any_side(loaded.data.rows(TEST)))[0]["accuracy"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(NUM_FOLDS)), help="only these, 0 to 4")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS), help="only these")
    parser.add_argument("overrides", nargs="*", help="key=value, as for train")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path, subjects = without_test(given.data, given.out)
    folds = [subjects[k::NUM_FOLDS] for k in range(NUM_FOLDS)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in given.models}
    for k in given.folds:
        groups = json.dumps({"validation": folds[(k + 1) % NUM_FOLDS], "test": folds[k]})
        for name, accuracies in found.items():
            run = given.out / f"{name}_fold{k}"
            try:
                config = configure(path, run, given.seed, [f"dataset.splits.group={groups}", *given.overrides])
                if (run / "result.json").is_file():
                    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
                elif name == "control":
                    run.mkdir(parents=True, exist_ok=True)
                    result = train_control(config, run)
                else:
                    result = train(config, resume="auto")
                accuracies.append((result["eval"]["accuracy"], accuracy_on_any_side(name, config, run)))
            except (UserError, Interrupted) as error:
                print(error, file=sys.stderr)
                return error.exit_code
            print(f"fold {k} (subjects {folds[k]}), {name}: {_shown(*accuracies[-1])}", flush=True)
    print(", ".join(f"{name} {_shown(*map(mean, zip(*pairs, strict=True)))}" for name, pairs in found.items()))
    return 0


def _shown(accuracy: float, turned: float) -> str:
    return f"{accuracy:.3f} (lying on any side {turned:.3f})"


if __name__ == "__main__":
    sys.exit(main())
