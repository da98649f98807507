"""The plots of docs/benchmarks.md, from the numbers that tools/bench.py keeps."""

import json
from pathlib import Path
from typing import Any


def draw(folder: Path) -> list[Path]:
    """ratios.png and growth.png of the JSON files in a folder, as far as there are any."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    results = [r for file in sorted(folder.glob("*.json")) for r in json.loads(file.read_text())["results"]]
    if ratios := [r for r in results if r.get("ratios")]:
        drawn.append(_ratios(ratios, folder / "ratios.png"))
    if grown := [r["numbers"] for r in results if "exponents" in r.get("numbers", {})]:
        drawn.append(_growth(grown, folder / "growth.png"))
    return drawn


def _ratios(results: list[dict[str, Any]], file: Path) -> Path:
    import matplotlib.pyplot as plt

    bars = [(f"{side}\n{r['work']}", *three) for r in results for side, three in r["ratios"].items()]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(bars) + 1), layout="constrained")
    for y, (_, middle, low, high) in enumerate(bars):
        axes.barh(y, middle, color="tab:blue", alpha=0.6)
        axes.plot([low, high], [y, y], color="black")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars], fontsize=7)
    axes.set_xscale("log")
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("time over the first side's (median and 95 % interval)")
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file


def _growth(results: list[dict[str, Any]], file: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(3 * len(results), 3), layout="constrained", squeeze=False)
    for ax, r in zip(axes[0], results, strict=True):
        ax.loglog(r["sizes"], r["seconds"], "o-", label="seconds of CPU")
        ax.loglog(r["sizes"], [m / 2**30 for m in r["memory"]], "s--", label="peak, GiB")
        ax.set_xticks(r["sizes"], [f"{size:,}" for size in r["sizes"]], fontsize=7, rotation=30)
        ax.tick_params(which="minor", labelsize=6, labelbottom=False)
        ax.set_title(f"{r['what']}: exponent {r['exponents']['end']:.2f}", fontsize=9)
    axes[0][0].legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return file
