"""Mixing time without a loop over it: scans, chunks and long convolutions, all in float32.

Each takes what was remembered of earlier tokens (None: nothing) and returns what to remember next, so that whole rows
and one token at a time are the same function. No exponent is positive: nothing overflows.

Shape suffixes: B rows, T tokens, D channels, N state, H heads, P head_dim, G groups, R heads of a group, U chunks,
Q tokens of a chunk, S earlier tokens, M complex pairs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *given: Tensor) -> Any:
    """`function(*given)`; what it makes on the way is not kept for the backward pass, but made again there."""
    return checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)


def linear_scan(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t * h_(t-1) + b_t along dimension 1, from h_0 = b_0; `a` may broadcast over the last dimensions.

    Pairs of steps are joined into one and their scan is half as long (Blelloch 1990): log2(T) rounds of linear work in
    all, and only products of decays.
    """
    T = b.shape[1]
    if T == 1:
        return b
    if T % 2:
        h = linear_scan(a[:, :-1], b[:, :-1])
        return torch.cat([h, a[:, -1:] * h[:, -1:] + b[:, -1:]], dim=1)
    a0, a1, b0, b1 = a[:, ::2], a[:, 1::2], b[:, ::2], b[:, 1::2]
    odd = linear_scan(a1 * a0, a1 * b0 + b1)
    even = torch.cat([b0[:, :1], a0[:, 1:] * odd[:, :-1] + b0[:, 1:]], dim=1)
    return torch.stack([even, odd], dim=2).flatten(1, 2)


def selective_scan(
    x_BTD: Tensor,
    dt_BTD: Tensor,
    A_DN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_D: Tensor,
    state_BDN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba's recurrence (Gu & Dao 2023), y (B, T, D) and the last state: h = exp(dt A) h + dt B x, y = C h + D x.

    States of all tokens stand side by side, B * T * D * N numbers, for one layer at a time (`recomputed`).
    """
    decay_BTDN = torch.exp(dt_BTD[..., None] * A_DN)
    inputs_BTDN = (dt_BTD * x_BTD)[..., None] * B_BTN[:, :, None]
    states_BTDN = linear_scan(decay_BTDN, _continued(decay_BTDN, inputs_BTDN, state_BDN))
    y_BTD = (states_BTDN @ C_BTN[..., None])[..., 0]
    return y_BTD + D_D * x_BTD, states_BTDN[:, -1]


def ssd(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor, size: int,
    state_BGRPN: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba-2's recurrence (Dao & Gu 2024), y (B, T, H, P) and the last state: products within chunks, a scan between.

    The same recurrence as Mamba's, with one decay a head and a state of P x N numbers.
    """
    (B, T, H, P), G = x_BTHP.shape, B_BTGN.shape[2]
    Q = min(size, T)
    log_decay = _chunks((dt_BTH * A_H).unflatten(2, (G, -1)), Q).permute(0, 1, 3, 4, 2)  # (B, U, G, R, Q)
    weighted = (dt_BTH[..., None] * x_BTHP).unflatten(2, (G, -1))
    x = _chunks(weighted, Q).permute(0, 1, 3, 4, 2, 5)  # (B, U, G, R, Q, P)
    keys, queries = (_chunks(z, Q).transpose(2, 3) for z in (B_BTGN, C_BTGN))  # (B, U, G, Q, N)
    decay = torch.exp(_sums_between(log_decay))  # (B, U, G, R, Q, Q)
    scores = queries @ keys.transpose(-1, -2)
    y = (scores[:, :, :, None] * decay) @ x
    added = (x * decay[..., -1, :, None]).transpose(-1, -2) @ keys[:, :, :, None]  # (B, U, G, R, P, N)
    of_chunk = torch.exp(log_decay.sum(-1))[..., None, None]
    after = linear_scan(of_chunk, _continued(of_chunk, added, state_BGRPN))
    first = torch.zeros_like(after[:, :1]) if state_BGRPN is None else state_BGRPN[:, None]
    before = torch.cat([first, after[:, :-1]], dim=1)
    from_start = torch.exp(log_decay.cumsum(-1))[..., None]
    y = y + from_start * (queries[:, :, :, None] @ before.transpose(-1, -2))
    y_BTHP = y.permute(0, 1, 4, 2, 3, 5).reshape(B, -1, H, P)[:, :T]
    return y_BTHP + D_H[:, None] * x_BTHP, after[:, -1]


def diagonal_ssm(
    u_BTD: Tensor, dt_D: Tensor, A_DM: tuple[Tensor, ...], C_DM: tuple[Tensor, ...], D_D: Tensor,
    state_BDM: tuple[Tensor, ...] | None, keep: bool,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:  # fmt: skip
    """S4D (Gu et al. 2022, zero-order hold), y (B, T, D) and, to `keep`, the last state. Complex: (real, imaginary).

    y = 2 Re(C h) + D u with h = exp(dt A) h + (exp(dt A) - 1) / A u: a convolution with 2 Re(C (exp(dt A) - 1) / A
    exp(dt A l)).
    """
    (real, imaginary), T = A_DM, u_BTD.shape[1]
    lags = torch.arange(T + 1, device=u_BTD.device, dtype=torch.float32)
    shrink, turn = dt_D[:, None] * real, dt_D[:, None] * imaginary
    size, angle = torch.exp(shrink[..., None] * lags), turn[..., None] * lags  # (D, M, T + 1)
    powers = size * torch.cos(angle), size * torch.sin(angle)
    # exp(dt A) - 1 without cancelling where dt is small
    less_one = torch.expm1(shrink) * torch.cos(turn) - 2 * torch.sin(turn / 2).square()
    step = less_one, torch.exp(shrink) * torch.sin(turn)
    norm = real.square() + imaginary.square()
    held = (step[0] * real + step[1] * imaginary) / norm, (step[1] * real - step[0] * imaginary) / norm
    c = tuple(2 * part for part in _times(C_DM, held))
    kernel_DT = (c[0][..., None] * powers[0] - c[1][..., None] * powers[1]).sum(1)[:, :T]
    y_BTD = long_convolution(u_BTD, kernel_DT.transpose(0, 1)) + D_D * u_BTD
    if state_BDM is not None:
        seen = _times(c, state_BDM)  # (B, D, M)
        parts = (torch.einsum("bdm,dmt->btd", s, power[..., 1:]) for s, power in zip(seen, powers, strict=True))
        y_BTD = y_BTD + next(parts) - next(parts)
    if not keep:
        return y_BTD, None
    reversed_DTB = u_BTD.flip(1).permute(2, 1, 0)
    state = tuple((power[..., :T] @ reversed_DTB).permute(2, 0, 1) for power in powers)
    if state_BDM is not None:
        kept = _times(state_BDM, (powers[0][..., T], powers[1][..., T]))
        state = tuple(old + new for old, new in zip(kept, state, strict=True))
    return y_BTD, state


def long_convolution(x_BTD: Tensor, kernel_SD: Tensor) -> Tensor:
    """y_t = sum over lags l of kernel_l * x_(t-l), by the fast Fourier transform (B, T, D)."""
    T = x_BTD.shape[1]
    size = 1 << max(T + kernel_SD.shape[0] - 2, 1).bit_length()  # a power of two that nothing wraps around in
    spectrum = torch.fft.rfft(x_BTD, n=size, dim=1) * torch.fft.rfft(kernel_SD, n=size, dim=0)
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, :T]


def filtered(x_BTD: Tensor, kernel_SD: Tensor, past_BSD: Tensor | None) -> tuple[Tensor, Tensor]:
    """A convolution with a kernel of fixed length, and the inputs that it still needs: one fewer than its length."""
    x = x_BTD if past_BSD is None else torch.cat([past_BSD, x_BTD], dim=1)
    num_new, S = x_BTD.shape[1], kernel_SD.shape[0]
    kernel_SD = kernel_SD[: x.shape[1]]
    if num_new == 1:
        y = (x[:, -kernel_SD.shape[0] :] * kernel_SD.flip(0)).sum(1, keepdim=True)
    else:
        y = long_convolution(x, kernel_SD)[:, -num_new:]
    return y, x[:, max(x.shape[1] - S + 1, 0) :]


def short_convolution(
    x_BTD: Tensor, weight_DK: Tensor, bias_D: Tensor, past_BSD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A causal depthwise convolution with a kernel of few taps, the last of them at the token itself."""
    T, taps = x_BTD.shape[1], weight_DK.shape[1]
    past = x_BTD.new_zeros(x_BTD.shape[0], taps - 1, x_BTD.shape[2]) if past_BSD is None else past_BSD
    padded = torch.cat([past, x_BTD], dim=1)
    y = bias_D + sum(padded[:, tap : tap + T] * weight_DK[:, tap] for tap in range(taps))
    return y, padded[:, T:]


def _continued(decay: Tensor, inputs: Tensor, state: Tensor | None) -> Tensor:
    """The inputs of a scan that starts from a state (without the time dimension)."""
    if state is None:
        return inputs
    return torch.cat([inputs[:, :1] + decay[:, :1] * state[:, None], inputs[:, 1:]], dim=1)


def _chunks(x: Tensor, Q: int) -> Tensor:
    """(B, U, Q, ...), zeros at the end where T is no multiple."""
    padding = (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % Q)
    return F.pad(x, padding).unflatten(1, (-1, Q))


def _sums_between(x: Tensor) -> Tensor:
    """(..., Q, Q): at [i, j] the sum of x after j up to i, -inf where j > i. Summed, never subtracted: that cancels."""
    Q = x.shape[-1]
    ones = torch.ones(Q, Q, dtype=torch.bool, device=x.device)
    sums = torch.where(ones.tril(-1), x[..., None], 0.0).cumsum(-2)
    return torch.where(ones.tril(), sums, -torch.inf)


def _times(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Product of complex numbers."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]
