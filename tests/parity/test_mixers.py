"""Attention patterns against their definition: every mixer, both backends, with documents, sinks and grouped heads."""

import itertools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from mlx_training.spec import DecoderSpec, FixedPattern
from mlx_training.spec.mixers import Mixer, visible

N, D, SCALE = 4, 6, 0.4
CASES = [
    case
    for case in itertools.product(
        ("causal", "local", "strided", "fixed", "bidirectional"), (5, 16, 37), (False, True), (False, True)
    )
    if not (case[0] == "fixed" and case[2])  # its blocks would cut documents
]


def mlx_mix(mixer: str, spec: DecoderSpec, arrays: list[Any], segments: Any, sinks: Any) -> np.ndarray:
    mx = pytest.importorskip("mlx.core")
    from mlx_training.mlx_backend.mixers import mix

    q, k, v, segments, *sinks = (None if x is None else mx.array(x) for x in (*arrays, segments, *(sinks or ())))
    return np.array(mix(mixer, spec, q, k, v, segments, SCALE, tuple(sinks) or None))


def torch_mix(mixer: str, spec: DecoderSpec, arrays: list[Any], segments: Any, sinks: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from torch_backend.mixers import mix

    given = (*arrays, segments, *(sinks or ()))
    q, k, v, segments, *sinks = (None if x is None else torch.from_numpy(x) for x in given)
    return mix(mixer, spec, q, k, v, segments, SCALE, tuple(sinks) or None).numpy()


def torch_compiled_mix(*given: Any) -> np.ndarray:
    """What torch.compile sees: nothing whose shape depends on the documents."""
    pytest.importorskip("torch")
    with patch("torch.compiler.is_compiling", return_value=True):
        return torch_mix(*given)


def by_definition(mixer: Mixer, spec: DecoderSpec, arrays: list[Any], segments: Any, sinks: Any) -> np.ndarray:
    """Every score, those that may not be seen at -inf, softmax."""
    q, k, v = (np.repeat(x, N // x.shape[1], 1) for x in arrays)
    positions = np.arange(q.shape[2])
    sizes = {"window": spec.window, "stride": spec.stride, "fixed": spec.fixed, "summaries": spec.fixed.summaries(N)}
    seen = visible(mixer, positions[None, :, None], positions[None, None], **sizes)
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None])
    scores = np.where(seen, np.einsum("bnqd,bnkd->bnqk", q, k) * SCALE, -np.inf)
    if sinks is not None:
        sink_k, sink_v = (np.repeat(x, N // x.shape[0], 0) for x in sinks)
        scores = np.concatenate([np.einsum("bnqd,njd->bnqj", q, sink_k) * SCALE, scores], -1)
        v = np.concatenate([np.broadcast_to(sink_v, (len(v), *sink_v.shape)), v], 2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("mix", [mlx_mix, torch_mix, torch_compiled_mix])
@pytest.mark.parametrize(("mixer", "T", "with_documents", "with_sinks"), CASES)
def test_sparse_equals_definition(
    mix: Callable[..., np.ndarray], mixer: Mixer, T: int, with_documents: bool, with_sinks: bool
) -> None:
    rng = np.random.default_rng(T)
    for num_kv_heads in (2, N):
        spec = DecoderSpec(
            8, num_heads=N, num_kv_heads=num_kv_heads, window=6, stride=5, fixed=FixedPattern(2, 8, 2, 2)
        )
        arrays = [rng.standard_normal((2, heads, T, D), np.float32) for heads in (N, num_kv_heads, num_kv_heads)]
        segments = np.sort(rng.integers(0, 3, (2, T)), 1).astype(np.int32) if with_documents else None
        sinks = [rng.standard_normal((num_kv_heads, 3, D), np.float32) for _ in "kv"] if with_sinks else None
        expected = by_definition(mixer, spec, arrays, segments, sinks)
        np.testing.assert_allclose(mix(mixer, spec, arrays, segments, sinks), expected, atol=2e-6)


def test_fixed_pattern_by_hand() -> None:
    """Blocks of 1, segments of 4, heads that take turns between the last two blocks and the two before."""
    pattern = FixedPattern(block_size=1, local_context=4, num_verts=2, vert_size=2)
    assert pattern.summaries(3).astype(int).tolist() == [[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
    sizes = {"window": 1, "stride": 2, "fixed": pattern, "summaries": pattern.summaries(2)}
    seen = visible("fixed", np.array(9)[None, None, None], np.arange(12)[None, None], **sizes)
    assert seen[:, 0].astype(int).tolist() == [
        [0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0],
    ]


@pytest.mark.parametrize(
    ("pattern", "heads", "key", "says"),
    [
        (FixedPattern(16, 60), 4, "local_context", "a multiple of block_size 16: 48 or 64"),
        (FixedPattern(16, 64, 1, 5), 4, "vert_size", "a segment has 4 blocks: at most 4"),
        (FixedPattern(16, 64, 1, 3), 4, "vert_size", "it must divide the 4 blocks of a segment: 2 or 4"),
        (FixedPattern(16, 64, 4, 2), 4, "num_verts", "4 blocks have 2 places of 2"),
        (FixedPattern(16, 64, 3, 1), 4, "num_verts", "it must divide num_heads 4: 1, 2, 4"),
    ],
)
def test_impossible_patterns(pattern: FixedPattern, heads: int, key: str, says: str) -> None:
    ((found, message),) = pattern.broken_rules(heads)
    assert found == key and says in message


def test_possible_pattern() -> None:
    assert not list(FixedPattern(16, 64, 2, 2).broken_rules(4))
