"""Param and Spec: a model described without a framework.

A spec is a frozen dataclass of sizes plus a parameter table: the canonical name, shape, initialisation,
weight-decay flag and learning-rate group of every *trainable* parameter. Both backends are built from it and
tested against it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Init = Literal["normal", "uniform", "zeros", "ones", "counts", "log_counts", "time_steps", "pretrained"]


class Param(NamedTuple):
    """One row of the parameter table.

    `hidden` marks a weight between hidden layers, a matrix or a stack of them (experts, out, in): what Muon
    orthogonalises. Embeddings, positions, heads and layers that read raw input are not.
    `scale` is the standard deviation of "normal", the half-width of "uniform", and the step of "counts" (0, 1, 2, ...
    along the last axis); "log_counts" is log 1, log 2, ...; softplus of "time_steps" is log-uniform within [1e-3, 0.1].
    "pretrained" is filled by the backend from the frozen model. Layouts are PyTorch's (Linear: out x in, Conv1d: out x
    in x kernel).
    """

    shape: tuple[int, ...]
    init: Init
    scale: float = 0.0
    decay: bool = True
    group: str = "model"
    hidden: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Spec(ABC):
    """A model's sizes and its parameter table."""

    @abstractmethod
    def params(self) -> dict[str, Param]:
        """Every trainable parameter under its canonical name, in a fixed order."""

    def zero_gradients(self) -> dict[str, slice]:
        """Parts of parameters whose true gradient is always zero: name -> slice of the first axis.

        An attention key bias adds the same number to every score of a query, which softmax ignores; what
        autograd returns there is rounding noise.
        """
        return {}

    @property
    def max_length(self) -> int | None:
        """Most tokens a text may have; None: any number."""
        return None

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only those before it, so that texts can be continued."""
        return True

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.size for p in self.params().values())

    @property
    def groups(self) -> tuple[str, ...]:
        """Learning-rate groups in order of first appearance."""
        return tuple(dict.fromkeys(p.group for p in self.params().values()))


def matrix(init: str, std: float, out_size: int, in_size: int) -> Param:
    """Weight of a hidden Linear: "normal" N(0, std), "uniform" within std, "xavier" (Glorot & Bengio 2010, uniform
    within sqrt(6 / (in + out))) or "kaiming" (He et al. 2015, N(0, 2 / in)).
    """
    rules: dict[str, tuple[Init, float]] = {
        "normal": ("normal", std),
        "uniform": ("uniform", std),
        "xavier": ("uniform", (6 / (in_size + out_size)) ** 0.5),
        "kaiming": ("normal", (2 / in_size) ** 0.5),
    }
    return Param((out_size, in_size), *rules[init], hidden=True)


def linear(name: str, out_size: int, in_size: int, *, group: str, hidden: bool = True) -> Iterator[tuple[str, Param]]:
    """Weight and bias of a Linear as PyTorch initialises it: uniform within 1/sqrt(in), decayed weight only."""
    bound = in_size**-0.5
    yield f"{name}.weight", Param((out_size, in_size), "uniform", bound, True, group, hidden)
    yield f"{name}.bias", Param((out_size,), "uniform", bound, False, group)


def layer_norm(name: str, size: int, *, group: str) -> Iterator[tuple[str, Param]]:
    """Weight (ones) and bias (zeros) of a LayerNorm; never decayed."""
    yield f"{name}.weight", Param((size,), "ones", 0.0, False, group)
    yield f"{name}.bias", Param((size,), "zeros", 0.0, False, group)
