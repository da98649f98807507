"""LoRA against its peers: the time of an epoch, and the loss it ends with at each side's own best rate."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tools.benchmarks.listing import Listing
from tools.benchmarks.measure import Measured

if TYPE_CHECKING:
    from tools.benchmarks.tables import Bench

RATES = (1e-3, 3e-3, 1e-2)
MAX_SEEDS = 3  # an epoch of all four sides takes minutes
PEERS = {
    "mlx": ("mlx_lm.lora", "lora_peers:MlxLm", ">= 1.8"),
    "torch": ("HF Trainer + PEFT", "lora_peers:Trainer", ">= 1.3"),
}


def lora(bench: "Bench") -> list[Measured | Listing]:
    """LoRA of rank 8 on ragged text of 20 to 700 tokens, batch 4, float32: one epoch, by rate and seed."""
    file = str(bench.data / "wikitext2" / "valid.txt") if bench.data else ""
    shared = {"llm": bench.llm(), "rank": 8, "alpha": 16}
    found: list[Measured | Listing] = []
    for backend in bench.backends:
        name, function, target = PEERS[backend]
        whole = Measured(f"LoRA, one epoch of ragged text ({backend})", target)
        for seed in range(min(bench.repetitions, MAX_SEEDS)):
            texts = {"file": file, "num_rows": 160, "held_out": 16, "seed": seed}
            for rate in RATES:
                options = shared | {"texts": texts, "rate": rate, "seed": seed}
                sides = {f"ours ({backend})": ("ours:lora", options | {"backend": backend}), name: (function, options)}
                one = bench.compare(f"rate {rate:g}, seed {seed}", sides, repetitions=1, steps=1, warm_up=0)
                for side, (sample,) in one.samples.items():
                    sample |= {"rate": rate, "seed": seed, "held_out": sample.pop("loss")}
                    whole.samples.setdefault(side, []).append(sample)
                whole.absent |= one.absent
        found += [whole, losses(backend, whole.samples)]
        print("\n".join(line for result in found[-2:] for line in result.lines()), flush=True)
    return found


def losses(backend: str, samples: Mapping[str, Sequence[Mapping[str, float]]]) -> Listing:
    """Held-out losses of every side by rate, and of all sides at the rate where their mean over seeds is least.

    `samples`: side -> samples with rate, seed and held_out; the first side is the one the others are compared with.
    """
    by_rate: dict[str, dict[float, list[float]]] = {}
    for side, taken in samples.items():
        by_rate[side] = {rate: [s["held_out"] for s in taken if s["rate"] == rate] for rate in RATES}
    said = [f"{'':24}" + "".join(f"{rate:>20g}" for rate in RATES)]
    for side, found in by_rate.items():
        cells = [f"{statistics.mean(x):.4f} ± {statistics.pstdev(x):.4f}" for x in found.values()]
        said.append(f"{side:24}" + "".join(f"{cell:>20}" for cell in cells))
    best = {side: min((statistics.mean(x), rate) for rate, x in found.items())[1] for side, found in by_rate.items()}
    first, *others = by_rate
    for other in others:
        for what, mine, theirs in (
            *((f"rate {rate:g}", rate, rate) for rate in RATES),
            (f"best rates ({best[first]:g}, {best[other]:g})", best[first], best[other]),
        ):
            gaps = [a - b for a, b in zip(by_rate[first][mine], by_rate[other][theirs], strict=True)]
            each = ", ".join(f"{gap:+.4f}" for gap in gaps)
            said.append(f"{first} less {other}, {what}: {statistics.mean(gaps):+.4f} (by seed {each})")
    numbers: dict[str, Any] = {"losses": by_rate, "best_rate": best}
    title = f"held-out loss after the epoch by rate, mean and deviation over seeds ({backend}; aim: equal or better)"
    return Listing(title, said, numbers)
