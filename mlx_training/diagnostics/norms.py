"""Per-parameter and per-module figures of probed steps: what `gradients.jsonl` holds, as a table and as a heat map.

A record is {"step": int, "parameters": {name: figures}, "modules": {path: figures}}. Figures: those of
`mlx_training.backend.PROBE`, "update_ratio" (update norm over parameter norm) and "size" (elements). A module is a
parameter's name without its last part, and holds the parameters right in it; "encoder.*" holds everything below.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.backend import Step
from mlx_training.data.batch import Batch
from mlx_training.json_lines import JsonLines, read_metrics
from mlx_training.spec import Spec

Figures = dict[str, float]
Record = dict[str, Any]
FILE = "gradients.jsonl"
NORMS = ("grad_norm", "param_norm", "update_norm", "m_norm", "v_norm")
COLUMNS = ("grad_norm", "param_norm", "update_ratio", "zeros", "nonfinite", "m_norm", "v_norm")
ZERO, NOT_FINITE = (0.0, 0.0, 0.0, 1.0), (0.9, 0.0, 0.1, 1.0)  # RGBA of cells that have no logarithm


def record_of(step: int, probe: Mapping[str, Mapping[str, float]], spec: Spec) -> Record:
    """The record of one probed step; `probe` is what `Step` returns under that name."""
    table = spec.params()
    parameters = {name: _with_ratio({**figures, "size": table[name].size}) for name, figures in probe.items()}
    return {"step": step, "parameters": parameters, "modules": modules(parameters)}


def modules(parameters: Mapping[str, Figures]) -> dict[str, Figures]:
    """Figures by module, in the order of the parameters, then of everything below each top-level name."""
    members: dict[str, list[Figures]] = {}
    for name, figures in parameters.items():
        members.setdefault(name.rpartition(".")[0] or name, []).append(figures)
    for name, figures in parameters.items():
        members.setdefault(f"{name.partition('.')[0]}.*", []).append(figures)
    return {path: _together(figures) for path, figures in members.items()}


def _together(parts: Sequence[Figures]) -> Figures:
    size = sum(part["size"] for part in parts)
    total = {key: math.hypot(*(part[key] for part in parts)) for key in NORMS}
    total["zeros"] = sum(part["zeros"] * part["size"] for part in parts) / size
    total["nonfinite"] = sum(part["nonfinite"] for part in parts)
    return _with_ratio(total | {"size": size})


def _with_ratio(figures: Figures) -> Figures:
    weight, update = figures["param_norm"], figures["update_norm"]
    ratio = update / weight if weight else (math.inf if update else 0.0)
    return {**figures, "update_ratio": ratio}


def read_records(path: str | Path) -> list[Record]:
    """The records of a `gradients.jsonl`, non-finite numbers restored."""
    return [record for record in read_metrics(path) if "parameters" in record]


def write_records(records: Sequence[Record], path: str | Path) -> None:
    """A `gradients.jsonl` of these records, in place of what was there."""
    log = JsonLines(path)
    for record in records:
        log.log(record)
    log.close()


def table(records: Sequence[Record]) -> str:
    """The figures of every parameter and module, one block a record; in scientific notation, an exact zero as 0."""
    return "\n\n".join(_block(record) for record in records)


def _block(record: Record) -> str:
    heads = {"param_norm": "weight_norm", "update_ratio": "update/weight"}
    rows = [[f"step {record['step']}", *(heads.get(key, key) for key in COLUMNS)]]
    for kind in ("parameters", "modules"):
        rows += [[name, *(_spell(key, figures[key]) for key in COLUMNS)] for name, figures in record[kind].items()]
        rows.append([])
    widths = [max(len(row[i]) for row in rows if row) for i in range(len(COLUMNS) + 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows[:-1]
        if row
    ]
    lines.insert(1 + len(record["parameters"]), "")
    return "\n".join(lines)


def _spell(key: str, value: float) -> str:
    if key == "nonfinite":
        return f"{value:.0f}"
    return f"{value:.2e}" if value else "0"  # 0.00e+00 would look like a small number


def heat_map(records: Sequence[Record], path: str | Path) -> None:
    """A PNG of log10(gradient norm): modules in canonical order by step; exact zeros black, non-finite cells red."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(n for record in records for n in record["modules"] if not n.endswith(".*")))
    norms = np.array([[r["modules"].get(n, {}).get("grad_norm", math.nan) for r in records] for n in names])
    finite, zero = np.isfinite(norms), norms == 0
    logs = np.log10(norms, out=np.zeros_like(norms), where=finite & ~zero)
    shown = logs[finite & ~zero]
    colours = ScalarMappable(Normalize(*((shown.min(), shown.max()) if shown.size else (-1, 0))), "viridis")
    cells = colours.to_rgba(logs)
    cells[zero], cells[~finite] = ZERO, NOT_FINITE

    figure = Figure(
        figsize=(max(6.0, min(14.0, 3 + 0.12 * len(records))), 1.5 + 0.2 * len(names)), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(cells, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    places = range(0, len(records), -(-len(records) // 10))
    axes.set_xticks(places, [str(records[i]["step"]) for i in places])
    axes.set_xlabel("step")
    figure.colorbar(colours, ax=axes, label="log10 gradient norm")
    legend = [Patch(color=ZERO, label="exactly zero"), Patch(color=NOT_FINITE, label="not finite")]
    figure.legend(handles=legend, loc="outside upper right", ncols=2, fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def take_steps(
    step: Step,
    batch: Callable[[int], Batch],
    rates: Callable[[int], Mapping[str, float]],
    spec: Spec,
    *,
    steps: int,
    accumulation: int = 1,
) -> list[Record]:
    """Records of the first `steps` optimiser steps, each of them probed; the model is trained by them."""
    records = []
    for number in range(1, steps + 1):
        micro_batches = [batch((number - 1) * accumulation + i) for i in range(accumulation)]
        metrics = step(micro_batches, step=number, lr=rates(number), probe=True)
        records.append(record_of(number, metrics["probe"], spec))
    return records
