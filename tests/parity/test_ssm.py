"""State-space mixers against plain recurrences in float64, at once and token by token; decoding in bounded memory."""

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mlx_training.backend import PACKAGES
from mlx_training.config_model import SSMConfig
from mlx_training.config_presets import PRESETS
from mlx_training.data.batch import Batch
from mlx_training.environment import installed_backends
from mlx_training.errors import BackendError
from mlx_training.objectives.lm import lm
from mlx_training.spec import SSMSpec
from tests.parity.cases import VOCAB, realise, relative, specs
from tests.parity.lm_driver import to_array
from tests.parity.test_language_models import windows

BACKENDS = list(installed_backends())
SSM_CASES = ("ssm-mamba", "ssm-mamba2", "ssm-s4d", "ssm-stu-local")


class Case(NamedTuple):
    """A scan: what it reads over time, the scan itself on arrays of a backend, and the recurrence in float64."""

    inputs: list[np.ndarray]
    scan: Callable[..., Any]  # (scans module, constants to arrays, inputs, state) -> (y, state)
    expected: np.ndarray


def steps_of_time(rng: np.random.Generator, shape: tuple[int, ...], extreme: bool) -> np.ndarray:
    """dt: as trained, or from far too short to far too long, side by side."""
    return np.exp(rng.uniform(*((-14, 8) if extreme else (-7, -2)), shape))


def mamba(T: int, extreme: bool) -> Case:
    rng, (B, D, N) = np.random.default_rng(0), (2, 3, 4)
    x, dt = rng.standard_normal((B, T, D)), steps_of_time(rng, (B, T, D), extreme)
    keys, queries, skip = rng.standard_normal((B, T, N)), rng.standard_normal((B, T, N)), rng.standard_normal(D)
    A = -np.tile(np.arange(1, N + 1.0), (D, 1))
    h, y = np.zeros((B, D, N)), np.zeros((B, T, D))
    for t in range(T):
        h = np.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * keys[:, t, None]
        y[:, t] = (h * queries[:, t, None]).sum(-1) + skip * x[:, t]
    return Case(
        [x, dt, keys, queries],
        lambda scans, to, x, dt, keys, queries, h: scans.selective_scan(x, dt, to(A), keys, queries, to(skip), h),
        y,
    )


def mamba2(T: int, extreme: bool) -> Case:
    rng, (B, S, P, G, N) = np.random.default_rng(1), (2, 4, 3, 2, 5)
    x, dt = rng.standard_normal((B, T, S, P)), steps_of_time(rng, (B, T, S), extreme)
    keys, queries, skip = rng.standard_normal((B, T, G, N)), rng.standard_normal((B, T, G, N)), rng.standard_normal(S)
    A = -np.arange(1, S + 1.0)
    h, y = np.zeros((B, S, P, N)), np.zeros((B, T, S, P))
    for t in range(T):
        key, query = (z[:, t].repeat(S // G, axis=1)[:, :, None] for z in (keys, queries))
        h = np.exp(dt[:, t] * A)[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * key
        y[:, t] = (h * query).sum(-1) + skip[:, None] * x[:, t]
    return Case(
        [x, dt, keys, queries],
        lambda scans, to, x, dt, keys, queries, h: scans.ssd(x, dt, to(A), keys, queries, to(skip), 16, h),
        y,
    )


def s4d(T: int, extreme: bool) -> Case:
    rng, (B, D, M) = np.random.default_rng(2), (2, 6, 4)
    u, dt, skip = rng.standard_normal((B, T, D)), steps_of_time(rng, (D,), extreme), rng.standard_normal(D)
    A, C = (-0.5 + 1j * np.pi * np.arange(M)) * np.ones((D, 1)), rng.standard_normal((D, M, 2))
    decay = np.exp(dt[:, None] * A)
    h, y = np.zeros((B, D, M), complex), np.zeros((B, T, D))
    for t in range(T):
        h = decay * h + np.expm1(dt[:, None] * A) / A * u[:, t, :, None]
        y[:, t] = 2 * (h * (C[..., 0] + 1j * C[..., 1])).real.sum(-1) + skip * u[:, t]
    pairs = [(A.real, A.imag), (C[..., 0], C[..., 1])]
    return Case(
        [u],
        lambda scans, to, u, h: scans.diagonal_ssm(
            u, to(dt), *(tuple(map(to, pair)) for pair in pairs), to(skip), h, keep=True
        ),
        y,
    )


def stu(T: int, extreme: bool) -> Case:
    """`extreme`: a kernel shorter than the text."""
    rng, (B, D) = np.random.default_rng(3), (2, 3)
    x, kernel = rng.standard_normal((B, T, D)), rng.standard_normal((5 if extreme else T + 4, D))
    y = np.stack([sum(kernel[j] * x[:, t - j] for j in range(min(t + 1, len(kernel)))) for t in range(T)], axis=1)
    return Case([x], lambda scans, to, x, past: scans.filtered(x, to(kernel), past), y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("T", [1, 37, 512])
@pytest.mark.parametrize("make", [mamba, mamba2, s4d, stu])
def test_scans_are_the_recurrence(make: Callable[[int, bool], Case], T: int, extreme: bool, backend: str) -> None:
    """All at once, and in pieces of 3, 1 and the rest that hand their state on."""
    case, scans = make(T, extreme), importlib.import_module(f"{PACKAGES[backend]}.scans")

    def to(array: np.ndarray) -> Any:
        return to_array(backend, array.astype(np.float32))

    def scan(start: int, stop: int, state: Any) -> Any:
        return case.scan(scans, to, *(to(x[:, start:stop]) for x in case.inputs), state)

    assert relative(np.asarray(scan(0, T, None)[0]), case.expected) <= 2e-5
    cuts, state, pieces = sorted({0, min(3, T), min(4, T), T}), None, []
    for start, stop in itertools.pairwise(cuts):
        y, state = scan(start, stop, state)
        pieces.append(np.asarray(y))
    assert relative(np.concatenate(pieces, axis=1), case.expected) <= 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [mamba, mamba2])
def test_gradients_stay_finite(make: Callable[[int, bool], Case], backend: str) -> None:
    """Where decays are 0 and 1 in float32."""
    case, scans = make(64, True), importlib.import_module(f"{PACKAGES[backend]}.scans")
    arrays = [x.astype(np.float32) for x in case.inputs]

    def to(array: np.ndarray) -> Any:
        return to_array(backend, array.astype(np.float32))

    if backend == "mlx":
        import mlx.core as mx

        gradients = mx.grad(lambda *x: case.scan(scans, to, *x, None)[0].sum(), argnums=[0, 1, 2, 3])(*map(to, arrays))
    else:
        import torch

        given = [to(array).requires_grad_() for array in arrays]
        gradients = torch.autograd.grad(case.scan(scans, to, *given, None)[0].sum(), given)
    assert all(np.isfinite(np.asarray(g)).all() and np.asarray(g).any() for g in gradients)


def test_filters_are_eigenvectors_with_one_sign() -> None:
    spec = SSMSpec(VOCAB, context_length=64, num_filters=12)
    filters, turned = np.split(spec.spectral_filters().astype(np.float64), 2, axis=1)
    i = np.arange(1, 65.0)
    sums = i[:, None] + i
    Z = 2 / (sums**3 - sums)
    sigma = np.linalg.norm(filters, axis=0) ** 4
    assert (np.diff(sigma) < 0).all() and sigma[0] == pytest.approx(0.36039, rel=1e-4)
    np.testing.assert_allclose(Z @ filters, sigma * filters, atol=1e-7)
    np.testing.assert_array_equal(turned, filters * np.where(np.arange(64) % 2, -1, 1)[:, None])
    assert (filters[np.abs(filters).argmax(0), np.arange(12)] > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SSM_CASES)
def test_what_decoding_remembers_does_not_grow(case: str, backend: str, directory: Path) -> None:
    spec = specs(directory)[case]
    assert isinstance(spec, SSMSpec)
    chosen, model = realise(backend, spec)
    session, sizes = chosen.session(model), []
    tokens = np.arange(3, 5, dtype=np.int32)[:, None]
    session.prefill(Batch(tokens, tokens, np.ones((2, 1), np.float32), np.ones(2, np.int32)))
    for token in range(2 * spec.context_length if "stu" in spec.mixers else 8):
        session.extend(np.array([token % 90, 7]))
        cache = session.cache
        kept = [x for state in (*cache.states, cache.keys, cache.values) for x in state if x is not None]
        sizes.append(sum(np.asarray(x).size for x in kept))
    bound = spec.context_length if "stu" in spec.mixers else 1
    assert len(set(sizes[bound:])) == 1 and sizes[-1] > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_in_one_row_are_refused(backend: str, directory: Path) -> None:
    chosen, model = realise(backend, specs(directory)["ssm-mamba"])
    with pytest.raises(BackendError, match="a row of its own"):
        chosen.score(model, lm, windows([np.arange(3, 9, dtype=np.int32), np.arange(3, 7, dtype=np.int32)]))


@pytest.mark.parametrize("preset", PRESETS["ssm"])
def test_presets_begin_as_a_uniform_guess(preset: str) -> None:
    """Within 3 % of ln V, with the vocabulary of the shipped configurations."""
    spec = SSMConfig.model_validate({"family": "ssm", **PRESETS["ssm"][preset]}).spec(16_000)
    tokens = np.random.default_rng(0).integers(0, 16_000, (2, 33)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((2, 32), np.float32), np.array([32, 32], np.int32))
    backend, model = realise(BACKENDS[-1], spec)
    sums = backend.score(model, lm, batch)
    assert sums["loss"] / sums["weight"] == pytest.approx(np.log(16_000), rel=0.03)
