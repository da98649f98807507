"""Evidence on real sensors: activities through the frozen LM, beside a linear head on the same encoder.

    python -m tools.har_report [key=value ...] --data har_total_acc_train.npz --out runs/har_report [--seeds 1 2 3]

For every seed: `main` (configs/timeseries/har.yaml), `no_scale` (the same without the numeric scale: only the shape of
a series is left) and `control` (tools/har_control.py). Test subjects are read once a run, after the choice of its
checkpoint on the validation subjects. Given again, the command continues what was interrupted (the control begins anew)
and leaves what is finished (result.json). Writes report.md, report.json and confusion.png.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from mlx_training.assemble import RowData, assemble
from mlx_training.config import RunConfig, load_config, to_yaml
from mlx_training.data.rows import normalise
from mlx_training.environment import versions
from mlx_training.errors import ConfigError, Interrupted, UserError
from mlx_training.run_directory import write_atomic
from mlx_training.trainer import train
from tools.har_control import TEST, Result, train_control

CONFIG = "timeseries/har"
VARIANTS = {
    "main": "soft prompt",
    "no_scale": "soft prompt without the numeric scale",
    "control": "linear head on the same encoder",
}
NO_SCALE = ("model.encoder.numeric_scale=false",)
REQUIRED = 0.86  # mean test accuracy of `main`: the least that is accepted


def run_all(data: Path, out: Path, seeds: Sequence[int], overrides: Sequence[str]) -> dict[str, dict[int, Result]]:
    """Every variant with every seed, each in its own directory. Raises what `run_once` does."""
    results: dict[str, dict[int, Result]] = {name: {} for name in VARIANTS}
    for seed in seeds:
        for name in VARIANTS:
            run = out / f"{name}_seed{seed}"
            own = [*overrides, *(NO_SCALE if name == "no_scale" else ())]
            results[name][seed] = run_once(name, configure(data, run, seed, own), run)
    return results


def run_once(name: str, config: RunConfig, run: Path) -> Result:
    """The result of a variant in its directory: read where it is finished, else trained.

    Raises ConfigError when the directory holds a run of another configuration.
    """
    text, written = to_yaml(config), run / "config.yaml"
    if written.is_file() and written.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{run} holds a run of another configuration; give another --out, or remove it")
    if (run / "result.json").is_file():
        return json.loads((run / "result.json").read_text(encoding="utf-8"))
    print(run.name, file=sys.stderr, flush=True)
    if name != "control":
        return train(config, resume="auto")
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(written, text)
    return train_control(config, run)


@contextmanager
def ends_in_a_line() -> Iterator[None]:
    """Errors that a user can act on, and interruptions, end the program with a line and its exit code."""
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"{error}; give another --data or --out", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    except (Interrupted, KeyboardInterrupt) as error:
        print("interrupted; the same command goes on from here (a control begins anew)", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, Interrupted) else 130)


def configure(data: Path, run: Path, seed: int, overrides: Sequence[str]) -> RunConfig:
    """The shipped configuration with this data, seed and run directory.

    Raises ConfigError for overrides of these and of what the tools need: predictions of the test.
    """
    own = {"dataset.path": data, "output_dir": run, "experiment.seed": seed}
    own |= {"evaluation.test_split": TEST, "evaluation.save_predictions": "true"}
    for override in overrides:
        if (key := override.partition("=")[0]) in own:
            raise ConfigError(f"{override}: the tool sets {key} itself (see --data, --out, --seeds); leave it out")
    return load_config(CONFIG, [*(f"{key}={value}" for key, value in own.items()), *overrides])


def summarise(results: dict[str, dict[int, Result]]) -> dict[str, Any]:
    """Figures by name: one a seed, in order, and their mean."""
    accuracy = {name: [r["eval"]["accuracy"] for r in runs.values()] for name, runs in results.items()}
    main = [r["eval"] for r in results["main"].values()]
    accuracy["series_removed"] = [e["accuracy_without_series"] for e in main]
    accuracy["chance"] = [e["chance"] for e in main]
    return {name: {"mean": mean(values), "by_seed": values} for name, values in accuracy.items()}


def by_subject(config: RunConfig, mains: Sequence[Path], controls: Sequence[Path]) -> dict[str, float]:
    """Accuracy of `main` less that of the control on each test subject of a configuration, means over their runs."""
    data = assemble(config).data
    assert isinstance(data, RowData)
    subjects = np.array([row.group for row in data.rows(TEST)])
    main, control = (
        np.mean([[answer == given for answer, given in _predictions(run)] for run in runs], axis=0)
        for runs in (mains, controls)
    )
    return {name: float((main - control)[subjects == name].mean()) for name in np.unique(subjects).tolist()}


def against_chance(gaps: dict[str, float]) -> dict[str, Any]:
    """Differences by subject with their mean, and `p`, what a sign-flip test says of it.

    How often subjects whose differences could as well be negative would differ by as much on average, to either side:
    exact up to 16 subjects, else estimated from a sample.
    """
    from scipy.stats import permutation_test

    gaps = dict(sorted(gaps.items(), key=lambda gap: int(gap[0])))
    values, p = list(gaps.values()), 1.0  # of one subject, either sign is as far
    if len(values) > 1:
        p = permutation_test((values,), np.mean, permutation_type="samples", n_resamples=2**16, rng=0).pvalue
    return {"differences": gaps, "mean": mean(values), "p": float(p)}


def gaps_line(gaps: dict[str, Any]) -> str:
    """What `against_chance` found, in words."""
    each = ", ".join(f"{name}: {gap:+.3f}" for name, gap in gaps["differences"].items())
    means = f"mean over subjects {gaps['mean']:+.3f}, p = {gaps['p']:.3f} (sign-flip test)"
    return f"Soft prompt less control by subject: {each}; {means}."


def to_markdown(results: dict[str, dict[int, Result]], summary: dict[str, Any], gaps: dict[str, Any]) -> str:
    """The table, and the two conditions it is made for."""
    seeds, evaluated = list(results["main"]), next(iter(results["main"].values()))["eval"]["rows"]
    labels = VARIANTS | {"series_removed": "soft prompt, series removed", "chance": "best constant answer"}
    lines = [f"Accuracy on {evaluated} windows of subjects that neither trained nor chose a checkpoint.", ""]
    lines.append("| | mean | " + " | ".join(f"seed {seed}" for seed in seeds) + " | macro-F1 | invalid | steps | s |")
    lines.append("|---|" + "---:|" * (len(seeds) + 5))
    for name, label in labels.items():
        cells = [f"{summary[name]['mean']:.3f}", *(f"{value:.3f}" for value in summary[name]["by_seed"])]
        if runs := list(results.get(name, {}).values()):
            cells.append(f"{mean(r['eval']['macro_f1'] for r in runs):.3f}")
            cells += [str(sum(r["eval"]["invalid"] for r in runs)), f"{mean(r['steps'] for r in runs):.0f}"]
            cells.append(f"{mean(r['seconds'] for r in runs):.0f}")
        else:
            cells += [""] * 4
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    ours, control = summary["main"]["mean"], summary["control"]["mean"]
    lines += ["", f"At least {REQUIRED}: {'yes' if ours >= REQUIRED else 'no'}. "]
    lines[-1] += f"Not below the control: {'yes' if ours >= control else 'no'} ({ours - control:+.3f})."
    lines += ["", gaps_line(gaps)]
    return "\n".join(lines) + "\n"


def confusion(runs: Sequence[Path]) -> tuple[list[str], np.ndarray]:
    """Answers, and how often (row) was answered by (column), summed over runs; the last column is anything else."""
    pairs = [pair for run in runs for pair in _predictions(run)]
    names = sorted({answer for answer, _ in pairs})
    counts = np.zeros((len(names), len(names) + 1), int)
    for answer, prediction in pairs:
        counts[names.index(answer), names.index(prediction) if prediction in names else -1] += 1
    return names, counts


def _predictions(run: Path) -> list[tuple[str, str]]:
    """Answer and prediction of every test row, in order."""
    lines = (run / f"predictions_{TEST}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(normalise(line["answer"]), normalise(line["prediction"])) for line in map(json.loads, lines)]


def draw_confusion(names: Sequence[str], counts: np.ndarray, path: Path) -> None:
    """The matrix as a picture; colours are shares of a row."""
    from matplotlib.figure import Figure

    columns = [*names, "other"] if counts[:, -1].any() else list(names)
    counts = counts[:, : len(columns)]
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="generated", ylabel="true")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (i, j), count in np.ndenumerate(counts):
        axes.text(j, i, str(count), ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    figure.savefig(path, dpi=150)


def write_report(out: Path, results: dict[str, dict[int, Result]]) -> None:
    """report.md, report.json and confusion.png (of `main`, summed over seeds)."""
    summary = summarise(results)
    mains, controls = ([out / f"{name}_seed{seed}" for seed in results[name]] for name in ("main", "control"))
    names, counts = confusion(mains)
    draw_confusion(names, counts, out / "confusion.png")
    gaps = against_chance(by_subject(load_config(str(mains[0] / "config.yaml")), mains, controls))
    table = to_markdown(results, summary, gaps)
    write_atomic(out / "report.md", table)
    report = {"accuracy": summary, "by_subject": gaps, "runs": results, "versions": versions()}
    report["confusion"] = {"answers": names, "counts": counts.tolist()}
    write_atomic(out / "report.json", json.dumps(report, indent=1) + "\n")
    print(table, end="")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the npz file of windows, labels and subjects")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs and the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, help="optimiser steps of every run (default: as configured)")
    parser.add_argument("overrides", nargs="*", help="key=value, as for train")
    given = parser.parse_args()
    budget = [] if given.steps is None else ["training.num_epochs=null", f"training.max_steps={given.steps}"]
    with ends_in_a_line():
        results = run_all(given.data, given.out, given.seeds, [*budget, *given.overrides])
        write_report(given.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
