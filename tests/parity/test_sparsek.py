"""Causal SparseK against its definition, key by key in NumPy, in both of its forms."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mlx_training.config import load_config
from mlx_training.errors import ConfigError
from mlx_training.spec import DecoderSpec
from tests.parity.lm_driver import module, to_array

N, D, WINDOW, SELECTED, SCALE = 4, 6, 3, 2, 0.4
SETTINGS = {"mixers": ("sparsek",), "window": WINDOW, "num_selected": SELECTED}


def threshold(values: list[float], total: int) -> float:
    """tau with sum clip(value - tau, 0, 1) = total, by halving, far beyond float32."""
    low, high = min(values) - 1, max(values)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(np.subtract(values, middle), 0, 1).sum() > total else (low, middle)
    return low


def key_weights(scores_T: np.ndarray, query: int, document_T: np.ndarray) -> Iterator[tuple[int, float]]:
    """Every key that a query sees, and how much it counts."""
    past = [key for key in range(query + 1) if document_T[key] == document_T[query]]
    yield from ((key, 1.0) for key in past if query - key < WINDOW)
    before = sorted((key for key in past if query - key >= WINDOW), key=lambda key: (-scores_T[key], key))
    competing = before[: 2 * SELECTED]
    tau = threshold([scores_T[key] for key in competing], SELECTED) if len(competing) > SELECTED else -np.inf
    yield from ((key, float(np.clip(scores_T[key] - tau, 0, 1))) for key in before[:SELECTED])


def by_definition(q: Any, k: Any, v: Any, scores: Any, segments: Any, sinks: Any) -> np.ndarray:
    B, _, T, _ = q.shape
    out, group = np.zeros(q.shape), N // k.shape[1]
    for b, n, t in np.ndindex(B, N, T):
        seen = dict(key_weights(scores[b, n // group].astype(np.float64), t, segments[b]))
        keys, values = k[b, n // group, [*seen]], v[b, n // group, [*seen]]
        weights = np.array([*seen.values()])
        if sinks is not None:
            keys, values = (
                np.concatenate([x, sink[n // group]]) for x, sink in zip((keys, values), sinks, strict=True)
            )
            weights = np.append(weights, np.ones(len(sinks[0][0])))
        p = weights * np.exp(keys @ q[b, n, t] * SCALE)
        out[b, n, t] = p @ values / p.sum()
    return out


def material(T: int, num_kv_heads: int, *, ties: bool = False) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Queries, keys, values and scores; sinks; documents."""
    rng = np.random.default_rng(T)
    arrays = [rng.standard_normal((2, heads, T, D), np.float32) for heads in (N, num_kv_heads, num_kv_heads)]
    scores = rng.standard_normal((2, num_kv_heads, T)).astype(np.float32)
    scores = np.round(scores) if ties else 0.6 * scores
    sinks = [rng.standard_normal((num_kv_heads, 3, D), np.float32) for _ in "kv"]
    return [*arrays, scores], sinks, np.sort(rng.integers(0, 3, (2, T)), 1).astype(np.int32)


@pytest.mark.parametrize("num_kv_heads", [2, N])
@pytest.mark.parametrize(
    ("T", "with_documents", "with_sinks"), [(2, False, False), (23, True, False), (31, False, True)]
)
@pytest.mark.parametrize("form", ["whole", "cached", "ties"])
def test_equals_definition(
    backend_name: str, form: str, T: int, with_documents: bool, with_sinks: bool, num_kv_heads: int
) -> None:
    spec = DecoderSpec(8, num_heads=N, num_kv_heads=num_kv_heads, **SETTINGS)
    arrays, sinks, segments = material(T, num_kv_heads, ties=form == "ties")
    segments = segments if with_documents else np.zeros((2, T), np.int32)
    expected = by_definition(*arrays, segments, sinks if with_sinks else None)
    realised = module(backend_name, "sparsek")
    given = [to_array(backend_name, x) for x in arrays]
    learned = tuple(to_array(backend_name, x) for x in sinks) if with_sinks else None
    if form == "cached":
        same = segments[:, None, :, None] == segments[:, None, None]
        mask = to_array(backend_name, np.tril(same))
        actual = realised.sparsek_cached(*given, spec, mask, SCALE, learned)
        last = realised.sparsek_cached(given[0][:, :, -1:], *given[1:], spec, mask[:, :, -1:], SCALE, learned)
        np.testing.assert_allclose(np.array(last.tolist())[:, :, 0], expected[:, :, -1], atol=3e-6)
    else:
        documents = to_array(backend_name, segments) if with_documents else None
        actual = realised.sparsek(*given, spec, documents, SCALE, learned)
    np.testing.assert_allclose(np.array(actual.tolist()), expected, atol=3e-6)


def test_the_threshold_and_its_gradient(backend_name: str) -> None:
    """m sums to k, and its derivative is the definition's; where no more than k compete every one counts fully."""
    rng = np.random.default_rng(0)
    values = -np.sort(-rng.standard_normal((50, 8)).astype(np.float32), -1)
    weights = rng.standard_normal(values.shape).astype(np.float32)
    seen = np.ones(values.shape, bool)
    seen[40:, 3:] = False
    m, gradient = _threshold_and_gradient(backend_name, values, seen, 3, weights)
    np.testing.assert_allclose(m[:40].sum(-1), 3, atol=2e-6)
    np.testing.assert_array_equal(m[40:], seen[40:])
    for row in range(40):
        tau = threshold(values[row].astype(np.float64).tolist(), 3)
        np.testing.assert_allclose(m[row], np.clip(values[row] - tau, 0, 1), atol=2e-6)
        part = (m[row] > 0) & (m[row] < 1)
        expected = np.where(part, weights[row] - weights[row][part].mean(), 0)
        np.testing.assert_allclose(gradient[row], expected, atol=2e-6)
    assert not gradient[40:].any()


def _threshold_and_gradient(
    backend: str, values: np.ndarray, seen: np.ndarray, count: int, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    soft_threshold = module(backend, "sparsek").soft_threshold
    x, mask, w = (to_array(backend, array) for array in (values, seen, weights))
    if backend == "mlx":
        import mlx.core as mx

        gradient = mx.grad(lambda x: (soft_threshold(x, mask, count) * w).sum())(x)
        return np.array(soft_threshold(x, mask, count)), np.array(gradient)
    x.requires_grad_()
    m = soft_threshold(x, mask, count)
    (m * w).sum().backward()
    return m.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["window=256"], "window: given 256; with num_selected 8 a query .* all 64 tokens .*: give at most 55"),
        (["window=32", "num_selected=32"], "give at most 31"),
        (["window=8", "num_selected=99"], "num_selected: given 99; with window 8 .* give at most 55"),
        (["window=99", "num_selected=99"], "give at most 31, and num_selected at most 32"),
        (["window=8", "num_selected=0"], "num_selected"),
        (["window=8", "mixers=[local]"], "num_selected.*mixers: local does not read it; .* give mixers: sparsek"),
        (["window=8", "positions=alibi"], "ALiBi goes with causal only"),
    ],
)
def test_impossible_settings(tmp_path: Any, overrides: list[str], says: str) -> None:
    from tests.e2e.tiny import decoder_config

    (tmp_path / "config.yaml").write_text(decoder_config(tmp_path / "run"))
    given = ["context_length=64", "mixers=[sparsek]", "num_selected=8", *overrides]
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        load_config(tmp_path / "config.yaml", [f"model.decoder.{key}" for key in given])
