"""The optimiser step of each backend against NumPy, against itself, and against what it must not touch.

`test_parity` cannot see a fault that both backends share (a rule of the table, a formula written twice) or that
cancels on its models (epsilons, the rates of groups, a clip that Adam forgives).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training import backend as backends
from mlx_training.backend import Arrays, Optim, Runtime
from mlx_training.data.batch import Batch
from mlx_training.init import initialise
from mlx_training.objectives import Sums
from mlx_training.objectives.lm import lm
from mlx_training.spec import Spec, TimeSeriesSpec
from tests.parity.cases import CASES, batches, realise, specs

pytestmark = pytest.mark.usefixtures("both_backends")


def timeseries(directory: Path, dropout: float = 0.0) -> TimeSeriesSpec:
    """The case with everything: numeric scale, normed output, trainable head; three learning-rate groups."""
    spec = specs(directory)["timeseries-ours"]
    assert isinstance(spec, TimeSeriesSpec)
    encoder, projector = replace(spec.encoder, dropout=dropout), replace(spec.projector, dropout=dropout)
    return replace(spec, encoder=encoder, projector=projector)


def rates(spec: Spec, rate: float) -> dict[str, float]:
    return dict.fromkeys(spec.groups, rate)


@pytest.mark.parametrize("case", CASES)
def test_matrices_decay_and_nothing_else(case: str, directory: Path) -> None:
    """Biases, norms, positions, sinks and the decay of states are not pulled towards zero."""
    kept = ("encoder.pos_embed", "encoder.series_embed", "sink_k", "sink_v", "A_log", "A_imag")
    for name, param in specs(directory)[case].params().items():
        assert param.decay == (len(param.shape) > 1 and not name.endswith(kept)), name


def small_lm(model: Any, batch: Batch) -> Sums:
    """So small that Adam's eps, and the 1e-6 in the clip formula, matter."""
    sums = lm(model, batch)
    return sums | {"loss": sums["loss"] * 1e-5}


@pytest.mark.parametrize(
    ("case", "max_norm"),
    [("timeseries-ours", 2e-6), ("timeseries-ours without series", None), ("decoder-untied", 1.0)],
    ids=["clipped", "unused-parameters", "below-the-threshold"],
)
def test_steps_equal_adamw_in_numpy(case: str, max_norm: float | None, backend_name: str, directory: Path) -> None:
    """Four steps over two uneven micro-batches; without series the encoder only decays."""
    case, *without_series = case.split(maxsplit=1)
    spec = specs(directory)[case]
    optim = Optim(betas=(0.8, 0.95), eps=3e-8, weight_decay=0.3, grad_clip_norm=max_norm)
    data = [*batches(spec, 1, batch_size=4), *batches(spec, 1, seed=1, batch_size=1)]
    if without_series:
        absent = dict.fromkeys(("series", "scale", "num_patches", "series_place", "patch_index"))
        data = [replace(batch, **absent) for batch in data]
    weights = np.array([batch.num_supervised for batch in data])
    backend, model = realise(backend_name, spec)
    step = backend.make_step(model, small_lm, optim, seed=0)
    expected = {name: array.astype(np.float64) for name, array in backend.export(model).items()}
    m, v = ({name: np.zeros_like(array) for name, array in expected.items()} for _ in range(2))
    for t in range(1, 5):
        lr = {group: 1e-2 / (t + 2 * i) for i, group in enumerate(spec.groups)}
        parts = [backend.gradients(model, small_lm, batch) for batch in data]
        losses = [backend.score(model, small_lm, batch)["loss"] for batch in data]
        gradients = {name: np.average([part[name] for part in parts], axis=0, weights=weights) for name in expected}
        norm = np.sqrt(sum(np.square(gradient).sum() for gradient in gradients.values()))
        clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
        for name, param in spec.params().items():
            gradient = gradients[name] * clip
            m[name] = 0.8 * m[name] + 0.2 * gradient
            v[name] = 0.95 * v[name] + 0.05 * gradient**2
            expected[name] *= 1 - lr[param.group] * 0.3 * param.decay
            expected[name] -= lr[param.group] * m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 3e-8)
        metrics = step(data, step=t, lr=lr)
        assert float(metrics["loss"]) == pytest.approx(sum(losses) / weights.sum(), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        assert float(metrics["weight"]) == weights.sum()
        for name, array in backend.export(model).items():
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=2e-6, err_msg=f"{name}, step {t}")


def test_a_step_reads_what_was_loaded_after_it_was_built(backend_name: str, directory: Path) -> None:
    spec = timeseries(directory)
    (batch,) = batches(spec, 1)
    backend, model = realise(backend_name, spec)
    step = backend.make_step(model, lm, Optim(), seed=0)
    step([batch], step=1, lr=rates(spec, 1e-3))
    other = backend.export(model) | initialise(spec, seed=7)
    backend.load(model, other)
    expected = backend.score(model, lm, batch)["loss"] / batch.num_supervised
    assert float(step([batch], step=2, lr=rates(spec, 0.0))["loss"]) == pytest.approx(expected, rel=1e-5)
    for name, array in backend.export(model).items():
        np.testing.assert_array_equal(array, other[name])


def test_the_frozen_lm_stays(backend_name: str, directory: Path) -> None:
    """Also under a trainable head that started as a copy of its embeddings."""
    spec = timeseries(directory)
    backend, model = realise(backend_name, spec)
    frozen, head = backend.frozen_hash(model), backend.export(model)["lm_head.weight"]
    backend.make_step(model, lm, Optim(weight_decay=0.1), seed=0)(batches(spec, 1), step=1, lr=rates(spec, 1e-2))
    assert np.abs(backend.export(model)["lm_head.weight"] - head).max() > 1e-3
    assert backend.frozen_hash(model) == frozen


@pytest.mark.usefixtures("uncompiled")
def test_small_updates_survive_bfloat16(backend_name: str, directory: Path) -> None:
    """Master weights are float32: in bfloat16 a norm's weight of 1.0 would not move by 1e-4."""
    spec = specs(directory)["decoder-untied"]
    backend = backends.get(backend_name, Runtime(device="cpu", precision="bfloat16"))
    model = backend.build(spec)
    before = initialise(spec, 0)
    backend.load(model, before)
    backend.make_step(model, lm, Optim(), seed=0)(batches(spec, 1), step=1, lr=rates(spec, 1e-4))
    moved = np.abs(backend.export(model)["model.norm.weight"] - before["model.norm.weight"])
    np.testing.assert_allclose(moved, 1e-4, rtol=1e-2)  # the first step of Adam is lr * sign(gradient)


def test_compiled_equals_eager(directory: Path) -> None:
    """On MLX, dropout included; two shapes, one and two micro-batches."""
    import mlx.core as mx

    spec = timeseries(directory, dropout=0.2)
    small, large = batches(spec, 1, batch_size=2)[0], batches(spec, 1, batch_size=5)[0]

    def run() -> tuple[list[float], Arrays]:
        backend, model = realise("mlx", spec)
        step = backend.make_step(model, lm, Optim(weight_decay=0.1, grad_clip_norm=1.0), seed=0)
        plan = [[small], [large], [small, large], [large, large], [small]]
        losses = [float(step(part, step=i + 1, lr=rates(spec, 1e-3))["loss"]) for i, part in enumerate(plan)]
        return losses, backend.export(model)

    losses, ends = run()
    mx.disable_compile()
    try:
        eager_losses, eager_ends = run()
    finally:
        mx.enable_compile()
    assert losses == pytest.approx(eager_losses, rel=1e-5)
    assert max(np.abs(ends[name] - array).max() for name, array in eager_ends.items()) < 1e-4


def test_dropout(backend_name: str, directory: Path) -> None:
    """Training draws from (seed, step) and from nothing else; evaluation, gradients and sessions draw nothing."""
    spec, plain = timeseries(directory, dropout=0.3), timeseries(directory)
    (batch,) = batches(spec, 1)
    backend, model = realise(backend_name, spec)

    def train(seed: int, steps: list[int], count: int = 1) -> list[float]:
        step = backend.make_step(model, lm, Optim(), seed=seed)
        return [float(step([batch] * count, step=i, lr=rates(spec, 0.0))["loss"]) for i in steps]

    first = train(0, [1, 2, 3, 1])
    assert first[0] == first[3] and len(set(first)) == 3
    assert train(0, [2]) == first[1:2]
    assert train(1, [1]) != first[:1]
    assert train(0, [1], count=2) != first[:1], "both micro-batches drew the same masks"
    asked = (
        lambda b, m: b.score(m, lm, batch)["loss"],
        lambda b, m: b.gradients(m, lm, batch)["projector.linear.weight"],
        lambda b, m: b.session(m).prefill(batch),
    )
    for ask in asked:
        train(0, [1])  # leaves the model in training mode
        np.testing.assert_allclose(ask(backend, model), ask(*realise(backend_name, plain)), rtol=1e-5, atol=1e-6)
