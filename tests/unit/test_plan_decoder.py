"""Memory of sparse mixers, sinks and experts: what autograd keeps, tensor by tensor; and MLX's peak with experts."""

from dataclasses import replace

import numpy as np
import pytest

from mlx_training import backend as backends
from mlx_training.backend import Optim, Runtime
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.flops import batch_shape, lm_shape
from mlx_training.diagnostics.plan_memory import FrozenBytes, Memory, count_memory
from mlx_training.init import initialise
from mlx_training.objectives.lm import lm
from mlx_training.spec import DecoderSpec, ExpertsSpec, FixedPattern

DENSE = DecoderSpec(64, 96, 256, 2, 6, 3, 16, context_length=256)
SPECS = {
    "dense": DENSE,
    "local": replace(DENSE, mixers=("local",), window=32),
    "strided": replace(DENSE, mixers=("strided",), stride=8),
    "fixed": replace(DENSE, mixers=("fixed",), fixed=FixedPattern(8, 32, 2, 1)),
    "sinks": replace(DENSE, num_sinks=4),
    "one expert": replace(DENSE, experts=ExpertsSpec(8, 1)),
    "three experts": replace(DENSE, experts=ExpertsSpec(8, 3)),
}


def made(name: str, spec: DecoderSpec) -> tuple[backends.Backend, object, Batch, Memory]:
    """Backend, model, a batch, and what is planned for it."""
    tokens = np.random.default_rng(0).integers(0, 64, (2, 257)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((2, 256), np.float32), np.full(2, 256, np.int32))
    backend = backends.get(name, Runtime(device="cpu"))
    model = backend.build(spec)
    backend.load(model, initialise(spec, 0))
    planned = count_memory(spec, lm_shape(spec), batch_shape(batch), name, "float32", FrozenBytes(), Optim())
    return backend, model, batch, planned


@pytest.mark.parametrize("kind", SPECS)
def test_torch_keeps_what_is_planned(kind: str) -> None:
    torch = pytest.importorskip("torch")
    backend, model, batch, planned = made("torch", SPECS[kind])
    parameters = {p.data_ptr() for p in model.parameters()}  # type: ignore[attr-defined]
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:  # type: ignore[name-defined]
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sums = lm(model, backend.to_device(batch))  # type: ignore[attr-defined]
    size = sum(size for pointer, size in kept.items() if pointer not in parameters)
    assert np.isfinite(float(sums["loss"]))
    assert planned.activations == pytest.approx(size, rel=0.15), kind


def test_experts_do_not_make_a_matrix_a_token() -> None:
    mx = pytest.importorskip("mlx.core")
    backend, model, batch, planned = made("mlx", SPECS["three experts"])
    step = backend.make_step(model, lm, Optim(), seed=0)
    for number in (1, 2):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        float(step([batch], step=number, lr={"model": 1e-3})["loss"])
    own = planned.weights + planned.optimizer
    assert mx.get_peak_memory() - before + own < 1.3 * (planned.total - planned.overhead)
