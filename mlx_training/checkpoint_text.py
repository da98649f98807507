"""The results of `checkpoint_tools`, for people."""

import math
from typing import Any

SHOWN = 20  # lines of each kind; --json has them all


def show_list(result: dict[str, Any]) -> str:
    """A table."""
    if not result["checkpoints"]:
        return f"{result['run']}: no checkpoint was saved yet"
    lines = [f"{'checkpoint':16} {'size':>10}  {'saved':25}  {'complete':8}"]
    for item in result["checkpoints"]:
        marks = ", ".join(which for which in ("latest", "best") if item[which])
        complete = "yes" if item["complete"] else "NO"
        lines.append(f"{item['name']:16} {_megabytes(item['bytes']):>10}  {item['saved']:25}  {complete:8}  {marks}")
    return "\n".join(line.rstrip() for line in lines)


def show_verify(result: dict[str, Any]) -> str:
    """One line a checkpoint, and one a problem."""
    lines = []
    for item in result["checkpoints"]:
        lines.append(f"{item['path']}: {'good' if item['ok'] else 'DAMAGED'}")
        lines += _some([f"  {p['file']}: {p['problem']}" for p in item["problems"]])
    lines += [f"{p['file']}: {p['problem']}" for p in result["pointers"]]
    lines.append(f"shapes: {result['shapes']}")
    if not result["ok"]:
        good = [item["path"] for item in result["checkpoints"] if item["ok"]]
        newest = f"the newest good one is {good[-1]}: --resume {good[-1]}" if good else ""
        lines.append(newest or "none of those checked is good")
    return "\n".join(lines)


def show_diff(result: dict[str, Any]) -> str:
    """What differs; --json has also what does not."""
    lines = [f"{side}: {result[side]['path']} (step {result[side]['step']})" for side in "ab"]
    for part in ("parameters", "moments"):
        both = result[part]["both"]
        changed = [item for item in both if not item["identical"]]
        lines.append(f"{part}: {len(both) - len(changed)} identical, {len(changed)} differ")
        lines += _some([f"  {item['name']}: {_difference(item)}" for item in changed])
        for side in "ab":
            lines += _some([f"  only in {side}: {name}" for name in result[part][f"only_in_{side}"]])
    if result["settings"] is None:
        lines.append("settings: not compared; a run without config.yaml")
    else:
        lines.append(f"settings: {len(result['settings'])} differ")
        shown = {
            key: ["null" if value is None else value for value in pair] for key, pair in result["settings"].items()
        }
        lines += [f"  {key}: {one} | {two}" for key, (one, two) in shown.items()]
    return "\n".join(lines)


def _difference(item: dict[str, Any]) -> str:
    if item["shape_a"] != item["shape_b"]:
        return f"shape {item['shape_a']} | {item['shape_b']}"
    if not math.isfinite(item["max_abs"]):
        return f"{item['shape_a']}: not finite"
    return f"{item['shape_a']}  max |a-b| {item['max_abs']:.3e}  relative {item['relative']:.3e}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _some(lines: list[str]) -> list[str]:
    hidden = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"  ... and {hidden} more: see --json"] if hidden > 0 else [])
