"""Text for language models: streams of tokens cut into windows, and several sources mixed by weight."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.data.batching import MIN_WINDOW_BATCHES, Batches, Transform
from mlx_training.data.packing import PackedDocuments
from mlx_training.errors import DataError


class TextWindows(Sequence[np.ndarray]):
    """Windows of `context_length` + 1 tokens; consecutive windows share one token, so each target comes once.

    The last window may be shorter. A dataset for `Batches` with `encode` = identity and `collate` = `self.collate`.
    """

    def __init__(self, tokens: np.ndarray, context_length: int) -> None:
        if tokens.size < 2:
            raise DataError(f"a text of {tokens.size} tokens has nothing to predict; at least 2 are needed")
        self.tokens = tokens
        self.context_length = context_length

    def __len__(self) -> int:
        return -(-(self.tokens.size - 1) // self.context_length)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int -> window; slices are not needed
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.context_length
        return self.tokens[start : start + self.context_length + 1]

    def collate(self, windows: Sequence[np.ndarray], rows: Sequence[int] = ()) -> Batch:
        """Every place predicts the next token; a short window is padded at its end, unsupervised."""
        shape = (len(windows), self.context_length)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        mask = np.zeros(shape, np.float32)
        for b, window in enumerate(windows):
            length = window.size - 1
            tokens[b, :length], targets[b, :length], mask[b, :length] = window[:-1], window[1:], 1
        lengths = np.array([window.size - 1 for window in windows], np.int32)
        return Batch(tokens, targets, mask, lengths, rows=tuple(rows))


Rows = TextWindows | PackedDocuments


class Mixture(Sequence[Any]):
    """The rows of several sources, one source after another. `weights`: their shares of what training draws.

    An epoch draws as many rows as there are. A source that gives fewer than it has goes on in the next epoch where it
    stopped, so that its rows come equally often; one that gives more begins again.
    """

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float] | None = None) -> None:
        self.sources, self.weights = sources, weights
        self.ends = np.cumsum([len(source) for source in sources])
        self.collate = sources[0].collate

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int -> row; slices are not needed
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.sources[number][int(index - self.ends[number] + len(self.sources[number]))]

    @property
    def tokens(self) -> np.ndarray:
        """All tokens, one source after another."""
        return np.concatenate([source.tokens for source in self.sources])

    def draws(self) -> list[int]:
        """Rows that an epoch draws from each source."""
        if self.weights is None:
            return [len(source) for source in self.sources]
        shares = np.cumsum(self.weights) / np.sum(self.weights)
        return np.diff(np.round(shares * len(self)).astype(int), prepend=0).tolist()

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The rows of an epoch, shuffled: a pure function of the arguments."""
        drawn = []
        for number, (source, count) in enumerate(zip(self.sources, self.draws(), strict=True)):
            places = epoch * count + np.arange(count)
            passes = places // len(source)
            for number_of_pass in range(passes[0], passes[-1] + 1) if count else ():
                shuffled = np.random.default_rng([seed, number_of_pass, 3, number]).permutation(len(source))
                drawn.append(shuffled[places[passes == number_of_pass] % len(source)] + self.ends[number] - len(source))
        return np.random.default_rng([seed, epoch, 0]).permutation(np.concatenate(drawn))


class TextBatches(Batches[Any, Any]):
    """Training batches of text."""

    def __init__(
        self, dataset: Rows | Mixture, batch_size: int, seed: int, transform: Transform[Any] | None = None
    ) -> None:
        super().__init__(
            dataset,
            lambda row: row,
            batch_size,
            seed,
            dataset.collate,
            window=MIN_WINDOW_BATCHES,  # rows of one length need no wider one
            cache=False,
            transform=transform,
        )

    def order(self, epoch: int) -> np.ndarray:
        if isinstance(self.dataset, Mixture) and self.dataset.weights is not None:
            return self.dataset.order(self.seed, epoch)
        return super().order(epoch)
