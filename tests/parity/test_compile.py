"""A compiled step takes the same steps as one that is not, and few graphs are compiled for many shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training import backend as backends
from mlx_training.backend import Optim, Runtime
from mlx_training.data.batch import Batch
from mlx_training.data.collate import collate
from mlx_training.errors import BackendError
from mlx_training.init import initialise
from mlx_training.objectives.lm import lm
from mlx_training.spec import DecoderSpec, FrozenLM, Spec, TimeSeriesSpec
from tests.parity import cases
from tests.parity.tiny_checkpoints import save_tiny

DECODER = DecoderSpec(61, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, context_length=64, dropout=0.3)


def windows(*lengths: int) -> list[Batch]:
    """Three rows of each length."""
    rng, made = np.random.default_rng(0), []
    for n in lengths:
        tokens, targets = rng.integers(0, 61, (2, 3, n), dtype=np.int32)
        made.append(Batch(tokens, targets, np.ones((3, n), np.float32), np.full(3, n, np.int32), rows=(0, 1, 2)))
    return made


def steps(name: str, spec: Spec, batches: list[Batch], compile: str, **runtime: Any) -> tuple[list[float], int]:
    """The losses of a step on each batch, and how many graphs were compiled."""
    backend = backends.get(name, Runtime(device="cpu", compile=compile, **runtime))
    model = backend.build(spec)
    backend.load(model, backend.export(model) | initialise(spec, 0))
    step, rates = backend.make_step(model, lm, Optim(), seed=0), dict.fromkeys(spec.groups, 1e-2)
    losses = [float(step([batch], step=i, lr=rates)["loss"]) for i, batch in enumerate(batches, 1)]
    return losses, step.num_compilations


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and differentiated as ever, but run without code made for them, which takes a minute."""
    pytest.importorskip("torch")
    from torch._dynamo.backends.registry import lookup_backend

    import torch_backend.step

    eager: Callable[..., Any] = lookup_backend("aot_eager")
    monkeypatch.setattr(torch_backend.step, "_inductor", eager)


def test_lengths_share_graphs(without_code: None) -> None:
    """One graph for the first length and one for all others; with dropout and layers that are computed again."""
    batches = windows(12, 16, 24, 12, 20)
    plain, none = steps("torch", DECODER, batches, "off", gradient_checkpointing=True)
    found, num_graphs = steps("torch", DECODER, batches, "on", gradient_checkpointing=True)
    assert found == pytest.approx(plain, rel=1e-6)
    assert (none, num_graphs) == (0, 2)


def test_a_compiler_that_fails_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    import torch_backend.step

    def broken(*_: Any) -> Any:
        raise RuntimeError("main.so: file too short")

    monkeypatch.setattr(torch_backend.step, "_inductor", broken)
    with pytest.raises(BackendError, match=r"could not compile .*file too short.* performance.compile=off"):
        steps("torch", DECODER, windows(12), "on")


@pytest.mark.proof
@pytest.mark.parametrize("family", ["decoder", "timeseries"])
def test_generated_code(family: str, tmp_path: Path) -> None:
    """PyTorch's own compiler: prefixes, labels and series of many sizes; the same dropout masks."""
    spec: Spec = DECODER
    batches = windows(*range(12, 44, 4))
    if family == "timeseries":
        rng = np.random.default_rng(0)
        spec = TimeSeriesSpec(FrozenLM(save_tiny("llama", tmp_path / "lm"), 64, cases.VOCAB), cases.ENCODER)
        rows = [
            [cases.encoded_row(rng, 1 + i % 2, rng.integers(0, cases.VOCAB, 4 + 2 * n).tolist()) for i in range(3)]
            for n in range(8)
        ]
        batches = [collate(row, range(3)) for row in rows]
    plain, _ = steps("torch", spec, batches, "off", gradient_checkpointing=True)
    found, num_graphs = steps("torch", spec, batches, "on", gradient_checkpointing=True)
    assert found == pytest.approx(plain, rel=1e-6)
    print(f"{family}: {num_graphs} graphs for {len(batches)} lengths")
    assert num_graphs <= 6


def test_mlx_compiles_unless_told_otherwise() -> None:
    pytest.importorskip("mlx.core")
    spec, batches = DecoderSpec(**{**vars(DECODER), "dropout": 0.0}), windows(12, 16, 12)
    compiled, num_graphs = steps("mlx", spec, batches, "auto")
    plain, none = steps("mlx", spec, batches, "off")
    assert plain == pytest.approx(compiled, rel=1e-6)
    assert (num_graphs, none) == (2, 0)
