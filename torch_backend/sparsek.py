"""SparseK attention (Lou et al. 2024, "Sparser is Faster and Less is More"), made causal.

Every key has a learned score. A query sees its window and, before it, the `num_selected` best-scored keys, which count
with m = clip(score - tau, 0, 1): their softmax weights are multiplied by it, so that the scores learn. tau makes the m
of the selected keys and as many runners-up sum to `num_selected`; all are keys of the query's own past.

Shape suffixes: B rows, T tokens, S keys, N heads, K key/value heads, G query heads of each, D head_dim, C selected
keys, M keys that compete, W window, U blocks of W tokens, J sinks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_training.spec import DecoderSpec
from torch_backend.mixers import Sinks, with_previous

NUM_HALVINGS = 26  # of an interval of 1: float32 has no more


def sparsek(
    q_BNTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scores_BKT: Tensor, spec: DecoderSpec, segments_BT: Tensor | None,
    scale: float, sinks: Sinks,
) -> Tensor:  # fmt: skip
    """Attention over whole rows (B, N, T, D); documents do not see each other. Never makes T x T scores: memory grows
    with T * (C * D + W).
    """
    (_, K, T, _), W, C = k_BKTD.shape, spec.window, spec.num_selected
    q, k, v = (F.pad(x, (0, 0, 0, -T % W)) for x in (q_BNTD, k_BKTD, v_BKTD))
    scores = F.pad(scores_BKT.float(), (0, -T % W))
    segments = torch.zeros_like(scores[:, 0]).long() if segments_BT is None else F.pad(segments_BT.long(), (0, -T % W))
    places, seen = best_before(scores, 2 * C, W, segments)  # (B, K, T, M)
    m = soft_threshold(torch.where(seen, scores.gather(2, places.flatten(2)).view_as(places), 0.0), seen, C)
    places, far_weights = places[..., :C], m[..., :C]

    def chosen(x: Tensor) -> Tensor:
        index = places.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
        return x.gather(2, index).view(*places.shape, -1).unflatten(2, (-1, W))  # (B, K, U, W, C, D)

    q = q.unflatten(1, (K, -1)).unflatten(3, (-1, W))  # (B, K, G, U, W, D)
    k_far, v_far = chosen(k), chosen(v)
    k_near, v_near = (with_previous(x.unflatten(2, (-1, W)).transpose(1, 2), 3).transpose(1, 2) for x in (k, v))
    found = [torch.einsum("bkguwd,bkuwcd->bkguwc", q, k_far), torch.einsum("bkguwd,bkusd->bkguws", q, k_near)]
    weights = [far_weights.unflatten(2, (-1, W))[:, :, None], _near(segments, W)]
    if sinks is not None:
        found.append(torch.einsum("bkguwd,kjd->bkguwj", q, sinks[0].to(q.dtype)))
        weights.append(torch.ones_like(found[-1], dtype=torch.float32))
    p = _softmax(found, weights, scale, v.dtype)
    out = torch.einsum("bkguwc,bkuwcd->bkguwd", p[0], v_far) + torch.einsum("bkguws,bkusd->bkguwd", p[1], v_near)
    if sinks is not None:
        out = out + torch.einsum("bkguwj,kjd->bkguwd", p[2], sinks[1].to(v.dtype))
    return out.flatten(3, 4).flatten(1, 2)[:, :, :T]


def sparsek_cached(
    q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scores_BKS: Tensor, spec: DecoderSpec, mask_B1TS: Tensor,
    scale: float, sinks: Sinks,
) -> Tensor:  # fmt: skip
    """The same for the last T of S tokens, from their T x S scores; `mask_B1TS`: what each may see at all."""
    T, S, C, K = q_BNTD.shape[2], k_BKSD.shape[2], spec.num_selected, k_BKSD.shape[1]
    places_S = torch.arange(S, device=k_BKSD.device)
    is_near_TS = places_S[S - T :, None] - places_S < spec.window
    competing = torch.where(mask_B1TS & ~is_near_TS, scores_BKS.float()[:, :, None], -torch.inf)
    values, places = competing.sort(dim=-1, descending=True, stable=True)
    values, places = values[..., : 2 * C], places[..., : 2 * C]
    seen = values.isfinite()
    m = soft_threshold(torch.where(seen, values, 0.0), seen, C)
    far = torch.zeros_like(competing).scatter(-1, places[..., :C], m[..., :C])
    weights = [(far + (mask_B1TS & is_near_TS))[:, :, None]]
    q = q_BNTD.unflatten(1, (K, -1))
    found = [torch.einsum("bkgtd,bksd->bkgts", q, k_BKSD)]
    if sinks is not None:
        found.append(torch.einsum("bkgtd,kjd->bkgtj", q, sinks[0].to(q.dtype)))
        weights.append(torch.ones_like(found[-1], dtype=torch.float32))
    p = _softmax(found, weights, scale, v_BKSD.dtype)
    out = torch.einsum("bkgts,bksd->bkgtd", p[0], v_BKSD)
    if sinks is not None:
        out = out + torch.einsum("bkgtj,kjd->bkgtd", p[1], sinks[1].to(v_BKSD.dtype))
    return out.flatten(1, 2)


def best_before(scores_BKT: Tensor, count: int, window: int, segments_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the `count` best-scored keys before each query's window, best first, and whether they are there.

    Both (B, K, T, M), M <= count; of equal scores the earlier one is better. Lists of neighbouring stretches are
    merged, each step twice as long: log2 T sorts.
    """
    T, device = scores_BKT.shape[2], scores_BKT.device
    values = scores_BKT.detach()[..., None]
    places = torch.arange(T, device=device)[:, None].expand_as(values)
    reach = 1
    while reach < T:
        earlier_values, earlier_places = _later(values, places, reach, segments_BT)
        both = torch.cat([earlier_values, values], -1).sort(dim=-1, descending=True, stable=True)
        values, order = both.values[..., :count], both.indices[..., :count]
        places = torch.cat([earlier_places, places], -1).gather(-1, order)
        reach *= 2
    values, places = _later(values, places, window, segments_BT)
    return places, values.isfinite()


def soft_threshold(values: Tensor, seen: Tensor, count: int) -> Tensor:
    """SparseK of values (..., M), best first, where they are `seen`: clip(value - tau, 0, 1), which sums to `count`; 1
    where there are no more than `count`. The gradient is that of tau's closed form.
    """
    if values.shape[-1] <= count:
        return seen.float()
    fixed = values.detach()
    high = fixed[..., count - 1 : count]
    low = high - 1
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        is_low = torch.where(seen, (fixed - middle).clamp(0, 1), 0.0).sum(-1, keepdim=True) > count
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    is_one, is_part = seen & (fixed >= high + 1), seen & (fixed > high) & (fixed < high + 1)
    excess = torch.where(is_part, values, 0.0).sum(-1, keepdim=True) + is_one.sum(-1, keepdim=True) - count
    tau = excess / is_part.sum(-1, keepdim=True).clamp(min=1)
    m = torch.where(is_part, values - tau, is_one.float())
    return torch.where(seen.sum(-1, keepdim=True) <= count, seen.float(), m)


def _softmax(found: list[Tensor], weights: list[Tensor], scale: float, dtype: torch.dtype) -> list[Tensor]:
    """weight * exp(score) / their sum, over the last dimensions together, in float32."""
    weight = torch.cat([w.expand_as(x) for w, x in zip(weights, found, strict=True)], -1)
    scores = torch.where(weight > 0, torch.cat(found, -1).float() * scale, -torch.inf)
    p = weight * (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return list((p / p.sum(-1, keepdim=True)).to(dtype).split([x.shape[-1] for x in found], -1))


def _near(segments_BT: Tensor, W: int) -> Tensor:
    """1 where a query sees a key of its own block or the one before, float32 (B, 1, 1, U, W, 2 W)."""
    segments_BUW = segments_BT.unflatten(1, (-1, W))
    place = torch.arange(2 * W, device=segments_BT.device)
    distance = place[:W, None] + W - place
    block = torch.arange(segments_BUW.shape[1], device=segments_BT.device)[:, None, None]
    seen_UWS = (distance >= 0) & (distance < W) & ((block > 0) | (place >= W))
    same_BUWS = segments_BUW[..., None] == with_previous(segments_BUW, 2)[:, :, None]
    return (seen_UWS & same_BUWS).float()[:, None, None]


def _later(values: Tensor, places: Tensor, shift: int, segments_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Each list moved `shift` places on, -inf for keys of another document than the place's own."""
    B, K, T, M = values.shape
    values, places = (F.pad(x, (0, 0, shift, 0), value=v)[:, :, :T] for x, v in ((values, -torch.inf), (places, 0)))
    documents = segments_BT[:, None].expand(-1, K, -1).gather(2, places.reshape(B, K, T * M)).view(B, K, T, M)
    return torch.where(documents == segments_BT[:, None, :, None], values, -torch.inf), places
