"""One parameter's update under every optimiser, in pure functions; `mlx_training.optim` has the definitions."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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

State = dict[str, Tensor]


class Clock(NamedTuple):
    """What is the same for all parameters in a step."""

    counts: Tensor  # boolean: whether the step is taken
    filled: tuple[Tensor, Tensor]  # 1 - beta^t: how full Adam's two means are, which began at zero
    beta: Tensor  # of Adafactor's means

    def kept(self, new: Tensor, old: Tensor) -> Tensor:
        """The new array of a step that counts, else the old one."""
        return torch.where(self.counts, new, old)


Rule = Callable[[Optim, Tensor, State, Clock], tuple[Tensor, State]]


def clock(o: Optim, t: Tensor, counts: Tensor) -> Clock:
    """For step `t` (from 1)."""
    return Clock(counts, (_filled(o.betas[0], t), _filled(o.betas[1], t)), 1 - t**ADAFACTOR_DECAY)


def updated(
    o: Optim, param: Param, p: Tensor, g: Tensor, state: State, clock: Clock, rate: float
) -> tuple[Tensor, State]:
    """A parameter and its state after a step with a gradient that is clipped already; as before if it is not taken."""
    rule, decay, rate = o.rule(param), o.decay(param), rate * o.rate_factor(param)
    shrunk = p
    if decay and rule in COUPLED:
        g = g + decay * p
    elif decay:
        shrunk = p * (1 - rate * decay)
    move, state = RULES[rule](o, g, state, clock)
    return clock.kept(shrunk - rate * move, p), state


def adam(o: Optim, g: Tensor, state: State, clock: Clock) -> tuple[Tensor, State]:
    """For a rate of 1, like all that follow."""
    (b1, b2), (filled_m, filled_v) = o.betas, clock.filled
    m = clock.kept(b1 * state["m"] + (1 - b1) * g, state["m"])
    v = clock.kept(b2 * state["v"] + (1 - b2) * g.square(), state["v"])
    return m / filled_m / (torch.sqrt(v / filled_v) + o.eps), {"m": m, "v": v}


def sgd(o: Optim, g: Tensor, state: State, clock: Clock) -> tuple[Tensor, State]:
    if not o.momentum:
        return g, {}
    m = clock.kept(o.momentum * state["m"] + g, state["m"])
    return g + o.momentum * m if o.nesterov else m, {"m": m}


def adagrad(o: Optim, g: Tensor, state: State, clock: Clock) -> tuple[Tensor, State]:
    v = clock.kept(state["v"] + g.square(), state["v"])
    return g / (torch.sqrt(v) + o.eps), {"v": v}


def rmsprop(o: Optim, g: Tensor, state: State, clock: Clock) -> tuple[Tensor, State]:
    v = clock.kept(o.alpha * state["v"] + (1 - o.alpha) * g.square(), state["v"])
    move = g / (torch.sqrt(v) + o.eps)
    if not o.momentum:
        return move, {"v": v}
    m = clock.kept(o.momentum * state["m"] + move, state["m"])
    return m, {"m": m, "v": v}


def lion(o: Optim, g: Tensor, state: State, clock: Clock) -> tuple[Tensor, State]:
    b1, b2 = o.betas
    m = clock.kept(b2 * state["m"] + (1 - b2) * g, state["m"])
    return torch.sign(b1 * state["m"] + (1 - b1) * g), {"m": m}


def adafactor(o: Optim, g: Tensor, state: State, clock: Clock) -> tuple[Tensor, State]:
    beta, square = clock.beta, g.square() + o.eps
    if "v" in state:
        state = {"v": clock.kept(beta * state["v"] + (1 - beta) * square, state["v"])}
        move = g * torch.rsqrt(state["v"])
    else:
        means = {key: beta * state[key] + (1 - beta) * square.mean(axis) for key, axis in (("row", -1), ("col", -2))}
        state = {key: clock.kept(mean, state[key]) for key, mean in means.items()}
        row, col = state["row"], state["col"]
        share = row / row.mean(-1, keepdim=True)
        move = g * torch.rsqrt(share)[..., None] * torch.rsqrt(col)[..., None, :]
    return move / (torch.sqrt(move.square().mean()) / ADAFACTOR_CLIP).clamp(min=1.0), state


def muon(o: Optim, g: Tensor, state: State, clock: Clock) -> tuple[Tensor, State]:
    m = clock.kept(o.momentum * state["m"] + (1 - o.momentum) * g, state["m"])
    move = o.momentum * m + (1 - o.momentum) * g if o.nesterov else m
    return MUON_SCALE * max(g.shape[-2:]) ** 0.5 * orthogonal(move), {"m": m}


def orthogonal(x: Tensor) -> Tensor:
    """Each matrix (the last two axes) with its singular values brought near 1, by Newton-Schulz steps."""
    a, b, c = MUON_COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (torch.sqrt(x.square().sum((-2, -1), keepdim=True)) + MUON_EPS)
    for _ in range(MUON_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if is_tall else x


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


def averaging(o: Optim, t: Tensor) -> Tensor:
    """How far the averages move to the weights of step `t` (from 1)."""
    assert o.ema_decay is not None
    return (1 - o.ema_decay) / _filled(o.ema_decay, t)


def _filled(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t by way of expm1, as float32 has no digits left near 1."""
    return -torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t)
