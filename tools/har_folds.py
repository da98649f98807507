"""Choose a recipe for real sensors without its test: soft prompt and control, cross-validated over the other subjects.

    python tools/har_folds.py [key=value ...] --data har_total_acc_train.npz --out runs/har_folds

The subjects of configs/timeseries/har.yaml that are not the test are dealt into five folds. Fold k is tested, fold
k + 1 chooses the checkpoint, the other three train; the test subjects of the configuration are not in the file that is
read. Given again, the command leaves what is finished.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

import numpy as np

from mlx_training.config import load_config
from mlx_training.errors import Interrupted, UserError
from mlx_training.trainer import train
from tools.har_report import CONFIG, configure, train_control

NUM_FOLDS = 5
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
    found: dict[str, list[float]] = {name: [] for name in given.models}
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
            except (UserError, Interrupted) as error:
                print(error, file=sys.stderr)
                return error.exit_code
            accuracies.append(result["eval"]["accuracy"])
            print(f"fold {k} (subjects {folds[k]}), {name}: {accuracies[-1]:.3f}", flush=True)
    print(", ".join(f"{name} {mean(accuracies):.3f}" for name, accuracies in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
