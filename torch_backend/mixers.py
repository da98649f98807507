"""Sparse attention that costs what it looks at: no T x T scores, and none masked away that could be left out.

Shape suffixes: B rows, T tokens, N heads, K key/value heads, D head_dim, W window, J sinks, U blocks or segments,
G tokens of a segment, M summary tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_training.spec import DecoderSpec
from torch_backend.layers import attention

Sinks = tuple[Tensor, Tensor] | None  # keys and values (K, J, D) that every query sees


def attend(
    q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | str | None, scale: float, sinks: Sinks
) -> Tensor:
    """Attention to keys and, before them, to the sinks, which no mask hides."""
    if sinks is None:
        return attention(q_BNTD, k_BKSD, v_BKSD, mask, scale)
    (B, _, T, _), S, J = q_BNTD.shape, k_BKSD.shape[2], sinks[0].shape[1]
    k_BKSD, v_BKSD = (
        torch.cat([for_heads(sink, x.shape[1])[None].expand(B, -1, -1, -1).to(x.dtype), x], dim=2)
        for sink, x in zip(sinks, (k_BKSD, v_BKSD), strict=True)
    )
    if isinstance(mask, str):
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BNTD.device).tril(S - T)[None, None]
    if isinstance(mask, Tensor):
        mask = F.pad(mask, (J, 0), value=True if mask.dtype == torch.bool else 0.0)
    return attention(q_BNTD, k_BKSD, v_BKSD, mask, scale)


def mix(
    mixer: str, spec: DecoderSpec, q_BNTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, segments_BT: Tensor | None,
    scale: float, sinks: Sinks,
) -> Tensor:  # fmt: skip
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
    if not segments_BT.is_cpu or torch.compiler.is_compiling():  # lengths would be waited for, or be traced anew
        same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
        return attend(q_BNTD, k_BKTD, v_BKTD, same.tril() if is_causal else same, scale, sinks)
    return _each_document(q_BNTD, k_BKTD, v_BKTD, segments_BT, "causal" if is_causal else None, scale, sinks)


def _each_document(
    q_BNTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, segments_BT: Tensor, mask: str | None, scale: float, sinks: Sinks
) -> Tensor:
    """Attention within each of the documents, one after another: no mask, and no scores between two of them."""
    B, T = segments_BT.shape
    starts_BT = F.pad(segments_BT[:, 1:] != segments_BT[:, :-1], (1, 0), value=True)
    lengths = torch.diff(starts_BT.flatten().nonzero()[:, 0], append=torch.tensor([B * T])).tolist()
    q, k, v = (x.transpose(0, 1).flatten(1, 2).split(lengths, dim=1) for x in (q_BNTD, k_BKTD, v_BKTD))
    each = (attend(q[i][None], k[i][None], v[i][None], mask, scale, sinks)[0] for i in range(len(lengths)))
    return torch.cat(list(each), dim=1).unflatten(1, (B, T)).transpose(0, 1)


def _local(
    q_BNTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, W: int, segments_BT: Tensor | None, scale: float, sinks: Sinks
) -> Tensor:
    """Blocks of W queries look at their own block and the one before."""
    B, _, T, _ = q_BNTD.shape
    q, k, v = (_blocks(x, W) for x in (q_BNTD, k_BKTD, v_BKTD))  # (B, U, heads, W, D)
    U = q.shape[1]
    places = torch.arange(2 * W, device=q.device)
    distance = places[:W, None] + W - places[None]
    before_the_start = (torch.arange(U, device=q.device) == 0)[:, None, None] & (places < W)
    mask_BU1WS = ((distance >= 0) & (distance < W) & ~before_the_start).expand(B, U, W, 2 * W)[:, :, None]
    if segments_BT is not None:
        segments = _blocks(segments_BT[:, None, :, None], W)[..., 0]  # (B, U, 1, W)
        mask_BU1WS = mask_BU1WS & (segments[..., None] == with_previous(segments, 3)[..., None, :])
    out = _each_block(q, with_previous(k, 3), with_previous(v, 3), mask_BU1WS, scale, sinks)
    return _joined(out, T)


def _strided(
    q_BNTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, stride: int, segments_BT: Tensor | None, scale: float, sinks: Sinks
) -> Tensor:
    """Tokens of one residue class are a row of their own, with causal attention."""
    T = q_BNTD.shape[2]
    q, k, v = (_blocks(x, stride).permute(0, 3, 2, 1, 4).flatten(0, 1) for x in (q_BNTD, k_BKTD, v_BKTD))
    mask: Tensor | str = "causal"
    if segments_BT is not None:
        segments = _blocks(segments_BT[:, None, :, None], stride).permute(0, 3, 2, 1, 4).flatten(0, 1)[..., 0]
        mask = (segments[..., None] == segments[..., None, :]).tril()
    out = attend(q, k, v, mask, scale, sinks)
    return _joined(out.unflatten(0, (-1, stride)).permute(0, 3, 2, 1, 4), T)


def _fixed(q_BNTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, spec: DecoderSpec, scale: float, sinks: Sinks) -> Tensor:
    """Segments look at themselves, causally, and at the summary tokens of the segments before."""
    B, N, T, _ = q_BNTD.shape
    pattern, G = spec.fixed, spec.fixed.local_context
    k_BNTD, v_BNTD = (for_heads(x, N, dim=1) for x in (k_BKTD, v_BKTD))
    q, k, v = (_blocks(x, G) for x in (q_BNTD, k_BNTD, v_BNTD))  # (B, U, N, G, D)
    U, device = q.shape[1], q.device
    is_summary = torch.from_numpy(pattern.summaries(N).repeat(pattern.block_size, axis=1)).to(device)  # (N, G)
    places_NM = is_summary.nonzero()[:, 1].view(N, -1)
    per_segment = places_NM.shape[1]
    index = places_NM[None, None, :, :, None].expand(B, U, -1, -1, k.shape[-1])

    def summaries(x: Tensor) -> Tensor:
        """Of all segments, for the queries of each: (B, U, N, U * per_segment, D)."""
        chosen = x.gather(3, index[..., : x.shape[-1]]).transpose(1, 2).flatten(2, 3)
        return chosen[:, None].expand(-1, U, -1, -1, -1)

    segment = torch.arange(U, device=device)
    earlier_US = (segment.repeat_interleave(per_segment)[None] < segment[:, None])[:, None].expand(-1, G, -1)
    own_US = torch.ones(G, G, dtype=torch.bool, device=device).tril().expand(U, G, G)
    mask = torch.cat([earlier_US, own_US], dim=-1)[None, :, None].expand(B, -1, -1, -1, -1)
    keys, values = (torch.cat([summaries(x), x], dim=3) for x in (k, v))
    return _joined(_each_block(q, keys, values, mask, scale, sinks), T)


def for_heads(x: Tensor, num_heads: int, dim: int = 0) -> Tensor:
    """Key/value heads repeated for so many heads."""
    return x.repeat_interleave(num_heads // x.shape[dim], dim=dim)


def _each_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, sinks: Sinks) -> Tensor:
    """Attention within each of the blocks, all (B, U, ...)."""
    B = q.shape[0]
    q, k, v, mask = (x.flatten(0, 1) for x in (q, k, v, mask))
    out = attend(q, k, v, mask, scale, sinks)
    return out.unflatten(0, (B, -1))


def _blocks(x_BNTD: Tensor, size: int) -> Tensor:
    """(B, U, N, size, D), zeros at the end where T is no multiple."""
    x = F.pad(x_BNTD, (0, 0, 0, -x_BNTD.shape[2] % size))
    return x.unflatten(2, (-1, size)).transpose(1, 2)


def _joined(x_BUNWD: Tensor, T: int) -> Tensor:
    """(B, N, T, D) from blocks."""
    return x_BUNWD.transpose(1, 2).flatten(2, 3)[:, :, :T]


def with_previous(x: Tensor, dim: int) -> Tensor:
    """Each block (dimension 1) after the one before it, joined along `dim`."""
    previous = F.pad(x, (0, 0) * (x.ndim - 2) + (1, 0))[:, :-1]
    return torch.cat([previous, x], dim=dim)
