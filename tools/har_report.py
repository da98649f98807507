"""Evidence on real sensors: activities through the frozen LM, beside a linear head on the same encoder.

    python tools/har_report.py [key=value ...] --data har_total_acc_train.npz --out runs/har_report [--seeds 1 2 3]

For every seed: `main` (configs/timeseries/har.yaml), `no_scale` (the same without the numeric scale: only the shape of
a series is left) and `control`, a control and no product: the same encoder from the same initial values, mean-pooled
over real patches, channels side by side, and a linear layer to the classes. It sees the same batches in the same order,
the same normalisation and scale, the same optimiser, learning rates and steps, and its checkpoint is chosen on the same
validation subjects. Test subjects are read once a run, after that choice. Given again, the command continues
what was interrupted and leaves what is finished (result.json). Writes report.md, report.json and confusion.png.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from mlx_training.assemble import RowData, assemble, open_backend
from mlx_training.config import RunConfig, load_config, to_yaml
from mlx_training.data.batch import Batch
from mlx_training.data.rows import Row, normalise
from mlx_training.environment import versions
from mlx_training.errors import ConfigError, Interrupted, UserError
from mlx_training.evaluate import save_predictions
from mlx_training.init import initialise
from mlx_training.metrics import answer_metrics
from mlx_training.objectives import Objective, Sums
from mlx_training.progress import Progress
from mlx_training.run_directory import write_atomic
from mlx_training.spec import EncoderSpec, Param, Spec, TimeSeriesSpec
from mlx_training.spec.param import linear
from mlx_training.trainer import Cadence, judge, learning_rates, plan, train

CONFIG, TEST = "timeseries/har", "test"
VARIANTS = {
    "main": "soft prompt",
    "no_scale": "soft prompt without the numeric scale",
    "control": "linear head on the same encoder",
}
NO_SCALE = ("model.encoder.numeric_scale=false",)
REQUIRED = 0.86  # mean test accuracy of `main`
Result = dict[str, Any]


@dataclass(frozen=True)
class ControlSpec(Spec):
    """An encoder and a linear layer over the pooled channels, which learns at the projector's rate."""

    encoder: EncoderSpec
    num_channels: int
    num_classes: int

    def params(self) -> dict[str, Param]:
        in_size = self.num_channels * self.encoder.hidden_size
        return self.encoder.params() | dict(linear("head", self.num_classes, in_size, group="projector"))


def build_control(spec: ControlSpec) -> Any:
    """The control in PyTorch: a batch -> logits (B, C); S series, P patches, d hidden size, C classes."""
    import torch
    from torch import Tensor, nn

    from torch_backend.timeseries import Encoder

    class Control(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spec = spec
            self.encoder = Encoder(spec.encoder)
            self.head = nn.Linear(spec.num_channels * spec.encoder.hidden_size, spec.num_classes)

        def forward(self, batch: Batch) -> Tensor:
            h_SPd = self.encoder(batch.series, batch.scale, batch.num_patches, batch.series_place)
            real_SP = torch.arange(h_SPd.shape[1], device=h_SPd.device) < batch.num_patches[:, None]
            pooled_Sd = (h_SPd * real_SP[..., None]).sum(1) / batch.num_patches[:, None]
            return self.head(pooled_Sd.view(len(batch.rows), -1))  # the channels of a row stand together

    return Control()


def train_control(config: RunConfig, run: Path) -> Result:
    """Train, choose and test the control as the trainer does a model; the same result, and predictions_test.jsonl."""
    started = time.monotonic()
    assembly = assemble(config)
    data, seed = assembly.data, config.experiment.seed
    assert isinstance(assembly.spec, TimeSeriesSpec) and isinstance(data, RowData)
    first = data.rows("train")[0]
    spec = ControlSpec(assembly.spec.encoder, len(first.series), len(first.options))
    backend: Any = open_backend(config, "torch")
    model = build_control(spec).to(backend.device)
    backend.load(model, initialise(spec, seed))
    step = backend.make_step(model, control_objective(data.rows("train")), config.optim, seed=seed)
    batches, total_steps = plan(assembly)
    cadence, progress = Cadence(config, total_steps, batches.num_batches), Progress()
    accumulation = config.training.grad_accumulation_steps
    best, number = backend.export(model), 0
    with closing(batches.prefetch(0, total_steps * accumulation)) as stream:
        while number < total_steps and not progress.stopped_early:
            number += 1
            micro_batches = [next(stream) for _ in range(accumulation)]
            metrics = step(micro_batches, step=number, lr=learning_rates(config, number, total_steps))
            if cadence.evaluates(number):
                progress.loss = float(metrics["loss"])
                with step.averaged():
                    values, _ = score_control(backend, model, data, config.evaluation.split, config.evaluation.max_rows)
                    if judge(config, progress, values, number):
                        best = backend.export(model)
    seconds = time.monotonic() - started

    backend.load(model, best)
    metrics, predictions = score_control(backend, model, data, TEST, None)
    save_predictions(run / f"predictions_{TEST}.jsonl", predictions)
    result = {"run": str(run), "backend": "torch", "steps": number, "loss": progress.loss}
    result |= {"seconds": round(seconds, 2), "eval": metrics}
    write_atomic(run / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def control_objective(rows: Sequence[Row]) -> Objective:
    """Cross-entropy in nats, summed over the rows of a batch, and their number."""
    import torch
    import torch.nn.functional as F

    classes = torch.tensor([row.options.index(row.answer) for row in rows])

    def objective(model: Any, batch: Batch) -> Sums:
        logits_BC = model(batch)
        classes_B = classes[list(batch.rows)].to(logits_BC.device)
        loss = F.cross_entropy(logits_BC, classes_B, reduction="sum")
        return {"loss": loss, "weight": torch.full_like(loss, len(batch.rows))}

    return objective


def score_control(
    backend: Any, model: Any, data: RowData, split: str, limit: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of the control on a split (or its first `limit` rows) with the mean loss, and every row's prediction."""
    import torch

    rows = data.rows(split)[:limit]
    objective = control_objective(rows)
    size = data.config.evaluation.batch_size or data.config.training.batch_size
    given, loss = [""] * len(rows), 0.0
    for batch in data.eval_batches(split, size, limit):
        loss += backend.score(model, objective, batch)["loss"]
        with torch.no_grad():
            chosen = model(backend.to_device(batch)).argmax(-1).tolist()
        for row, index in zip(batch.rows, chosen, strict=True):
            given[row] = rows[row].options[index]
    lines = [
        {"id": r.id, "type": r.type, "answer": r.answer, "prediction": p} for r, p in zip(rows, given, strict=True)
    ]
    return answer_metrics(rows, given) | {"loss": loss / len(rows)}, lines


def run_all(data: Path, out: Path, seeds: Sequence[int], overrides: Sequence[str]) -> dict[str, dict[int, Result]]:
    """Every variant with every seed, each in its own directory; what is finished is read, not run.

    Raises ConfigError when a directory holds a run of another configuration.
    """
    results: dict[str, dict[int, Result]] = {name: {} for name in VARIANTS}
    for seed in seeds:
        for name in VARIANTS:
            run = out / f"{name}_seed{seed}"
            config = configure(data, run, seed, [*overrides, *(NO_SCALE if name == "no_scale" else ())])
            text, written = to_yaml(config), run / "config.yaml"
            if written.is_file() and written.read_text(encoding="utf-8") != text:
                raise ConfigError(f"{run} holds a run of another configuration; give another --out, or remove it")
            if (run / "result.json").is_file():
                results[name][seed] = json.loads((run / "result.json").read_text(encoding="utf-8"))
                continue
            print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
            if name == "control":
                run.mkdir(parents=True, exist_ok=True)
                write_atomic(written, text)
                results[name][seed] = train_control(config, run)
            else:
                results[name][seed] = train(config, resume="auto")
    return results


def configure(data: Path, run: Path, seed: int, overrides: Sequence[str]) -> RunConfig:
    """The shipped configuration with this data, seed and run directory."""
    own = [f"dataset.path={data}", f"output_dir={run}", f"experiment.seed={seed}"]
    own += [f"evaluation.test_split={TEST}", "evaluation.save_predictions=true"]
    return load_config(CONFIG, [*own, *overrides])


def summarise(results: dict[str, dict[int, Result]]) -> dict[str, Any]:
    """Figures by name: one a seed, in order, and their mean."""
    accuracy = {name: [r["eval"]["accuracy"] for r in runs.values()] for name, runs in results.items()}
    main = [r["eval"] for r in results["main"].values()]
    accuracy["series_removed"] = [e["accuracy_without_series"] for e in main]
    accuracy["chance"] = [e["chance"] for e in main]
    return {name: {"mean": mean(values), "by_seed": values} for name, values in accuracy.items()}


def by_subject(out: Path, results: dict[str, dict[int, Result]]) -> dict[str, Any]:
    """Accuracy of `main` less that of the control on each test subject, means over seeds, and what chance says of it.

    `p` is the exact sign-flip test's: how often subjects whose differences could as well be negative would differ by as
    much on average, to either side.
    """
    config = load_config(str(out / f"main_seed{next(iter(results['main']))}" / "config.yaml"))
    data = assemble(config).data
    assert isinstance(data, RowData)
    subjects = np.array([row.group for row in data.rows(TEST)])
    right: dict[str, np.ndarray] = {}
    for name in ("main", "control"):
        runs = [_predictions(out / f"{name}_seed{seed}") for seed in results[name]]
        right[name] = np.mean([[answer == given for answer, given in run] for run in runs], axis=0)
    names = sorted(set(subjects.tolist()), key=int)
    gaps = np.array([(right["main"] - right["control"])[subjects == name].mean() for name in names])
    flips = np.array(list(itertools.product((-1, 1), repeat=len(gaps))))
    p = np.mean(np.abs((flips * gaps).mean(1)) >= abs(gaps.mean()) - 1e-12)
    return {"differences": dict(zip(names, gaps.tolist(), strict=True)), "mean": float(gaps.mean()), "p": float(p)}


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
    each = ", ".join(f"{name}: {gap:+.3f}" for name, gap in gaps["differences"].items())
    lines += ["", f"Soft prompt less control by subject: {each}; mean {gaps['mean']:+.3f}, p = {gaps['p']:.2f} (exact"]
    lines[-1] += " sign-flip test)."
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
    names, counts = confusion([out / f"main_seed{seed}" for seed in results["main"]])
    draw_confusion(names, counts, out / "confusion.png")
    gaps = by_subject(out, results)
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
    try:
        results = run_all(given.data, given.out, given.seeds, [*budget, *given.overrides])
    except (UserError, Interrupted) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    write_report(given.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
