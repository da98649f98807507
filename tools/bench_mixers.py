"""CPU seconds of one decoder layer, forward and backward, with each attention mixer, against causal attention.

    python tools/bench_mixers.py --tokens 4096

PyTorch on one CPU thread; runs are interleaved, medians are shown.
"""

import argparse
import statistics
import time

import torch

from mlx_training.spec import DecoderSpec, FixedPattern
from mlx_training.spec.mixers import Mixer
from torch_backend.decoder import DecoderLayer, Places

MIXERS: tuple[Mixer, ...] = ("causal", "local", "strided", "fixed", "sparsek")


def layer_of(mixer: Mixer, width: int) -> DecoderLayer:
    """A layer with random weights."""
    pattern = FixedPattern(block_size=16, local_context=256, num_verts=8, vert_size=1)
    spec = DecoderSpec(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=4 * width,
        num_heads=8,
        num_kv_heads=8,
        head_dim=width // 8,
        positions="none",
        mixers=(mixer,),
        window=256,
        stride=16,
        fixed=pattern,
    )
    torch.manual_seed(0)
    layer = DecoderLayer(spec, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer


def seconds(layer: DecoderLayer, x_BLH: torch.Tensor) -> float:
    """CPU time of one pass each way."""
    started = time.process_time()
    layer(x_BLH.requires_grad_(), Places()).square().mean().backward()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    layers, x_BLH = {mixer: layer_of(mixer, args.width) for mixer in MIXERS}, torch.randn(1, args.tokens, args.width)
    times: dict[str, list[float]] = {mixer: [] for mixer in MIXERS}
    for run in range(args.runs + 1):  # the first one warms up
        for mixer, layer in layers.items():
            passed = seconds(layer, x_BLH)
            times[mixer] += [passed] if run else []
    dense = statistics.median(times["causal"])
    for name, found in times.items():
        middle = statistics.median(found)
        spread = f"{min(found):.3f} to {max(found):.3f}"
        print(f"{name:8} {middle:.3f} s ({spread}), {dense / middle:.2f} times as fast as causal")


if __name__ == "__main__":
    main()
