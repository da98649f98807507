"""Layers that are computed again in the backward pass: the same gradients, dropout included, and less memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training import backend as backends
from mlx_training.backend import Arrays, Optim, Runtime
from mlx_training.init import initialise
from mlx_training.objectives.lm import lm
from mlx_training.spec import DecoderSpec, Spec
from tests.parity.cases import GPT, VOCAB, batches, rates, specs
from tests.parity.tiny_checkpoints import save_tiny_quantized

pytestmark = pytest.mark.usefixtures("both_backends")

SPEC = DecoderSpec(VOCAB, 16, 24, 3, 2, 1, 8, context_length=20, dropout=0.3, init_std=0.2)
U_NET = {"widths": (16, 8, 16), "mixers": ("sparsek",), "window": 4, "num_selected": 2}
CASES = {
    "llama": SPEC,
    "gpt": replace(SPEC, norm_position="post", **GPT),
    "no dropout": replace(SPEC, dropout=0.0),
    "u-net": replace(SPEC, **U_NET),
}
FROZEN = ("timeseries-ours", "timeseries-resident", "timeseries-lora", "pretrained-dora", "pretrained-lora-gpt")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_quantized("qwen2", tmp_path_factory.mktemp("lm") / "qwen2-4bit")


def build(name: str, spec: DecoderSpec, recompute: bool) -> tuple[Any, Any]:
    backend = backends.get(name, Runtime(device="cpu", gradient_checkpointing=recompute))
    model = backend.build(spec)
    backend.load(model, initialise(spec, 0))
    return backend, model


def train(name: str, spec: DecoderSpec, recompute: bool, seed: int = 0) -> tuple[list[float], Arrays]:
    """Three steps of plain SGD, so that parameters show the gradients; the second one over two micro-batches."""
    backend, model = build(name, spec, recompute)
    step = backend.make_step(model, lm, Optim("sgd"), seed=seed)
    data = batches(spec, 4)
    plan = [data[:1], data[1:3], data[3:]]
    losses = [float(step(part, step=i, lr=rates(spec, 5, 40))["loss"]) for i, part in enumerate(plan, start=1)]
    return losses, backend.export(model)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same(case: str, backend_name: str, uncompiled: None) -> None:
    spec = CASES[case]
    (kept, kept_ends), (again, ends) = (train(backend_name, spec, recompute) for recompute in (False, True))
    assert again == pytest.approx(kept, rel=1e-6)
    start = initialise(spec, 0)
    for name, array in ends.items():
        moved = np.abs(kept_ends[name] - start[name]).max()
        assert np.abs(array - kept_ends[name]).max() <= 1e-6 + 1e-5 * moved, name
    if spec.dropout:
        other, _ = train(backend_name, spec, True, seed=1)
        assert np.abs(np.subtract(other, again)).max() > 1e-3, "nothing was dropped"
        assert len({round(loss, 5) for loss in again}) == 3


@pytest.mark.parametrize(("kind", "case"), [*(("qwen2", case) for case in FROZEN), ("gemma3_text", "timeseries-lora")])
def test_frozen_models(kind: str, case: str, backend_name: str, tmp_path: Path, uncompiled: None) -> None:
    """The same trained values, in front of or inside a frozen model, adapters' dropout included."""
    spec: Any = specs(save_tiny_quantized(kind, tmp_path / "lm"))[case]  # Gemma's layers look at a window
    if spec.adapter:
        spec = replace(spec, adapter=replace(spec.adapter, dropout=0.3))
    found = []
    for recompute in (False, True):
        backend = backends.get(backend_name, Runtime(device="cpu", gradient_checkpointing=recompute))
        model = backend.build(spec)
        start = backend.export(model) | initialise(spec, 0)
        backend.load(model, start)
        step = backend.make_step(model, lm, Optim("sgd"), seed=0)
        data = enumerate(batches(spec, 3), start=1)
        losses = [float(step([batch], step=i, lr=rates(spec, 5, 40))["loss"]) for i, batch in data]
        found.append((losses, backend.export(model)))
    (kept, kept_ends), (again, ends) = found
    assert again == pytest.approx(kept, rel=1e-6)
    moved = {name: float(np.abs(array - start[name]).max()) for name, array in kept_ends.items()}
    assert any(moved.values())
    for name, array in ends.items():
        assert np.abs(array - kept_ends[name]).max() <= 1e-6 + 1e-5 * moved[name], name


def test_compiled_on_mlx() -> None:
    """The masks are those of the seed and the step there too, and differ from step to step."""
    spec = replace(SPEC, num_layers=1)
    (batch,) = batches(spec, 1)
    backend, model = build("mlx", spec, True)
    step = backend.make_step(model, lm, Optim("sgd"), seed=0)
    losses = [float(step([batch], step=i, lr={"model": 0.0})["loss"]) for i in (1, 2, 1)]
    step([batch], step=3, lr={"model": 1.0})
    compiled = backend.export(model)
    mx = pytest.importorskip("mlx.core")
    mx.disable_compile()
    try:
        backend, model = build("mlx", spec, False)
        backend.make_step(model, lm, Optim("sgd"), seed=0)([batch], step=3, lr={"model": 1.0})
    finally:
        mx.enable_compile()
    assert losses[0] == losses[2] != losses[1]
    for name, array in backend.export(model).items():
        np.testing.assert_allclose(compiled[name], array, rtol=0, atol=2e-6, err_msg=name)


def test_evaluation_and_sessions_keep_nothing_to_begin_with(backend_name: str) -> None:
    (batch,) = batches(SPEC, 1)
    found = []
    for recompute in (False, True):
        backend, model = build(backend_name, SPEC, recompute)
        backend.make_step(model, lm, Optim("sgd"), seed=0)([batch], step=1, lr={"model": 0.0})
        found.append((backend.score(model, lm, batch)["loss"], backend.session(model).prefill(batch)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)


def test_less_memory(backend_name: str, uncompiled: None) -> None:
    """Of eight layers over 228 tokens."""
    spec = replace(SPEC, num_layers=8, hidden_size=32, intermediate_size=64, context_length=256)
    peaks = []
    for recompute in (False, True):
        backend, model = build(backend_name, spec, recompute)
        peaks.append(MEASURE[backend_name](backend, model, long_batch(spec), spec))
    assert peaks[1] < 0.65 * peaks[0]


def test_frozen_models_keep_less(backend_name: str, llm: Path, uncompiled: None) -> None:
    """Of two layers with adapters everywhere."""
    spec: Any = specs(llm)["timeseries-lora"]
    (batch,) = batches(spec, 1, batch_size=64)
    peaks = []
    for recompute in (False, True):
        backend = backends.get(backend_name, Runtime(device="cpu", gradient_checkpointing=recompute))
        model = backend.build(spec)
        backend.load(model, backend.export(model) | initialise(spec, 0))
        peaks.append(MEASURE[backend_name](backend, model, batch, spec))
    assert peaks[1] < 0.9 * peaks[0]


def long_batch(spec: DecoderSpec) -> Any:
    (batch,) = batches(spec, 1)
    arrays = {name: np.tile(getattr(batch, name), (2, 12)) for name in ("tokens", "targets", "mask")}
    return replace(batch, **arrays, lengths=np.full(8, 228, np.int32))


def _saved_by_torch(backend: Any, model: Any, batch: Any, spec: Spec) -> int:
    """Bytes that autograd holds between forward and backward."""
    import torch

    held: dict[int, int] = {}

    def pack(x: Any) -> Any:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        lm(model, backend.to_device(batch))
    return sum(held.values())


def _peak_of_mlx(backend: Any, model: Any, batch: Any, spec: Spec) -> int:
    import mlx.core as mx

    step = backend.make_step(model, lm, Optim("sgd"), seed=0)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    float(step([batch], step=1, lr=dict.fromkeys(spec.groups, 0.0))["loss"])
    return mx.get_peak_memory() - before


MEASURE = {"torch": _saved_by_torch, "mlx": _peak_of_mlx}
