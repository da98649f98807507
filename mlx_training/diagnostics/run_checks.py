"""Checks of a run directory: its checkpoint, and the course of its metrics."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mlx_training.diagnostics.report import Finding, failed, passed, skipped, warned
from mlx_training.json_lines import read_metrics

SPIKE = 4.0  # times the median of the losses before
FLAT = 0.98  # of the first losses is no progress
ENOUGH = 8  # records to judge a course by
WORSE = 1.5, 1.15  # final evaluation loss against the best: fail, warn


def metrics(run: Path) -> list[Finding]:
    """What metrics.jsonl tells."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return [skipped("metrics", f"no {path.name}")]
    records = read_metrics(path)
    lines = sum(bool(line.strip()) for line in path.read_bytes().splitlines())
    if len(records) < lines - 1 or (lines and not records):  # a kill may leave the last line torn
        return [failed("metrics", f"{len(records)} of {lines} lines can be read", "metrics_damaged", [str(path)])]
    return [*_losses(records), _evaluations(records), _norms(records)]


def _losses(records: Sequence[dict[str, Any]]) -> list[Finding]:
    name, losses = "loss curve", [(r["step"], _number(r["loss"])) for r in records if "loss" in r]
    bad = [step for step, loss in losses if not math.isfinite(loss)]
    skips = max((int(r.get("skipped", 0)) for r in records), default=0)
    if bad or skips:
        figure = f"not finite at step {bad[0]}" if bad else f"{skips} updates skipped"
        make = failed if bad else warned
        return [make(name, figure, "loss_nonfinite")]
    if len(losses) < ENOUGH:
        return [skipped(name, f"{len(losses)} records; {ENOUGH} are needed")]
    values = [loss for _, loss in losses]
    spikes = [
        losses[i][0] for i in range(4, len(values)) if values[i] > SPIKE * median(values[max(0, i - 8) : i]) + 0.1
    ]
    part = max(2, len(values) // 6)
    start, end = fmean(values[:part]), fmean(values[-part:])
    figure = f"{start:.4f} at first, {end:.4f} at last, {len(values)} records"
    found = []
    if spikes:
        found.append(failed(name, f"jumps at steps {', '.join(map(str, spikes[:6]))}", "loss_spikes"))
    if end > FLAT * start and start > 0.02:
        found.append(failed(name, figure, "loss_flat"))
    return found or [passed(name, figure)]


def _evaluations(records: Sequence[dict[str, Any]]) -> Finding:
    name = "evaluations"
    points = [(r["step"], _number(r["eval/loss"])) for r in records if "eval/loss" in r]
    train = [_number(r["loss"]) for r in records if "loss" in r]
    if len(points) < 3 or len(train) < 3:
        return skipped(name, f"{len(points)} evaluations")
    if bad := [step for step, loss in points if not math.isfinite(loss)]:
        return failed(name, f"not finite at step {bad[0]}", "loss_nonfinite")
    best, last = min(points, key=lambda point: point[1]), points[-1]
    figure = f"loss {best[1]:.4f} at step {best[0]} (best), {last[1]:.4f} at the end"
    falling = train[-1] < train[len(train) // 2]
    if falling and last[1] > WORSE[0] * best[1] + 0.05:
        return failed(name, figure, "overfitting")
    return warned(name, figure, "overfitting") if last[1] > WORSE[1] * best[1] + 0.05 else passed(name, figure)


def _norms(records: Sequence[dict[str, Any]]) -> Finding:
    name, norms = "gradient norms", [_number(r["grad_norm"]) for r in records if "grad_norm" in r]
    if not norms:
        return skipped(name, "none")
    figure = f"{min(norms):.2e} to {max(norms):.2e}"
    if max(norms) == 0:
        losses = [_number(r["loss"]) for r in records if "loss" in r]
        fell = losses[-1] < FLAT * losses[0]
        return failed(name, f"0 in all {len(norms)} records", "norm_misreported" if fell else "update_discarded")
    return passed(name, figure)


def _number(value: Any) -> float:
    return float(value) if not isinstance(value, str) else float(value.replace("Infinity", "inf"))
