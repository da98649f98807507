"""Averages of the weights (`Optim.ema_decay`) on both backends: against NumPy, with skipped steps, taken over."""

from typing import Any

import numpy as np
import pytest

from mlx_training.backend import Arrays, Optim
from mlx_training.data.batch import Batch
from mlx_training.objectives.lm import lm
from mlx_training.spec import DecoderSpec
from tests.parity.cases import VOCAB, batches, realise

pytestmark = pytest.mark.usefixtures("both_backends", "uncompiled")

SPEC = DecoderSpec(*(VOCAB, 16, 24, 1, 2, 1, 8), context_length=20, init_std=0.2)
DECAY, RATES = 0.7, {"model": 1e-2}


def averages(backend: Any, model: Any, step: Any) -> Arrays:
    with step.averaged():
        found: Arrays = backend.export(model)
    return found


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_they_are_the_exponential_mean_of_all_steps_taken(name: Any, backend_name: str) -> None:
    """sum_i d^(t-i) w_i / sum_i d^(t-i) over the steps that were taken; training does not see them."""
    data, weights, poison = batches(SPEC, 5), [], {"factor": 1.0}
    backend, model = realise(backend_name, SPEC)
    plain, other = realise(backend_name, SPEC)

    def objective(model: Any, batch: Batch) -> dict[str, Any]:
        sums = lm(model, batch)
        return sums | {"loss": sums["loss"] * poison["factor"]}

    settings = {"name": name, "grad_clip_norm": 1.0, "weight_decay": 0.1}
    step = backend.make_step(model, objective, Optim(**settings, ema_decay=DECAY), seed=0)
    without = plain.make_step(other, objective, Optim(**settings), seed=0)
    initial = backend.export(model)
    assert all(np.array_equal(initial[n], array) for n, array in averages(backend, model, step).items())
    for number, batch in enumerate(data, start=1):
        poison["factor"] = np.nan if number in (1, 4) else 1.0
        for take in (step, without):
            skipped = float(take([batch], step=number, lr=RATES)["skipped"])
            assert skipped == (number in (1, 4))
        raw = backend.export(model)
        for n, array in plain.export(other).items():
            np.testing.assert_allclose(raw[n], array, rtol=0, atol=1e-7, err_msg=n)
        if not skipped:
            weights.append(raw)
        shares = DECAY ** np.arange(len(weights))[::-1]
        for n, found in averages(backend, model, step).items():
            means = np.average([w[n] for w in weights], axis=0, weights=shares) if weights else initial[n]
            np.testing.assert_allclose(found, means, rtol=0, atol=1e-6, err_msg=f"{n}, step {number}")
        assert all(np.array_equal(raw[n], array) for n, array in backend.export(model).items())


def test_taken_over(backend_name: str, both_backends: list[str]) -> None:
    """The model as it is saved has the averages; state and model bring back both, here to the bit and there nearly."""
    data, optim = batches(SPEC, 6), Optim(weight_decay=0.1, ema_decay=DECAY)
    backend, model = realise(backend_name, SPEC)
    step = backend.make_step(model, lm, optim, seed=0)
    for number in (1, 2, 3):
        step([data[number]], step=number, lr=RATES)
    saved, state = averages(backend, model, step), step.export()
    assert {key: array.shape for key, array in state.items()} == optim.state_shapes(SPEC)
    ends = []
    for name in both_backends:
        there, copy = realise(name, SPEC)
        resumed = there.make_step(copy, lm, optim, seed=0)
        there.load(copy, saved)
        resumed.load(state)
        for n, array in resumed.export().items():
            np.testing.assert_array_equal(array, state[n], err_msg=n)
        for n, array in averages(there, copy, resumed).items():
            np.testing.assert_array_equal(array, saved[n], err_msg=n)
        resumed([data[4]], step=4, lr=RATES)
        ends.append((name, there.export(copy), averages(there, copy, resumed)))
    step([data[4]], step=4, lr=RATES)
    raw, mean = backend.export(model), averages(backend, model, step)
    assert max(np.abs(raw[n] - mean[n]).max() for n in raw) > 1e-3
    for name, raw_there, mean_there in ends:
        for n in raw:
            tolerance = 0 if name == backend_name else 2e-5
            np.testing.assert_allclose(raw_there[n], raw[n], rtol=0, atol=tolerance, err_msg=n)
            np.testing.assert_allclose(mean_there[n], mean[n], rtol=0, atol=tolerance, err_msg=n)
