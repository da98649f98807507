"""What share of a card's measured matrix peak the necessary work of a step is."""

import json
import time
from pathlib import Path
from typing import Any

from mlx_training.data.batching import Batches
from mlx_training.data.collate import collate
from tools.benchmarks import material
from tools.benchmarks.listing import Listing
from tools.benchmarks.measure import Measured
from tools.benchmarks.ours import encoder_of


def necessary_flops(llm: Path, rows: dict[str, Any], batch_size: int) -> float:
    """4 x body + 4 x head x labels + causal attention of one batch: frozen weights have no gradient of their own."""
    config = json.loads((llm / "config.json").read_text())
    H, layers, D = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
    key = config["num_key_value_heads"] * D
    body = layers * (2 * H * H + 2 * H * key + 3 * H * config["intermediate_size"])
    batch = Batches(material.rows(**rows), encoder_of(llm).encode, batch_size, 0, collate).batch(0)
    tokens, squares = float(batch.lengths.sum()), float((batch.lengths.astype(float) ** 2).sum())
    attention = 6 * layers * squares * H  # forward 2 x L^2 H, half of 4 as it is causal; backward twice that
    return 4 * body * tokens + 4 * config["vocab_size"] * H * float(batch.mask.sum()) + attention


def matmul_peak(size: int = 8192, seconds: float = 2.0) -> float:
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
    """Necessary FLOP/s of every side over the peak."""
    import torch

    flops, peak = necessary_flops(llm, rows, batch_size), matmul_peak()
    shares = {side: flops / measured.median(side, "wall") / peak for side in measured.samples}
    said = [f"{torch.cuda.get_device_name()}: {peak / 1e12:.0f} TFLOP/s measured, {flops / 1e12:.1f} TFLOP a step"]
    said += [f"{side}: {share:.2f} of it" for side, share in shares.items()]
    return Listing("necessary FLOPs over the measured peak (aim: >= 0.65, floor 0.5)", said, {"shares": shares})
