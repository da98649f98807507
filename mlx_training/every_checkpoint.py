"""All checkpoints of a run side by side: figures as a table and a plot, and what each makes of the same prompts."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_training.assemble import LoadedRun, check_fits, load_run
from mlx_training.checkpoint import CheckpointStore
from mlx_training.evaluate import evaluate_loaded
from mlx_training.generate import GREEDY, generator_of, load_language_model, sample_texts
from mlx_training.protocols import Protocol
from mlx_training.run_directory import write_atomic
from mlx_training.sampling import Sampling

TABLE, PLOT = "checkpoints.csv", "checkpoints.png"
PLOTTED = ("loss", "perplexity", "bits_per_byte", "accuracy")


def evaluate_checkpoints(
    run: Path,
    split: str | None = None,
    data: Path | None = None,
    backend: str | None = None,
    *,
    device: str | None = None,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """Evaluate every checkpoint that a run has kept, oldest first, into RUN/checkpoints.csv and checkpoints.png."""
    loaded = load_run(run, backend, device=device)
    records = []
    for step in _each_checkpoint(loaded, run):
        metrics = evaluate_loaded(loaded, run, split, data, protocol)
        records.append({"step": step} | _numbers(metrics))
    columns = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomic(run / TABLE, text.getvalue())
    _plot(records, run / PLOT)
    return {"run": str(run), "checkpoints": records, "table": str(run / TABLE), "plot": str(run / PLOT)}


def generate_at_checkpoints(
    run: Path,
    prompts: Sequence[str],
    backend: str | None = None,
    *,
    device: str | None = None,
    sampling: Sampling = GREEDY,
    samples: int = 1,
) -> dict[str, Any]:
    """Continue the same prompts, with the same draws, from every checkpoint that a run has kept, oldest first."""
    loaded, context_length = load_language_model(run, backend, device=device)
    generator = generator_of(loaded, sampling)
    found = [
        {"step": step, "samples": sample_texts(generator, prompts, samples, context_length)}
        for step in _each_checkpoint(loaded, run)
    ]
    return {"run": str(run), "backend": loaded.backend.name, "checkpoints": found}


def show_evaluations(result: Mapping[str, Any]) -> str:
    """One line a checkpoint."""
    records = result["checkpoints"]
    names = [name for name in PLOTTED if records[0].get(name) is not None]
    rows = [[str(record["step"]), *(f"{record[name]:.4g}" for name in names)] for record in records]
    table = [["step", *names], *rows]
    lines = ["  ".join(cell.rjust(13) for cell in line) for line in table]
    return "\n".join([*lines, f"{result['table']}, {result['plot']}"])


def show_generations(result: Mapping[str, Any]) -> str:
    """What each checkpoint made of one prompt, then of the next; line breaks are written as in Python."""
    checkpoints = result["checkpoints"]
    width = max(len(str(checkpoint["step"])) for checkpoint in checkpoints)
    blocks = []
    for i, first in enumerate(checkpoints[0]["samples"]):
        lines = [f"  {checkpoint['step']:{width}}  {checkpoint['samples'][i]['text']!r}" for checkpoint in checkpoints]
        blocks.append("\n".join([repr(first["prompt"]), *lines]))
    return "\n".join(blocks)


def _each_checkpoint(loaded: LoadedRun, run: Path) -> Iterator[int]:
    """The step of every kept checkpoint, with its weights in the model."""
    store = CheckpointStore(run)
    for path in store.paths():
        checkpoint = store.load(path)
        check_fits(loaded.model.spec, checkpoint)
        loaded.backend.load(loaded.model, checkpoint.model)
        yield checkpoint.step


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Numbers under dotted names; what is text (a protocol's name) stays text."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        flat |= _numbers(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One panel a figure, against the step."""
    from matplotlib.figure import Figure

    names = [name for name in PLOTTED if records[0].get(name) is not None]
    figure = Figure(figsize=(3.2 * len(names), 2.8), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        axes.plot([record["step"] for record in records], [record[name] for record in records], marker="o")
        axes.set(title=name.replace("_", " "), xlabel="step")
    figure.savefig(path, dpi=120)
