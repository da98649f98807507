"""Every optimiser in NumPy, float64: what the doctor and the tests hold the two realisations against."""

from collections.abc import Callable

import numpy as np

from mlx_training.backend import Arrays
from mlx_training.optim import (
    ADAFACTOR_CLIP,
    ADAFACTOR_DECAY,
    COUPLED,
    MUON_COEFFICIENTS,
    MUON_EPS,
    MUON_SCALE,
    MUON_STEPS,
    Optim,
)
from mlx_training.spec import Param

Moved = tuple[np.ndarray, Arrays]
Rule = Callable[[Optim, np.ndarray, Arrays, int], Moved]


class EpsInside(Optim):
    """A known mistake: eps under the square root instead of beside it."""


def updated(o: Optim, param: Param, p: np.ndarray, g: np.ndarray, state: Arrays, t: int, rate: float) -> Moved:
    """A parameter and its state after step `t` (from 1) with a gradient that is clipped already."""
    p, g = p.astype(np.float64), g.astype(np.float64)
    state = {key: array.astype(np.float64) for key, array in state.items()}
    rule, decay, rate = o.rule(param), o.decay(param), rate * o.rate_factor(param)
    if decay and rule in COUPLED:
        g = g + decay * p
    elif decay:
        p = p * (1 - rate * decay)
    move, state = RULES[rule](o, g, state, t)
    return p - rate * move, state


def adam(o: Optim, g: np.ndarray, state: Arrays, t: int) -> Moved:
    """Kingma & Ba 2015; also AdamW's, whose decay stands outside."""
    b1, b2 = o.betas
    m, v = b1 * state["m"] + (1 - b1) * g, b2 * state["v"] + (1 - b2) * g**2
    return m / (1 - b1**t) / _root(o, v / (1 - b2**t)), {"m": m, "v": v}


def sgd(o: Optim, g: np.ndarray, state: Arrays, t: int) -> Moved:
    """With or without momentum (Polyak's, or Nesterov's as PyTorch has it)."""
    if not o.momentum:
        return g, {}
    m = o.momentum * state["m"] + g
    return g + o.momentum * m if o.nesterov else m, {"m": m}


def adagrad(o: Optim, g: np.ndarray, state: Arrays, t: int) -> Moved:
    """Duchi et al. 2011; the sum of squares starts at zero."""
    v = state["v"] + g**2
    return g / _root(o, v), {"v": v}


def rmsprop(o: Optim, g: np.ndarray, state: Arrays, t: int) -> Moved:
    """Tieleman & Hinton 2012, without centring; momentum is of the scaled gradient."""
    v = o.alpha * state["v"] + (1 - o.alpha) * g**2
    move = g / _root(o, v)
    if not o.momentum:
        return move, {"v": v}
    m = o.momentum * state["m"] + move
    return m, {"m": m, "v": v}


def lion(o: Optim, g: np.ndarray, state: Arrays, t: int) -> Moved:
    """Chen et al. 2023: the sign of one mean of the gradients, while another is kept."""
    b1, b2 = o.betas
    return np.sign(b1 * state["m"] + (1 - b1) * g), {"m": b2 * state["m"] + (1 - b2) * g}


def adafactor(o: Optim, g: np.ndarray, state: Arrays, t: int) -> Moved:
    """Shazeer & Stern 2018: mean squares as an outer product of rows and columns, the update's RMS clipped."""
    beta, square = 1 - t**ADAFACTOR_DECAY, g**2 + o.eps
    if "v" in state:
        state = {"v": beta * state["v"] + (1 - beta) * square}
        move = g / np.sqrt(state["v"])
    else:
        row, col = (beta * state[k] + (1 - beta) * square.mean(axis) for k, axis in (("row", -1), ("col", -2)))
        state = {"row": row, "col": col}
        share = row / row.mean(-1, keepdims=True)
        move = g / np.sqrt(share)[..., None] / np.sqrt(col)[..., None, :]
    return move / max(1.0, float(np.sqrt(np.mean(move**2))) / ADAFACTOR_CLIP), state


def muon(o: Optim, g: np.ndarray, state: Arrays, t: int) -> Moved:
    """Jordan 2024: momentum, made nearly orthogonal."""
    m = o.momentum * state["m"] + (1 - o.momentum) * g
    move = o.momentum * m + (1 - o.momentum) * g if o.nesterov else m
    return MUON_SCALE * max(g.shape[-2:]) ** 0.5 * orthogonal(move), {"m": m}


def orthogonal(x: np.ndarray) -> np.ndarray:
    """Each matrix (the last two axes) with its singular values brought near 1, by Newton-Schulz steps."""
    a, b, c = MUON_COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    x = np.swapaxes(x, -1, -2) if is_tall else x
    x = x / (np.sqrt(np.sum(x**2, (-2, -1), keepdims=True)) + MUON_EPS)
    for _ in range(MUON_STEPS):
        square = x @ np.swapaxes(x, -1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return np.swapaxes(x, -1, -2) if is_tall else x


RULES: dict[str, Rule] = {
    "adamw": adam,
    "adam": adam,
    "sgd": sgd,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "lion": lion,
    "adafactor": adafactor,
    "muon": muon,
}


def _root(o: Optim, v: np.ndarray) -> np.ndarray:
    return np.sqrt(v + o.eps) if isinstance(o, EpsInside) else np.sqrt(v) + o.eps
