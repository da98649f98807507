"""Where the time of an optimiser step goes: data, encoder, LM forward, head and loss, backward, optimiser, host.

The real model, data, objective and step of a configuration. Phases are timed from outside, through what every model and
backend offers (`model.inputs`, `model.hidden`, the objective, `Backend.gradients`), with the device awaited at each
border, so nothing overlaps; beside them stands the whole step as training takes it. In MLX the phases are not compiled
and the step is: their difference is what compilation saves.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from mlx_training.backend import replaced
from mlx_training.config import RunConfig
from mlx_training.data.batch import Batch
from mlx_training.diagnostics import machine
from mlx_training.diagnostics.flops import SHAPES, batch_shape, count_flops, lm_shape, spared
from mlx_training.diagnostics.subject import Subject, from_config
from mlx_training.objectives import Sums
from mlx_training.pretrained import frozen_config
from mlx_training.spec import PretrainedSpec, TimeSeriesSpec

PHASES = ("data", "encoder", "lm_forward", "head_loss", "backward", "optimizer", "host")
ADVICE = {
    "data": "making batches takes longer than the step: tokenise rows once, keep them encoded, prepare batches ahead "
    "(the trainer does, which hides them only while they are faster than the step)",
    "encoder": "the encoder leads: use a larger patch_size or shorter series, fewer layers, or a smaller ffn_size",
    "lm_forward": "the language model's forward pass leads: use larger batches while they fit, expand packed weights "
    "(llm_weights: dequantized), and shorten prompts and series",
    "head_loss": "head and loss lead: let the head see label places only (model.logprobs), and shorten answers",
    "backward": "the backward pass leads, as it should when all is well (about 1 to 2 times the forward pass): shorten "
    "prompts and series, use larger batches, and make sure that frozen weights get no gradient",
    "optimizer": "the update leads: train fewer parameters (train_lm_head: false), or accumulate more micro-batches",
    "host": "the host leads: log and evaluate less often, read no metric between log points, and use larger batches",
}


def profile(config: RunConfig, backend: str | None = None, *, num_steps: int = 20) -> dict[str, Any]:
    """The report of `tools/profile_step.py` for a configuration; times in seconds, medians over `num_steps` steps.

    "compiled_saves_seconds" is the sum of the phases without "data" (which another thread prepares) minus the whole
    step; in PyTorch, where nothing is compiled, what is left is the cost of waiting at every border, and noise.
    Raises what assembling a run raises.
    """
    return profile_subject(full_subject(config, backend), num_steps=num_steps)


def full_subject(config: RunConfig, backend: str | None = None) -> Subject:
    """The subject of a configuration with micro-batches of their real size."""
    return from_config(config, backend, max_rows=config.training.batch_size)


def profile_subject(subject: Subject, *, num_steps: int = 20) -> dict[str, Any]:
    """The same for a model, data and step that are there already; its parameters are put back."""
    with subject.restored():
        steps, data_seconds = _load(subject, num_steps)
        rows = [_phases(subject, batches) for batches in steps[-1:] + steps][1:]  # the first one warms up
        updates = _updates(subject, steps)
        whole, num_compilations = _whole_steps(subject, steps)
    phases = {name: median(row[name] for row in rows) for name in ("encoder", "lm_forward", "head_loss", "backward")}
    phases |= {"data": data_seconds, "optimizer": median(updates), "host": median(row["host"] for row in rows)}
    phases = {name: phases[name] for name in PHASES}
    in_step = sum(seconds for name, seconds in phases.items() if name != "data")
    step_seconds = median(whole)
    tokens = [sum(batch.tokens.size for batch in batches) for batches in steps]
    supervised = [sum(batch.num_supervised for batch in batches) for batches in steps]
    achieved, peak = _rates(subject, steps, whole)
    largest = max(phases, key=lambda name: phases[name] if name != "data" or data_seconds > step_seconds else 0)
    return {
        "config": subject.config.experiment.name if subject.config else "",
        "backend": subject.backend.name,
        "device": subject.backend.runtime.device,
        "precision": subject.backend.runtime.precision,
        "threads": peak.threads if peak else None,
        "load_average": round(os.getloadavg()[0], 2),
        "steps": len(steps),
        "batch_shape": batch_shape(steps[-1][0], _patch_size(subject)).to_json(),
        "seconds": phases,
        "sum_seconds": in_step,
        "step_seconds": step_seconds,
        "compiled_saves_seconds": in_step - step_seconds,
        "tokens_per_second": {"supervised": sum(supervised) / sum(whole), "all": sum(tokens) / sum(whole)},
        "gflops_per_second": {
            "achieved": None if achieved is None else achieved / 1e9,
            "matmul_peak": None if peak is None else peak.flops_per_second / 1e9,
            "share": None if achieved is None or peak is None else achieved / peak.flops_per_second,
        },
        "peak_memory_bytes": subject.backend.peak_memory(),
        "num_compilations": num_compilations,
        "largest": largest,
        "advice": ADVICE[largest],
    }


def show(report: Mapping[str, Any]) -> str:
    """The report for people."""
    seconds, step = report["seconds"], report["step_seconds"]
    batch, speed, rate = report["batch_shape"], report["tokens_per_second"], report["gflops_per_second"]
    longest = max(seconds.values()) or 1.0
    lines = [
        f"{report['config']}, {report['backend']} on {report['device']}, {report['precision']}, load "
        f"{report['load_average']}: {batch['rows']} x {batch['tokens']} places, medians of {report['steps']} steps"
    ]
    for name, value in seconds.items():
        note = "  (prepared ahead by another thread)" if name == "data" else ""
        lines.append(f"  {name:10} {value * 1e3:9.2f} ms  {'█' * round(30 * value / longest)}{note}")
    saved = report["compiled_saves_seconds"] * 1e3
    what = "compiled saves" if report["num_compilations"] else "waiting at the borders"
    lines += [
        f"  {'sum':10} {report['sum_seconds'] * 1e3:9.2f} ms without data",
        f"  {'step':10} {step * 1e3:9.2f} ms as training takes it ({what}: {saved:.2f} ms)",
        f"{speed['supervised']:,.0f} supervised tokens/s, {speed['all']:,.0f} places/s",
    ]
    if rate["achieved"] is not None:
        peak = "" if rate["share"] is None else f", {rate['share']:.0%} of this machine's {rate['matmul_peak']:,.0f}"
        lines.append(f"{rate['achieved']:,.1f} GFLOP/s{peak}")
    lines += [
        f"peak memory {report['peak_memory_bytes'] / 1e6:,.0f} MB, {report['num_compilations']} compilations",
        f"{report['largest']}: {report['advice']}",
    ]
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw the phases as bars, and the whole step beside them."""
    from matplotlib.figure import Figure

    names = [*report["seconds"], "whole step"]
    values = [1e3 * value for value in (*report["seconds"].values(), report["step_seconds"])]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, values, color=["tab:blue"] * (len(names) - 1) + ["tab:orange"])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="ms", title=f"{report['config']}, {report['backend']} on {report['device']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def take_steps(subject: Subject, num_steps: int) -> None:
    """Steps as training takes them, after one that is not counted on: what a framework's own profiler records."""
    steps, _ = _load(subject, num_steps)
    _whole_steps(subject, steps)


def _load(subject: Subject, num_steps: int) -> tuple[list[list[Batch]], float]:
    """Micro-batches of each step, and the mean seconds to make those of one (most come from a window made at once)."""
    started = time.perf_counter()
    k = subject.accumulation
    steps = [[subject.batch(index) for index in range(k * i, k * i + k)] for i in range(num_steps)]
    return steps, (time.perf_counter() - started) / num_steps


def _phases(subject: Subject, batches: Sequence[Batch]) -> dict[str, float]:
    """Seconds of the phases between the batch in NumPy and the gradients, summed over the micro-batches of a step."""
    rows = [_timed_gradients(subject, batch) for batch in batches]
    return {name: sum(row[name] for row in rows) for name in rows[0]}


def _timed_gradients(subject: Subject, batch: Batch) -> dict[str, float]:
    model, clock = subject.model, time.perf_counter
    marks: dict[str, float] = {}

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            result = function(*args)
            _wait(result)
            marks[name] = clock()
            return result

        return run

    def begun(function: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
        def run(given: Any) -> Any:
            if name not in marks:  # with the first of several chunks, not when one is computed again
                _wait(given)
                marks[name] = clock()
            return function(given)

        return run

    def objective(model: Any, batch: Batch) -> Sums:
        marks["moved"] = clock()
        sums = subject.objective(model, batch)
        _wait(sums["loss"])
        marks["loss"] = clock()
        return sums

    read_prefix, reading = model.past, [0.0]

    def past(batch: Batch) -> Any:
        begun_at = clock()
        if (known := read_prefix(batch)) is not None:
            _wait(known)
        reading.append(clock() - begun_at)
        return known

    started = clock()
    with (
        replaced(model, "past", past),
        replaced(model, "inputs", timed(model.inputs, "inputs")),
        replaced(model, "head", begun(model.head, "hidden")),
    ):
        subject.backend.gradients(model, objective, batch)  # returns NumPy arrays: the device is done
    ended = clock()
    return {
        "host": marks["moved"] - started - sum(reading),
        "encoder": marks["inputs"] - marks["moved"],
        "lm_forward": marks["hidden"] - marks["inputs"] + sum(reading),  # and of what stands before the series
        "head_loss": marks["loss"] - marks["hidden"],
        "backward": ended - marks["loss"],
    }


def _updates(subject: Subject, steps: Sequence[Sequence[Batch]]) -> list[float]:
    """Seconds of steps whose loss depends on no parameter: division, clipping, AdamW. The rate 0 keeps the model."""

    def constant(_: Any, batch: Batch) -> Sums:
        # two expressions: MLX 0.32 cannot compile a function that returns the same one twice
        return {"loss": (batch.mask * 2).sum(), "weight": batch.mask.sum()}

    step = subject.backend.make_step(subject.model, constant, subject.optim, seed=subject.seed)
    rates = dict.fromkeys(subject.spec.groups, 0.0)
    seconds = []
    for number, batches in enumerate([steps[0], *steps], start=1):
        started = time.perf_counter()
        _finish(step([replace(batches[0], prefix=0)], step=number, lr=rates))
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _whole_steps(subject: Subject, steps: Sequence[Sequence[Batch]]) -> tuple[list[float], int]:
    """Seconds of real steps, compilation not counted, and how often one was compiled."""
    step = subject.new_step()
    shapes = {tuple(batch.tokens.shape + batch.targets.shape for batch in batches): batches for batches in steps}
    seconds = []
    for number, batches in enumerate([*shapes.values(), *steps], start=1):
        started = time.perf_counter()
        _finish(step(batches, step=number, lr=subject.rates(1 + number % subject.total_steps)))
        seconds.append(time.perf_counter() - started)
    return seconds[len(shapes) :], getattr(step, "num_compilations", 0)


def _finish(metrics: Mapping[str, Any]) -> None:
    for value in metrics.values():
        float(value)


def _wait(array: Any) -> None:
    """Until the device has computed it: both frameworks spell reading one number alike."""
    array.reshape(-1)[0].item()


def _rates(
    subject: Subject, steps: Sequence[Sequence[Batch]], whole: Sequence[float]
) -> tuple[float | None, machine.Machine | None]:
    """Operations a second of the real steps, and what the framework's own product reaches on this machine."""
    runtime, spec = subject.backend.runtime, subject.spec
    peak = machine.measure(subject.backend.name, runtime.device, runtime.precision)
    if not isinstance(spec, PretrainedSpec) and type(spec) not in SHAPES:
        return None, peak  # somebody's own model: its arithmetic is not known
    lm = lm_shape(spec, frozen_config(spec))
    shapes = [batch_shape(batch, _patch_size(subject)) for batches in steps for batch in batches]
    total = sum(count_flops(spec, lm, spared(shape, spec, runtime)).total for shape in shapes)
    return total / sum(whole), peak


def _patch_size(subject: Subject) -> int:
    return subject.spec.encoder.patch_size if isinstance(subject.spec, TimeSeriesSpec) else 1
