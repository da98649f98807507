"""One optimiser step at real size: the published encoder in front of a model directory; time, memory, and proof.

    python tools/make_llama.py llama-3.2-1b ../llama-1b
    OMP_NUM_THREADS=2 python tools/real_size.py ../llama-1b --backend torch

Takes full steps on one batch of random series, the first with everything that starting costs. What is proven: logits
exist at the label places only. Beside the head's weight, no tensor as wide as the vocabulary has more rows than there
are labels, and none of any shape is as large as full-sequence logits would be. PyTorch's tensors are recorded while the
first step runs, MLX's are read off the graph of the loss and its gradients. Exit code 1 if a larger one is found.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training import backend as backends
from mlx_training.backend import Optim, Runtime, Step
from mlx_training.data.batch import Batch
from mlx_training.data.collate import collate
from mlx_training.data.prompt import PromptEncoder
from mlx_training.data.rows import Row
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.environment import package_version
from mlx_training.errors import UserError
from mlx_training.init import initialise
from mlx_training.llm_source import describe_llm
from mlx_training.objectives.lm import lm
from mlx_training.spec import EncoderSpec, FrozenLM, ProjectorSpec, TimeSeriesSpec

LEARNING_RATES = {"encoder": 2e-4, "projector": 1e-4}  # as published
OPTIM = Optim(weight_decay=1e-2, grad_clip_norm=1.0)
Shapes = set[tuple[int, ...]]


def real_size(
    directory: Path,
    backend_name: str,
    *,
    num_samples: int = 128,
    num_text_tokens: int = 40,
    batch_size: int = 4,
    num_steps: int = 2,
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """The report: sizes, seconds and loss of every step, peak memory, and the widest tensors of the first step."""
    backend = backends.get(backend_name, runtime)
    info = describe_llm(directory)
    spec = TimeSeriesSpec(FrozenLM(directory, info.hidden_size, info.vocab_size), EncoderSpec(), ProjectorSpec())
    batch = make_batch(directory, spec.encoder, num_samples, num_text_tokens, batch_size)
    memory = {"imported": backend.peak_memory()}
    started = time.perf_counter()
    model = backend.build(spec)
    backend.load(model, backend.export(model) | initialise(spec, 0))
    load_seconds = time.perf_counter() - started
    memory["loaded"] = backend.peak_memory()

    step = backend.make_step(model, lm, OPTIM, seed=0)
    shapes: Shapes = mlx_shapes(backend, model, batch) if backend_name == "mlx" else set()
    steps = []
    for number in range(1, num_steps + 1):
        started, started_cpu = time.perf_counter(), time.process_time()
        if number == 1 and backend_name == "torch":
            metrics = take_step_recorded(step, batch, shapes)
        else:
            metrics = step([batch], step=number, lr=LEARNING_RATES)
        numbers = {name: float(value) for name, value in metrics.items()}  # waits for the device
        seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}
        steps.append({name: round(value, 2) for name, value in seconds.items()} | numbers)
    memory["peak"] = backend.peak_memory()

    B, L = batch.tokens.shape
    K = batch.targets.shape[1]
    V = info.vocab_size
    head_weight = sorted((V, info.hidden_size))  # either way round
    computed = [shape for shape in shapes if sorted(shape) != head_weight]
    largest = max(sorted(computed), key=prod)
    largest_logits = max(sorted(shape for shape in computed if shape[-1:] == (V,)), key=prod)
    table = spec.params()
    return {
        "backend": f"{backend_name} {package_version(backend_name)}",
        "device": backend.runtime.device,
        "precision": backend.runtime.precision,
        "batch": {"rows": B, "tokens": L, "labels": K, "vocabulary": V},
        "trainable": {group: sum(p.size for p in table.values() if p.group == group) for group in spec.groups},
        "load_seconds": round(load_seconds, 2),
        "steps": steps,
        "memory_gb": {name: round(value / 1e9, 2) for name, value in memory.items()},
        "num_shapes": len(shapes),
        "largest_logits": largest_logits,
        "largest_tensor": largest,
        "full_sequence_logits": (B, L, V),
        "proven": prod(largest_logits) <= B * K * V and prod(largest) < B * L * V,
    }


def make_batch(directory: Path, encoder: EncoderSpec, num_samples: int, num_text_tokens: int, batch_size: int) -> Batch:
    """One random walk a row in front of some `num_text_tokens` tokens of text, and an answer of a few words."""
    tokenizer = Tokenizer.load(directory)
    rng = np.random.default_rng(0)
    ids = tokenizer.encode("You are given a time series and a question about it. " * num_text_tokens)
    text = tokenizer.decode(ids[:num_text_tokens])
    answer = "It rises, then it is flat."
    rows = [
        Row(text, (np.cumsum(rng.normal(size=num_samples)).astype(np.float32),), ("Series:",), "Answer:", answer)
        for _ in range(batch_size)
    ]
    encode = PromptEncoder(tokenizer, encoder.patch_size, max_patches=encoder.max_patches).encode
    return collate([encode(row) for row in rows], range(batch_size))


def take_step_recorded(step: Step, batch: Batch, shapes: Shapes) -> dict[str, Any]:
    """The first step in PyTorch; adds the shape of everything an operation returns, backward and update included."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            result = operation(*args, **(kwargs or {}))
            shapes.update(tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            return result

    with Recorder():
        return step([batch], step=1, lr=LEARNING_RATES)


def mlx_shapes(backend: Any, model: Any, batch: Batch) -> Shapes:
    """The shape of every array in MLX's graph of the loss and its gradients, which is traced and not run."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    trainable = dict(tree_flatten(model.trainable_parameters()))
    arrays = backend.to_device(batch)
    shapes: Shapes = set()

    def loss(parameters: dict[str, Any]) -> Any:
        model.update(tree_unflatten(list(parameters.items())))
        return lm(model, arrays)["loss"]

    def loss_and_gradients(**parameters: Any) -> list[Any]:
        value, gradients = mx.value_and_grad(loss)(parameters)
        return [value, *gradients.values()]

    def record(entry: dict[str, Any]) -> None:
        if entry["type"] == "primitive":
            shapes.update(tuple(shape) for _, shape, _ in entry["outputs"])

    mx.export_function(record, loss_and_gradients, **trainable)
    model.update(tree_unflatten(list(trainable.items())))  # arrays again, where the trace has left placeholders
    return shapes


def describe(report: dict[str, Any]) -> str:
    """The report for people."""
    batch, memory, trainable = report["batch"], report["memory_gb"], report["trainable"]

    def size(name: str) -> str:
        return f"{report[name]} = {prod(report[name]):,} numbers"

    lines = [
        f"{report['backend']}, {report['device']}, {report['precision']}: batch {batch['rows']} x {batch['tokens']} "
        f"tokens, {batch['labels']} labels a row, vocabulary {batch['vocabulary']:,}",
        "trainable parameters: " + ", ".join(f"{group} {size:,}" for group, size in trainable.items()),
        f"loading: {report['load_seconds']:.1f} s",
        *(
            f"step {number}: {step['seconds']:.1f} s ({step['cpu_seconds']:.1f} s of CPU), loss {step['loss']:.4f}, "
            f"gradient norm {step['grad_norm']:.4f}"
            for number, step in enumerate(report["steps"], start=1)
        ),
        f"peak memory: {memory['peak']:.2f} GB, of it {memory['imported']:.2f} before the model was loaded "
        f"({memory['loaded']:.2f} when it was)",
        f"largest logits: {size('largest_logits')}; largest tensor of {report['num_shapes']} shapes: "
        f"{size('largest_tensor')}; full-sequence logits would be {size('full_sequence_logits')}",
        "proven: no full-sequence logits" if report["proven"] else "FAILED: more than the label places",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a model in Hugging Face or MLX format")
    parser.add_argument("--backend", choices=sorted(backends.PACKAGES), required=True)
    parser.add_argument("--samples", type=int, default=128, help="length of each series (default 128: 32 patches)")
    parser.add_argument("--text-tokens", type=int, default=40, help="about so many tokens of text (default 40)")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="auto, cpu, gpu, cuda or mps (default cpu)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    try:
        report = real_size(
            given.directory,
            given.backend,
            num_samples=given.samples,
            num_text_tokens=given.text_tokens,
            batch_size=given.batch_size,
            num_steps=given.steps,
            runtime=Runtime(device=given.device, precision=given.precision),
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(report) if given.json else describe(report))
    return 0 if report["proven"] else 1


if __name__ == "__main__":
    sys.exit(main())
