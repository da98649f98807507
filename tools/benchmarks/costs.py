"""What a step of the time-series LM must compute and move, and the limit that this sets on a machine.

Frozen weights have no gradient of their own: forward and backward of a place are 4 FLOPs a weight, and 2 where no
gradient comes by. The last layer is keys and values everywhere, the rest of it at labels. What trains is 6.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.data.batching import Batches
from mlx_training.data.collate import collate
from tools.benchmarks import material
from tools.benchmarks.listing import Listing
from tools.benchmarks.measure import Measured, compare
from tools.benchmarks.ours import encoder_of, timeseries_spec

if TYPE_CHECKING:
    from tools.benchmarks.tables import Bench

# Apple's published figures for the 40-core M3 Max: about 14.2 TFLOP/s in float32 (half precision alike), 400 GB/s.
M3_MAX = {"FLOP/s": 14.2e12, "bytes/s": 400e9}


def costs(bench: "Bench") -> list[Listing]:
    """FLOPs and bytes of a step, the limit they imply here, and the measured share of it; an M3 Max is computed."""
    llm = Path(bench.llm())
    rows = {"num_rows": 16}
    tree = necessary_flops(llm, batch_of(llm, rows, 4))
    options = {"llm": str(llm), "rows": rows, "fixed": True, "backend": bench.backends[0]}
    ours = {"ours": ("ours:timeseries", options)}
    measured = compare("", ours, repetitions=bench.repetitions, steps=bench.steps, warm_up=2).median("ours", "cpu")
    peak, bandwidth = cpu_peak(), copy_bandwidth()
    moved = (
        4 * weights(llm) * 3 + 4 * timeseries_spec(llm).num_parameters * 10
    )  # read 3 times; AdamW: 7 reads, 3 writes
    total = sum(tree.values())
    said = [f"{part:40} {flops / 1e9:7.2f} GFLOP" for part, flops in tree.items()]
    said.append(f"{'all':40} {total / 1e9:7.2f} GFLOP, {moved / 1e6:.0f} MB of weights and optimiser state")
    said.append(f"this machine: {peak / 1e9:.0f} GFLOP/s of float32 products, {bandwidth / 1e9:.1f} GB/s copied")
    limit = total / peak + moved / bandwidth
    said.append(
        f"limit {limit * 1e3:.1f} ms, measured {measured * 1e3:.1f} ms: {limit / measured:.0%} of the limit's speed"
    )
    per_token = 4.15e9  # of the 1B shape at 5 % labels: 4 x 0.97e9 body + 4 x 0.05 x 0.26e9 head + attention
    speed = M3_MAX["FLOP/s"] / per_token
    said.append(
        f"M3 Max, 1B shape, computed and not measured: at most {speed:.0f} tokens/s at {per_token / 1e9} GFLOP each"
    )
    reading = 2 * 2 * 1.236e9 / M3_MAX["bytes/s"]  # weights in bfloat16, forward and backward
    said.append(
        f"M3 Max, 1B shape, computed: a step of 4 x 300 tokens (it took 6.87 s in the run this project begins with) "
        f"takes at least {1200 / speed:.2f} s of products, and {reading * 1e3:.0f} ms of reading the weights twice"
    )
    numbers = {"flops": tree, "bytes": moved, "peak": peak, "bandwidth": bandwidth, "seconds": measured}
    found = Listing("costs of a step: 4 rows of 1 x 128 samples, hidden 256 x 4, float32", said, numbers)
    print("\n".join(found.lines()), flush=True)
    return [found]


def batch_of(llm: Path, rows: dict[str, Any], batch_size: int) -> Batch:
    """The first batch of these rows."""
    return Batches(material.rows(**rows), encoder_of(llm).encode, batch_size, 0, collate).batch(0)


def weights(llm: Path) -> int:
    """Of the layers, embedding left out."""
    c = json.loads((llm / "config.json").read_text())
    hidden, key = c["hidden_size"], c["num_key_value_heads"] * c["head_dim"]
    return c["num_hidden_layers"] * (2 * hidden**2 + 2 * hidden * key + 3 * hidden * c["intermediate_size"])


def necessary_flops(llm: Path, batch: Batch) -> dict[str, float]:
    """Of one step on a batch, by part. Attention is causal: half of 4 L^2 H forward, and twice that backward."""
    c = json.loads((llm / "config.json").read_text())
    hidden, layers = c["hidden_size"], c["num_hidden_layers"]
    layer, keys = weights(llm) / layers, 2 * hidden * c["num_key_value_heads"] * c["head_dim"]
    count, labels = float(batch.lengths.sum()), float(batch.mask.sum())
    before = float(batch.prefix * len(batch.lengths))
    squares, known = float((batch.lengths.astype(float) ** 2).sum()), batch.prefix**2 * len(batch.lengths)
    patches = float(batch.num_patches.sum())
    encoder = timeseries_spec(llm).num_parameters - 1024 * 128  # positions are looked up
    return {
        "LM before the series, forward": 2 * before * ((layers - 1) * layer + keys),
        "LM after it, forward and backward": 4 * (count - before) * ((layers - 1) * layer + keys),
        "last layer at labels": 4 * labels * (layer - keys),
        "attention": 2 * (layers - 1) * hidden * (3 * squares - 2 * known),
        "head at labels": 4 * labels * c["vocab_size"] * hidden,
        "encoder and projector": 6 * patches * encoder,
    }


def cpu_peak(size: int = 1024, count: int = 10) -> float:
    """FLOP/s of float32 products, in seconds of the processor."""
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    times = []
    for _ in range(count):
        started = time.process_time()
        a @ a
        times.append(time.process_time() - started)
    return 2 * size**3 / min(times)


def copy_bandwidth(size: int = 1 << 27, count: int = 5) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    times = []
    for _ in range(count):
        started = time.process_time()
        target[:] = source
        times.append(time.process_time() - started)
    return 2 * size / min(times)


def cuda_peak(size: int = 8192, seconds: float = 2.0) -> float:
    """FLOP/s of bfloat16 products on the card."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()
        count += 10
    return 2 * size**3 * count / (time.perf_counter() - started)


def share_of_peak(measured: Measured, llm: Path, rows: dict[str, Any], batch_size: int) -> Listing:
    """Necessary FLOP/s of every side over the card's peak."""
    import torch

    flops, peak = sum(necessary_flops(llm, batch_of(llm, rows, batch_size)).values()), cuda_peak()
    shares = {side: flops / measured.median(side, "wall") / peak for side in measured.samples}
    said = [f"{torch.cuda.get_device_name()}: {peak / 1e12:.0f} TFLOP/s measured, {flops / 1e12:.1f} TFLOP a step"]
    said += [f"{side}: {share:.2f} of it" for side, share in shares.items()]
    return Listing("necessary FLOPs over the measured peak (aim: >= 0.65, floor 0.5)", said, {"shares": shares})
