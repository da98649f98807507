"""How texts are generated, and the choice of the next tokens from logits: in NumPy, the same for every backend.

Filters act in Hugging Face's order: repetition penalty, temperature, top-k, top-p, min-p; each sees what the one before
it has left. What is drawn is a function of (seed, row, position): a row's text depends neither on its neighbours in a
batch nor on the number of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_training.errors import UserError

MAX_NEW_TOKENS = 128  # of a text, unless another number is given


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and where a text ends.

    Raises UserError for a value out of range, and for a filter that greedy would ignore.
    """

    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # only the k most probable tokens
    top_p: float | None = None  # only the fewest tokens that have this probability together (Holtzman et al. 2020)
    min_p: float | None = None  # only tokens at least this times as probable as the most probable one
    repetition_penalty: float = 1.0  # of tokens in the prompt or the text so far (CTRL, Keskar et al. 2019)
    seed: int = 0
    max_new_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()  # a text ends before the first of these

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < np.inf, "0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "above 0 (1: none)"),
            ("seed", self.seed >= 0, "0 or more"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("stop", all(self.stop), "texts that are not empty"),
        ):
            if not good:
                raise UserError(f"{name}: given {getattr(self, name)}; expected {expected}")
        given = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if given and not self.temperature:
            raise UserError(
                f"{', '.join(given)}: temperature 0 always takes the most probable token, which no filter changes; "
                "give a temperature above 0, e.g. 1, or remove it"
            )


def filtered(logits_BV: np.ndarray, sampling: Sampling, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Logits after penalty, temperature and filters, float64 (B, V); -inf where a token cannot come.

    `texts` are each row's tokens so far, the prompt's included.
    """
    x_BV = logits_BV.astype(np.float64)
    if sampling.repetition_penalty != 1:
        seen_BV = np.zeros(x_BV.shape, bool)
        for seen, text in zip(seen_BV, texts, strict=True):
            seen[np.asarray(text, np.int64)] = True
        penalised = np.where(x_BV > 0, x_BV / sampling.repetition_penalty, x_BV * sampling.repetition_penalty)
        x_BV = np.where(seen_BV, penalised, x_BV)
    if sampling.temperature:
        x_BV = x_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < x_BV.shape[-1]:
        least = np.partition(x_BV, -sampling.top_k)[:, -sampling.top_k, None]
        x_BV = np.where(x_BV < least, -np.inf, x_BV)
    if sampling.top_p is not None and sampling.top_p < 1:
        p_BV = softmax(x_BV)
        ascending_BV = np.sort(p_BV, axis=-1)
        dropped_B = (ascending_BV.cumsum(-1) <= 1 - sampling.top_p).sum(-1, keepdims=True)
        least = np.take_along_axis(ascending_BV, np.minimum(dropped_B, p_BV.shape[-1] - 1), -1)
        x_BV = np.where(p_BV < least, -np.inf, x_BV)
    if sampling.min_p:
        p_BV = softmax(x_BV)
        x_BV = np.where(p_BV < sampling.min_p * p_BV.max(-1, keepdims=True), -np.inf, x_BV)
    return x_BV


def choose(
    logits_BV: np.ndarray,
    sampling: Sampling,
    rows: Sequence[int],
    positions: Sequence[int],
    texts: Sequence[Sequence[int]],
) -> np.ndarray:
    """The next token of every row, int64 (B,), where `positions` count each row's new tokens from 0."""
    x_BV = filtered(logits_BV, sampling, texts)
    if not sampling.temperature:
        return x_BV.argmax(-1)
    cumulative_BV = softmax(x_BV).cumsum(-1)
    places = zip(rows, positions, strict=True)
    uniform_B = np.array([np.random.default_rng([sampling.seed, row, place]).random() for row, place in places])
    return (cumulative_BV > uniform_B[:, None] * cumulative_BV[:, -1:]).argmax(-1)


def softmax(x_BV: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis."""
    weights = np.exp(x_BV - x_BV.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
