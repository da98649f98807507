"""SparseK attention (Lou et al. 2024, "Sparser is Faster and Less is More"), made causal.

Every key has a learned score. A query sees its window and, before it, the `num_selected` best-scored keys, which count
with m = clip(score - tau, 0, 1): their softmax weights are multiplied by it, so that the scores learn. tau makes the m
of the selected keys and as many runners-up sum to `num_selected`; all are keys of the query's own past.

Shape suffixes: B rows, T tokens, S keys, N heads, K key/value heads, G query heads of each, D head_dim, C selected
keys, M keys that compete, W window, U blocks of W tokens, J sinks.
"""

import mlx.core as mx

from mlx_training.mlx_backend.mixers import Sinks, with_previous
from mlx_training.spec import DecoderSpec

NUM_HALVINGS = 26  # of an interval of 1: float32 has no more


def sparsek(
    q_BNTD: mx.array, k_BKTD: mx.array, v_BKTD: mx.array, scores_BKT: mx.array, spec: DecoderSpec,
    segments_BT: mx.array | None, scale: float, sinks: Sinks,
) -> mx.array:  # fmt: skip
    """Attention over whole rows (B, N, T, D); documents do not see each other. Never makes T x T scores: memory grows
    with T * (C * D + W).
    """
    (_, K, T, _), W, C = k_BKTD.shape, spec.window, spec.num_selected
    q, k, v = (_padded(x, 2, after=-T % W) for x in (q_BNTD, k_BKTD, v_BKTD))
    scores = _padded(scores_BKT.astype(mx.float32), 2, after=-T % W)
    given = mx.zeros_like(scores[:, 0]) if segments_BT is None else _padded(segments_BT, 1, after=-T % W)
    segments = given.astype(mx.int32)
    places, seen = best_before(scores, 2 * C, W, segments)  # (B, K, T, M)
    competing = mx.unflatten(mx.take_along_axis(scores, places.flatten(2), axis=2), 2, places.shape[2:])
    m = soft_threshold(mx.where(seen, competing, 0.0), seen, C)
    places, far_weights = places[..., :C], m[..., :C]

    def chosen(x: mx.array) -> mx.array:
        found = mx.take_along_axis(x, places.flatten(2)[..., None], axis=2)
        return mx.unflatten(found, 2, (-1, W, places.shape[-1]))  # (B, K, U, W, C, D)

    q = mx.unflatten(mx.unflatten(q, 1, (K, -1)), 3, (-1, W))  # (B, K, G, U, W, D)
    k_far, v_far = chosen(k), chosen(v)
    k_near, v_near = (with_previous(mx.unflatten(x, 2, (-1, W)).swapaxes(1, 2), 3).swapaxes(1, 2) for x in (k, v))
    found = [mx.einsum("bkguwd,bkuwcd->bkguwc", q, k_far), mx.einsum("bkguwd,bkusd->bkguws", q, k_near)]
    weights = [mx.unflatten(far_weights, 2, (-1, W))[:, :, None], _near(segments, W)]
    if sinks is not None:
        found.append(mx.einsum("bkguwd,kjd->bkguwj", q, sinks[0].astype(q.dtype)))
        weights.append(mx.ones(found[-1].shape))
    p = _softmax(found, weights, scale, v.dtype)
    out = mx.einsum("bkguwc,bkuwcd->bkguwd", p[0], v_far) + mx.einsum("bkguws,bkusd->bkguwd", p[1], v_near)
    if sinks is not None:
        out = out + mx.einsum("bkguwj,kjd->bkguwd", p[2], sinks[1].astype(v.dtype))
    return out.flatten(3, 4).flatten(1, 2)[:, :, :T]


def sparsek_cached(
    q_BNTD: mx.array, k_BKSD: mx.array, v_BKSD: mx.array, scores_BKS: mx.array, spec: DecoderSpec,
    mask_B1TS: mx.array, scale: float, sinks: Sinks,
) -> mx.array:  # fmt: skip
    """The same for the last T of S tokens, from their T x S scores; `mask_B1TS`: what each may see at all."""
    T, S, C, K = q_BNTD.shape[2], k_BKSD.shape[2], spec.num_selected, k_BKSD.shape[1]
    places_S = mx.arange(S)
    is_near_TS = places_S[S - T :, None] - places_S < spec.window
    competing = mx.where(mask_B1TS & ~is_near_TS, scores_BKS.astype(mx.float32)[:, :, None], -mx.inf)
    places = mx.argsort(-competing, axis=-1)[..., : 2 * C]
    values = mx.take_along_axis(competing, places, axis=-1)
    seen = mx.isfinite(values)
    m = soft_threshold(mx.where(seen, values, 0.0), seen, C)
    far = mx.put_along_axis(mx.zeros_like(competing), places[..., :C], m[..., :C], axis=-1)
    weights = [(far + (mask_B1TS & is_near_TS))[:, :, None]]
    q = mx.unflatten(q_BNTD, 1, (K, -1))
    found = [mx.einsum("bkgtd,bksd->bkgts", q, k_BKSD)]
    if sinks is not None:
        found.append(mx.einsum("bkgtd,kjd->bkgtj", q, sinks[0].astype(q.dtype)))
        weights.append(mx.ones(found[-1].shape))
    p = _softmax(found, weights, scale, v_BKSD.dtype)
    out = mx.einsum("bkgts,bksd->bkgtd", p[0], v_BKSD)
    if sinks is not None:
        out = out + mx.einsum("bkgtj,kjd->bkgtd", p[1], sinks[1].astype(v_BKSD.dtype))
    return out.flatten(1, 2)


def best_before(scores_BKT: mx.array, count: int, window: int, segments_BT: mx.array) -> tuple[mx.array, mx.array]:
    """Places of the `count` best-scored keys before each query's window, best first, and whether they are there.

    Both (B, K, T, M), M <= count; of equal scores the earlier one is better. Lists of neighbouring stretches are
    merged, each step twice as long: log2 T sorts.
    """
    T = scores_BKT.shape[2]
    values = mx.stop_gradient(scores_BKT)[..., None]
    places = mx.broadcast_to(mx.arange(T)[:, None], values.shape)
    reach = 1
    while reach < T:
        earlier_values, earlier_places = _later(values, places, reach, segments_BT)
        both = mx.concatenate([earlier_values, values], axis=-1)
        order = mx.argsort(-both, axis=-1)[..., :count]
        values = mx.take_along_axis(both, order, axis=-1)
        places = mx.take_along_axis(mx.concatenate([earlier_places, places], axis=-1), order, axis=-1)
        reach *= 2
    values, places = _later(values, places, window, segments_BT)
    return places, mx.isfinite(values)


def soft_threshold(values: mx.array, seen: mx.array, count: int) -> mx.array:
    """SparseK of values (..., M), best first, where they are `seen`: clip(value - tau, 0, 1), which sums to `count`; 1
    where there are no more than `count`. The gradient is that of tau's closed form.
    """
    if values.shape[-1] <= count:
        return seen.astype(mx.float32)
    fixed = mx.stop_gradient(values)
    high = fixed[..., count - 1 : count]
    low = high - 1
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        is_low = mx.where(seen, mx.clip(fixed - middle, 0, 1), 0.0).sum(-1, keepdims=True) > count
        low, high = mx.where(is_low, middle, low), mx.where(is_low, high, middle)
    is_one, is_part = seen & (fixed >= high + 1), seen & (fixed > high) & (fixed < high + 1)
    excess = mx.where(is_part, values, 0.0).sum(-1, keepdims=True) + is_one.sum(-1, keepdims=True) - count
    tau = excess / mx.maximum(is_part.sum(-1, keepdims=True), 1)
    m = mx.where(is_part, values - tau, is_one.astype(mx.float32))
    return mx.where(seen.sum(-1, keepdims=True) <= count, seen.astype(mx.float32), m)


def _softmax(found: list[mx.array], weights: list[mx.array], scale: float, dtype: mx.Dtype) -> list[mx.array]:
    """weight * exp(score) / their sum, over the last dimensions together, in float32."""
    weight = mx.concatenate([mx.broadcast_to(w, x.shape) for w, x in zip(weights, found, strict=True)], axis=-1)
    scores = mx.where(weight > 0, mx.concatenate(found, axis=-1).astype(mx.float32) * scale, -mx.inf)
    p = weight * mx.exp(scores - mx.stop_gradient(scores).max(-1, keepdims=True))
    ends = [sum(x.shape[-1] for x in found[: i + 1]) for i in range(len(found) - 1)]
    return mx.split((p / p.sum(-1, keepdims=True)).astype(dtype), ends, axis=-1)


def _near(segments_BT: mx.array, W: int) -> mx.array:
    """1 where a query sees a key of its own block or the one before, float32 (B, 1, 1, U, W, 2 W)."""
    segments_BUW = mx.unflatten(segments_BT, 1, (-1, W))
    place = mx.arange(2 * W)
    distance = place[:W, None] + W - place
    block = mx.arange(segments_BUW.shape[1])[:, None, None]
    seen_UWS = (distance >= 0) & (distance < W) & ((block > 0) | (place >= W))
    same_BUWS = segments_BUW[..., None] == with_previous(segments_BUW, 2)[:, :, None]
    return (seen_UWS & same_BUWS).astype(mx.float32)[:, None, None]


def _later(values: mx.array, places: mx.array, shift: int, segments_BT: mx.array) -> tuple[mx.array, mx.array]:
    """Each list moved `shift` places on, -inf for keys of another document than the place's own."""
    (_, K, T, _), documents_B1T = values.shape, segments_BT[:, None]
    values, places = (_padded(x, 2, before=shift, value=v)[:, :, :T] for x, v in ((values, -mx.inf), (places, 0)))
    documents = mx.take_along_axis(mx.repeat(documents_B1T, K, axis=1), places.flatten(2), axis=2)
    same = mx.unflatten(documents, 2, places.shape[2:]) == documents_B1T[..., None]
    return mx.where(same, values, -mx.inf), places


def _padded(x: mx.array, axis: int, *, before: int = 0, after: int = 0, value: float = 0) -> mx.array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return mx.pad(x, widths, constant_values=value)
