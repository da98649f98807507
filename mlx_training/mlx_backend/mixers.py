"""Sparse attention that costs what it looks at: no T x T scores, and none masked away that could be left out.

Shape suffixes: B rows, T tokens, N heads, K key/value heads, D head_dim, W window, J sinks, U blocks or segments,
G tokens of a segment, M summary tokens.
"""

import mlx.core as mx
import numpy as np

from mlx_training.mlx_backend.layers import attention
from mlx_training.spec import DecoderSpec

Sinks = tuple[mx.array, mx.array] | None  # keys and values (K, J, D) that every query sees


def attend(
    q_BNTD: mx.array, k_BKSD: mx.array, v_BKSD: mx.array, mask: mx.array | str | None, scale: float, sinks: Sinks
) -> mx.array:
    """Attention to keys and, before them, to the sinks, which no mask hides."""
    if sinks is None:
        return attention(q_BNTD, k_BKSD, v_BKSD, mask, scale)
    (B, _, T, _), S, J = q_BNTD.shape, k_BKSD.shape[2], sinks[0].shape[1]
    k_BKSD, v_BKSD = (
        mx.concatenate([mx.repeat(for_heads(sink, x.shape[1]).astype(x.dtype)[None], B, axis=0), x], axis=2)
        for sink, x in zip(sinks, (k_BKSD, v_BKSD), strict=True)
    )
    if isinstance(mask, str):
        mask = mx.tril(mx.ones((T, S), mx.bool_), S - T)[None, None]
    if isinstance(mask, mx.array):
        seen = mx.array(mask.dtype == mx.bool_, mask.dtype)  # True, or 0 where the mask is added
        mask = mx.pad(mask, [(0, 0)] * 3 + [(J, 0)], constant_values=seen)
    return attention(q_BNTD, k_BKSD, v_BKSD, mask, scale)


def mix(
    mixer: str, spec: DecoderSpec, q_BNTD: mx.array, k_BKTD: mx.array, v_BKTD: mx.array, segments_BT: mx.array | None,
    scale: float, sinks: Sinks,
) -> mx.array:  # fmt: skip
    """One layer's attention over whole rows, (B, N, T, D); documents (`segments_BT`) do not see each other."""
    T = q_BNTD.shape[2]
    if mixer == "local" and spec.window < T:
        return _local(q_BNTD, k_BKTD, v_BKTD, spec.window, segments_BT, scale, sinks)
    if mixer == "strided":
        return _strided(q_BNTD, k_BKTD, v_BKTD, spec.stride, segments_BT, scale, sinks)
    if mixer == "fixed" and spec.fixed.local_context < T:
        return _fixed(q_BNTD, k_BKTD, v_BKTD, spec, scale, sinks)
    is_causal = mixer != "bidirectional"
    if segments_BT is None:
        return attend(q_BNTD, k_BKTD, v_BKTD, "causal" if is_causal else None, scale, sinks)
    same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return attend(q_BNTD, k_BKTD, v_BKTD, mx.tril(same) if is_causal else same, scale, sinks)


def _local(
    q_BNTD: mx.array,
    k_BKTD: mx.array,
    v_BKTD: mx.array,
    W: int,
    segments_BT: mx.array | None,
    scale: float,
    sinks: Sinks,
) -> mx.array:
    """Blocks of W queries look at their own block and the one before."""
    B, _, T, _ = q_BNTD.shape
    q, k, v = (_blocks(x, W) for x in (q_BNTD, k_BKTD, v_BKTD))  # (B, U, heads, W, D)
    U = q.shape[1]
    places = mx.arange(2 * W)
    distance = places[:W, None] + W - places[None]
    before_the_start = (mx.arange(U) == 0)[:, None, None] & (places < W)
    mask_UWS = (distance >= 0) & (distance < W) & ~before_the_start
    mask_BU1WS = mx.broadcast_to(mask_UWS[None, :, None], (B, U, 1, W, 2 * W))
    if segments_BT is not None:
        segments = _blocks(segments_BT[:, None, :, None], W)[..., 0]  # (B, U, 1, W)
        mask_BU1WS = mask_BU1WS & (segments[..., None] == with_previous(segments, 3)[..., None, :])
    out = _each_block(q, with_previous(k, 3), with_previous(v, 3), mask_BU1WS, scale, sinks)
    return _joined(out, T)


def _strided(
    q_BNTD: mx.array,
    k_BKTD: mx.array,
    v_BKTD: mx.array,
    stride: int,
    segments_BT: mx.array | None,
    scale: float,
    sinks: Sinks,
) -> mx.array:
    """Tokens of one residue class are a row of their own, with causal attention."""
    T = q_BNTD.shape[2]
    q, k, v = (_blocks(x, stride).transpose(0, 3, 2, 1, 4).flatten(0, 1) for x in (q_BNTD, k_BKTD, v_BKTD))
    mask: mx.array | str = "causal"
    if segments_BT is not None:
        segments = _blocks(segments_BT[:, None, :, None], stride).transpose(0, 3, 2, 1, 4).flatten(0, 1)[..., 0]
        mask = mx.tril(segments[..., None] == segments[..., None, :])
    out = attend(q, k, v, mask, scale, sinks)
    return _joined(mx.unflatten(out, 0, (-1, stride)).transpose(0, 3, 2, 1, 4), T)


def _fixed(
    q_BNTD: mx.array, k_BKTD: mx.array, v_BKTD: mx.array, spec: DecoderSpec, scale: float, sinks: Sinks
) -> mx.array:
    """Segments look at themselves, causally, and at the summary tokens of the segments before."""
    B, N, T, _ = q_BNTD.shape
    pattern, G = spec.fixed, spec.fixed.local_context
    k_BNTD, v_BNTD = (for_heads(x, N, dim=1) for x in (k_BKTD, v_BKTD))
    q, k, v = (_blocks(x, G) for x in (q_BNTD, k_BNTD, v_BNTD))  # (B, U, N, G, D)
    U = q.shape[1]
    is_summary = pattern.summaries(N).repeat(pattern.block_size, axis=1)  # (N, G)
    index_NM = mx.array(is_summary.nonzero()[1].reshape(N, -1).astype(np.int32))
    per_segment = index_NM.shape[1]

    def summaries(x: mx.array) -> mx.array:
        """Of all segments, for the queries of each: (B, U, N, U * per_segment, D)."""
        chosen = mx.take_along_axis(x, index_NM[None, None, :, :, None], axis=3).swapaxes(1, 2).flatten(2, 3)
        return mx.broadcast_to(chosen[:, None], (B, U, *chosen.shape[1:]))

    segment = mx.arange(U)
    earlier = mx.broadcast_to(
        (mx.repeat(segment, per_segment)[None] < segment[:, None])[:, None], (U, G, U * per_segment)
    )
    own = mx.broadcast_to(mx.tril(mx.ones((G, G), mx.bool_)), (U, G, G))
    both = mx.concatenate([earlier, own], axis=-1)[None, :, None]
    mask = mx.broadcast_to(both, (B, *both.shape[1:]))
    keys, values = (mx.concatenate([summaries(x), x], axis=3) for x in (k, v))
    return _joined(_each_block(q, keys, values, mask, scale, sinks), T)


def for_heads(x: mx.array, num_heads: int, dim: int = 0) -> mx.array:
    """Key/value heads repeated for so many heads."""
    return mx.repeat(x, num_heads // x.shape[dim], axis=dim)


def _each_block(q: mx.array, k: mx.array, v: mx.array, mask: mx.array, scale: float, sinks: Sinks) -> mx.array:
    """Attention within each of the blocks, all (B, U, ...)."""
    B = q.shape[0]
    q, k, v, mask = (x.flatten(0, 1) for x in (q, k, v, mask))
    out = attend(q, k, v, mask, scale, sinks)
    return mx.unflatten(out, 0, (B, -1))


def _blocks(x_BNTD: mx.array, size: int) -> mx.array:
    """(B, U, N, size, D), zeros at the end where T is no multiple."""
    x = mx.pad(x_BNTD, [(0, 0), (0, 0), (0, -x_BNTD.shape[2] % size), (0, 0)])
    return mx.unflatten(x, 2, (-1, size)).swapaxes(1, 2)


def _joined(x_BUNWD: mx.array, T: int) -> mx.array:
    """(B, N, T, D) from blocks."""
    return x_BUNWD.swapaxes(1, 2).flatten(2, 3)[:, :, :T]


def with_previous(x: mx.array, dim: int) -> mx.array:
    """Each block (dimension 1) after the one before it, joined along `dim`."""
    previous = mx.pad(x, [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))[:, :-1]
    return mx.concatenate([previous, x], axis=dim)
