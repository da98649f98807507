"""Multiple-choice questions about generated series: data for the quick test that needs no download.

Every row is a pure function of (seed, split, index). Answers are exactly balanced within each question
type, and each series is standardised before it gets a random scale and offset, so neither the text nor
the statistics of a series tell the answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from mlx_training.data.rows import Row
from mlx_training.errors import ConfigError

SPLITS = ("train", "validation", "test")
MIN_LENGTH, MAX_LENGTH = 80, 128

OPTION_INTROS = ("Options:", "Choose from", "Pick one:", "Answer with one of")
SERIES_INTROS = ("This is the time series", "Here is the series", "The series", "The measured values")
ANSWER_CUES = ("Answer:", "The answer is", "Your answer:")

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


@dataclass(frozen=True)
class QuestionType:
    """One kind of question: `draw(rng, answer, length)` makes a series to which `options[answer]` applies."""

    name: str
    options: tuple[str, ...]
    wordings: tuple[str, ...]
    draw: Draw


def _noise(rng: np.random.Generator, length: int, low: float, high: float) -> np.ndarray:
    return rng.normal(0.0, rng.uniform(low, high), length)


def _wave(rng: np.random.Generator, length: int, period: float) -> np.ndarray:
    return np.sin(np.arange(length) * (2 * np.pi / period) + rng.uniform(0, 2 * np.pi))


def _trend(rng: np.random.Generator, answer: int, length: int) -> np.ndarray:
    """A slope of either sign or none, under noise and a short ripple."""
    slope = (1.0, -1.0, 0.0)[answer]
    ripple = rng.uniform(0.0, 0.3) * _wave(rng, length, rng.uniform(6, 14))
    return np.linspace(0.0, slope, length) + ripple + _noise(rng, length, 0.05, 0.25)


def _period(rng: np.random.Generator, answer: int, length: int) -> np.ndarray:
    """A wave of about 6, 14 or 36 samples per cycle, under noise."""
    period = rng.uniform(*((5, 8), (12, 17), (30, 44))[answer])
    return _wave(rng, length, period) + _noise(rng, length, 0.05, 0.35)


def _anomaly(rng: np.random.Generator, answer: int, length: int) -> np.ndarray:
    """Noise with a few outlying samples in the first, the middle or the last part, or nowhere."""
    values = rng.normal(0.0, 1.0, length)
    if answer < 3:
        place = rng.uniform(*((0.02, 0.22), (0.42, 0.58), (0.78, 0.98))[answer])
        start, width = int(place * length), int(rng.integers(2, 6))
        values[start : start + width] += rng.choice((-1.0, 1.0)) * rng.uniform(6.0, 10.0)
    return values


def _shift(rng: np.random.Generator, answer: int, length: int) -> np.ndarray:
    """A jump to a higher or lower level somewhere in the inner part, or none, under noise."""
    values = _noise(rng, length, 0.1, 0.35)
    values[int(rng.uniform(0.3, 0.7) * length) :] += (1.0, -1.0, 0.0)[answer]
    return values


def _spread(rng: np.random.Generator, answer: int, length: int) -> np.ndarray:
    """Noise whose standard deviation grows or shrinks by a factor of 4 to 8 around the middle, or stays."""
    values = rng.normal(0.0, 1.0, length)
    change = int(rng.uniform(0.4, 0.6) * length)
    quiet = 1.0 / rng.uniform(4.0, 8.0)
    if answer == 0:
        values[:change] *= quiet
    elif answer == 1:
        values[change:] *= quiet
    return values


QUESTION_TYPES = (
    QuestionType(
        "trend",
        ("rising", "falling", "flat"),
        ("Which trend does the series show?", "What is the overall trend?", "Where is the series heading overall?"),
        _trend,
    ),
    QuestionType(
        "period",
        ("short", "medium", "long"),
        ("How long is one cycle?", "What is the period of the series?", "How long does the pattern take to repeat?"),
        _period,
    ),
    QuestionType(
        "anomaly",
        ("beginning", "middle", "end", "nowhere"),
        ("Where is the anomaly?", "In which part is there an outlier?", "Where does an unusual value appear?"),
        _anomaly,
    ),
    QuestionType(
        "shift",
        ("up", "down", "none"),
        ("Which level shift is there?", "In which direction does the level jump?", "How does the level change?"),
        _shift,
    ),
    QuestionType(
        "variance",
        ("growing", "shrinking", "steady"),
        ("How does the variance develop?", "How does the spread change?", "What happens to the size of the noise?"),
        _spread,
    ),
)


def options_text(rng: np.random.Generator, options: Sequence[str]) -> str:
    """The list of options, in the order given."""
    return f"{OPTION_INTROS[rng.integers(len(OPTION_INTROS))]} {', '.join(options)}."


# Each block of consecutive rows holds every (type, answer) pair equally often, in a random order.
_BLOCK = tuple((kind, k % len(kind.options)) for kind in QUESTION_TYPES for k in range(12))


class QuestionDataset(Sequence[Row]):
    """`num_samples` questions about one generated series each; see `QUESTION_TYPES`.

    Length, noise, wording, order (and for four options: number) of the options, scale and offset of the
    series vary. Splits are independent streams of the same seed; a longer dataset starts with a shorter one's rows.
    """

    def __init__(self, seed: int, split: str, num_samples: int) -> None:
        if split not in SPLITS:
            raise ConfigError(f"split {split!r} of the generated questions: expected one of {', '.join(SPLITS)}")
        if seed < 0 or num_samples < 1:
            raise ConfigError(f"generated questions need seed >= 0 and num_samples >= 1, got {seed} and {num_samples}")
        self.seed, self.split, self.num_samples = seed, split, num_samples
        self._stream = SPLITS.index(split)
        self._orders: dict[int, np.ndarray] = {}  # of blocks that were asked for

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(self.num_samples))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.num_samples))]
        if not -self.num_samples <= index < self.num_samples:
            raise IndexError(index)
        index %= self.num_samples
        kind, answer = self._kind_and_answer(index)
        rng = np.random.default_rng((self.seed, self._stream, 1, index))
        return _make_row(rng, kind, answer, f"{self.split}-{index}")

    def _kind_and_answer(self, index: int) -> tuple[QuestionType, int]:
        block, place = divmod(index, len(_BLOCK))
        if block not in self._orders:
            rng = np.random.default_rng((self.seed, self._stream, 0, block))
            self._orders[block] = rng.permutation(len(_BLOCK)).astype(np.int8)
        return _BLOCK[self._orders[block][place]]


def _make_row(rng: np.random.Generator, kind: QuestionType, answer: int, row_id: str) -> Row:
    length = int(rng.integers(MIN_LENGTH, MAX_LENGTH + 1))
    values = kind.draw(rng, answer, length)
    values = (values - values.mean()) / values.std(ddof=1)
    std = 10.0 ** rng.uniform(-2.0, 3.0)
    mean = std * rng.uniform(-5.0, 5.0)

    shown = rng.permutation(len(kind.options)).tolist()
    if len(shown) > 3 and rng.random() < 0.5:
        shown.remove(next(option for option in shown if option != answer))
    options = tuple(kind.options[option] for option in shown)
    return Row(
        pre_prompt=f"{kind.wordings[rng.integers(len(kind.wordings))]} {options_text(rng, options)}",
        series=((mean + std * values).astype(np.float32),),
        series_text=(SERIES_INTROS[rng.integers(len(SERIES_INTROS))],),
        post_prompt=ANSWER_CUES[rng.integers(len(ANSWER_CUES))],
        answer=kind.options[answer],
        options=options,
        id=row_id,
        type=kind.name,
    )
