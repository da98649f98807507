"""Every optimiser on both backends: against NumPy, 300 steps, a change of backend midway, exact resume, skipping."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_training import backend as backends
from mlx_training.backend import PROBE, Arrays, Optim, Runtime
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.optimizers import updated
from mlx_training.init import initialise
from mlx_training.objectives.lm import lm
from mlx_training.optim import SETTINGS
from mlx_training.spec import DecoderSpec
from tests.parity.cases import VOCAB, batches, rates, realise, relative

pytestmark = pytest.mark.usefixtures("both_backends", "uncompiled")

SPEC = DecoderSpec(
    *(VOCAB, 16, 24, 1, 2, 1, 8),
    activation="gelu",
    positions="learned",
    context_length=20,
    tie_word_embeddings=False,
    init_std=0.2,
)
RATES = {"sgd": 0.1, "adagrad": 2e-2, "lion": 3e-4, "rmsprop": 1e-3, "rmsprop-momentum": 5e-4, "adafactor": 2e-3}
OPTIMIZERS: dict[str, Optim] = {
    name: Optim(**({"name": name, "grad_clip_norm": 1.0} | settings | {"weight_decay": 0.05}))
    for name, settings in SETTINGS.items()
}
OPTIMIZERS["sgd"] = replace(OPTIMIZERS["sgd"], momentum=0.9, nesterov=True)
OPTIMIZERS["muon"] = replace(OPTIMIZERS["muon"], muon_lr_factor=3.0)
VARIANTS = {
    "sgd-plain": replace(OPTIMIZERS["sgd"], momentum=0.0, nesterov=False),
    "sgd-polyak": replace(OPTIMIZERS["sgd"], nesterov=False),
    "rmsprop-momentum": replace(OPTIMIZERS["rmsprop"], momentum=0.8, alpha=0.9),
    "lion-other-betas": replace(OPTIMIZERS["lion"], betas=(0.7, 0.95)),
    "muon-polyak": replace(OPTIMIZERS["muon"], nesterov=False, momentum=0.8),
}
ALL = OPTIMIZERS | VARIANTS


def peak(name: str) -> float:
    return RATES.get(name, RATES.get(name.split("-")[0], 1e-3))


@pytest.mark.parametrize("name", ALL)
def test_steps_equal_numpy(name: str, backend_name: str) -> None:
    """Three clipped steps over two uneven micro-batches: parameters, state and the figures of a probe."""
    optim = replace(ALL[name], grad_clip_norm=0.3)
    data = [*batches(SPEC, 1, batch_size=4), *batches(SPEC, 1, seed=1, batch_size=1)]
    weights = np.array([batch.num_supervised for batch in data])
    backend, model = realise(backend_name, SPEC)
    step = backend.make_step(model, lm, optim, seed=0)
    table, state = SPEC.params(), step.export()
    assert {key: array.shape for key, array in state.items()} == optim.state_shapes(SPEC)
    assert not any(array.any() for array in state.values())
    for t in (1, 2, 3):
        before = backend.export(model)
        parts = [backend.gradients(model, lm, batch) for batch in data]
        gradients = {n: np.average([part[n] for part in parts], axis=0, weights=weights) for n in before}
        norm = np.sqrt(sum(np.square(g).sum() for g in gradients.values()))
        assert norm > 0.3
        lr = {"model": 0.02 / t}
        metrics = step(data, step=t, lr=lr, probe=t == 3)
        after, new_state = backend.export(model), step.export()
        for n, param in table.items():
            own = {key: state[f"{n}.{key}"] for key in optim.state(param)}
            g = gradients[n] * (0.3 / (norm + 1e-6))
            expected, kept = updated(optim, param, before[n], g, own, t, lr["model"])
            sure = np.abs(g) > 1e-3 * np.abs(g).max()  # the sign of rounding noise is anything
            sure |= g == 0
            np.testing.assert_allclose(after[n][sure], expected[sure], rtol=0, atol=3e-6, err_msg=f"{n}, step {t}")
            for key, array in kept.items():
                assert relative(new_state[f"{n}.{key}"], array) < 1e-5, f"{n}.{key}, step {t}"
            if t == 3:
                moments = [np.linalg.norm(new_state.get(f"{n}.{key}", np.zeros(1))) for key in "mv"]
                figures = [np.linalg.norm(after[n] - before[n]), *moments]
                assert [metrics["probe"][n][key] for key in PROBE[2:5]] == pytest.approx(figures, rel=1e-3)
        state = new_state
    assert state["step"] == 3 and all(array.dtype == np.float32 for array in state.values())


@pytest.mark.parametrize("num_steps", [150, pytest.param(300, marks=pytest.mark.proof)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trajectory_and_changing_backends(name: str, num_steps: int, record_property: Any) -> None:
    """|difference of the losses| <= 1e-4. From the state at half time the other backend goes on within 1e-4 of the
    course, and the same one to the bit.
    """
    half = num_steps // 2
    data, optim = batches(SPEC, 64), OPTIMIZERS[name]
    course: dict[str, np.ndarray] = {}
    middle: dict[str, tuple[Arrays, Arrays]] = {}

    def losses(backend_name: str, first: int, last: int) -> np.ndarray:
        backend, model = realise(backend_name, SPEC)
        step = backend.make_step(model, lm, optim, seed=0)
        if first > 1:
            backend.load(model, saved[0])
            step.load(saved[1])
        found = []
        for i in range(first, last + 1):
            found.append(step([data[i % 64]], step=i, lr=rates(SPEC, i, num_steps, peak(name)))["loss"])
            if first == 1 and i == half:
                middle[backend_name] = backend.export(model), step.export()
        return np.array([float(loss) for loss in found])

    for backend_name in ("mlx", "torch"):
        course[backend_name] = losses(backend_name, 1, num_steps)
    difference = np.abs(course["mlx"] - course["torch"])
    record_property("max_loss_difference", float(difference.max()))
    assert course["torch"][-20:].mean() < 0.95 * course["torch"][:20].mean(), "nothing was learnt"
    assert difference.max() <= 1e-4, f"{difference.max():.2e} at step {difference.argmax() + 1}"
    for here, there in (("mlx", "torch"), ("torch", "mlx")):
        saved = middle[here]
        assert np.abs(losses(there, half + 1, half + 10) - course[there][half : half + 10]).max() <= 1e-4
        np.testing.assert_array_equal(losses(here, half + 1, half + 5), course[here][half : half + 5])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_is_skipped(name: str, backend_name: str) -> None:
    """To the bit: parameters, state and count; then training goes on."""
    (batch,) = batches(SPEC, 1)
    backend, model = realise(backend_name, SPEC)
    factor = {"value": 1.0}

    def objective(model: Any, batch: Batch) -> dict[str, Any]:
        sums = lm(model, batch)
        return sums | {"loss": sums["loss"] * factor["value"]}

    step = backend.make_step(model, objective, OPTIMIZERS[name], seed=0)
    for number, value in enumerate((1.0, np.nan, np.inf, 1.0), start=1):
        before = backend.export(model) | step.export()
        factor["value"] = float(value)
        metrics = step([batch], step=number, lr=rates(SPEC, 5, 40))
        after = backend.export(model) | step.export()
        same = {key for key, array in after.items() if np.array_equal(array, before[key])}
        assert float(metrics["skipped"]) == (value != 1.0)
        assert (len(same) == len(after)) == (value != 1.0)
    assert after["step"] == 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16(name: str, backend_name: str) -> None:
    """Thirty steps end near float32's loss; weights and state stay float32."""
    data, ends = batches(SPEC, 30), {}
    for precision in ("float32", "bfloat16"):
        backend = backends.get(backend_name, Runtime(device="cpu", precision=precision))  # type: ignore[arg-type]
        model = backend.build(SPEC)
        backend.load(model, initialise(SPEC, 0))
        step = backend.make_step(model, lm, OPTIMIZERS[name], seed=0)
        losses = [
            float(step([batch], step=i, lr=rates(SPEC, i, 30, 2 * peak(name)))["loss"])
            for i, batch in enumerate(data, start=1)
        ]
        ends[precision] = losses
        state = [*vars(step)["state"].values()]
        assert {str(x.dtype).split(".")[-1] for part in state for x in part.values()} == {"float32"}
    first, last = (np.mean(ends["float32"][part]) for part in (slice(0, 3), slice(-3, None)))
    assert last < first - 0.02
    assert np.abs(np.subtract(ends["float32"], ends["bfloat16"])).max() < 0.1 * (first - last) + 0.02


def test_what_muon_moves_is_decided_by_the_table() -> None:
    hidden = {name for name, param in SPEC.params().items() if param.hidden}
    assert hidden == {name for name, p in SPEC.params().items() if ".layers." in name and len(p.shape) == 2}
    shapes = OPTIMIZERS["muon"].state_shapes(SPEC)
    assert {name for name in SPEC.params() if f"{name}.v" not in shapes} == hidden


def test_sizes_of_states() -> None:
    size, shapes = SPEC.num_parameters, OPTIMIZERS["adafactor"].state_shapes(SPEC)
    assert [OPTIMIZERS[name].state_size(SPEC) / size for name in ("adamw", "adam", "sgd", "adagrad")] == [2, 2, 1, 1]
    assert VARIANTS["sgd-plain"].state_size(SPEC) == 0
    assert shapes["model.layers.0.mlp.up_proj.weight.row"] == (24,)
    assert shapes["model.layers.0.mlp.up_proj.weight.col"] == (16,)
    assert shapes["model.norm.weight.v"] == (16,)
