"""How a step's time and memory grow with each size, one at a time, and the exponent: the slope on logarithmic axes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.benchmarks.listing import Listing

if TYPE_CHECKING:
    from tools.benchmarks.tables import Bench

SIZES: dict[str, tuple[int, ...]] = {
    "samples": (128, 512, 1024, 2048, 4096),
    "series": (1, 3, 6, 12),
    "batch": (1, 4, 16, 32),
    "vocabulary": (4096, 16384, 65536, 128256),
    "hidden": (128, 256, 512, 1024),
}
# Why a step may grow no faster: attention is quadratic in the places of a row, and so are weights in the hidden size.
EXPECTED = {"samples": 2.0, "series": 2.0, "batch": 1.0, "vocabulary": 1.0, "hidden": 2.0}


def growth(bench: "Bench") -> list[Listing]:
    """Batch 4 of 1 x 128 samples, hidden size 256, vocabulary 4,096, but for the size that grows."""
    found = []
    for what, sizes in SIZES.items():
        points = [point(bench, what, size) for size in sizes]
        seconds, memory = ([p[key] for p in points] for key in ("cpu", "peak"))
        exponents = {"time": exponent(sizes, seconds), "end": exponent(sizes[-2:], seconds[-2:])}
        exponents["memory"] = exponent(sizes[-2:], memory[-2:])
        said = [
            f"{what} {size:7}: {s * 1e3:9.1f} ms CPU {m / 2**20:8.0f} MiB"
            for size, s, m in zip(sizes, seconds, memory, strict=True)
        ]
        said.append(
            f"exponent of the time {exponents['time']:.2f}, between the last two {exponents['end']:.2f} "
            f"(at most {EXPECTED[what]:.0f}); of the memory there {exponents['memory']:.2f}"
        )
        numbers = {"sizes": sizes, "seconds": seconds, "memory": memory, "exponents": exponents}
        found.append(Listing(f"growth with {what}", said, {"what": what} | numbers))
        print("\n".join(found[-1].lines()), flush=True)
    return found


def point(bench: "Bench", what: str, size: int) -> dict[str, float]:
    """Medians of one size."""
    from tools.benchmarks.measure import compare

    rows: dict[str, Any] = {"num_rows": max(4, size if what == "batch" else 0)}
    rows |= {"samples": {"samples": size}, "series": {"num_series": size}}.get(what, {})
    shape = {"vocabulary": {"vocab": size}, "hidden": {"hidden": size}}.get(what, {})
    options = {"llm": bench.llm(**shape), "rows": rows, "backend": bench.backends[0], "fixed": True}
    options |= {"batch_size": size if what == "batch" else 4}
    repetitions = min(bench.repetitions, 3)
    measured = compare(what, {"ours": ("ours:timeseries", options)}, repetitions=repetitions, steps=1, warm_up=1)
    return {quantity: measured.median("ours", quantity) for quantity in ("cpu", "peak")}


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log(value) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
