"""Whole documents packed into rows, so that no place is spent on padding and no document sees another."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.data.token_cache import TokenStream
from mlx_training.errors import DataError


@dataclass(frozen=True)
class PackedRow:
    """The documents of a row; of each, its inputs and, last, the one token that is only a target."""

    documents: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(document.size - 1 for document in self.documents)

    def tobytes(self) -> bytes:
        """The tokens, for comparisons."""
        return b"|".join(document.tobytes() for document in self.documents)


class PackedDocuments(Sequence[PackedRow]):
    """Rows of `context_length` places that hold whole documents; every token but a document's first is a target once.

    EOS is a target only, so it takes no place. A document of more than `context_length` inputs is cut into pieces that
    do not see each other either. Best fit, longest first (Johnson 1974); which document comes first among equals
    depends on `seed`. `reserve`: places to keep free for each document.
    """

    def __init__(self, stream: TokenStream, context_length: int, seed: int, reserve: int = 0) -> None:
        self.tokens, self.context_length = stream.tokens, context_length
        longest = context_length - reserve
        ends = np.append(stream.starts[1:], stream.tokens.size)
        inputs = ends - stream.starts - 1
        if not (inputs > 0).any():
            raise DataError(
                f"a text of {stream.tokens.size} tokens has nothing to predict; a document needs at least 2"
            )
        self.num_cut, self.longest = int((inputs > longest).sum()), int(inputs.max())
        num_pieces = -(-inputs // longest)
        number = np.arange(num_pieces.sum()) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        self._starts = np.repeat(stream.starts, num_pieces) + number * longest
        self._sizes = np.minimum(np.repeat(inputs, num_pieces) - number * longest, longest)
        row_of = _pack(self._sizes + reserve, context_length, seed)
        self._order = np.argsort(row_of, kind="stable")
        self._rows = np.concatenate([[0], np.cumsum(np.bincount(row_of))])

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int -> row; slices are not needed
        if not 0 <= index < len(self):
            raise IndexError(index)
        pieces = self._order[self._rows[index] : self._rows[index + 1]]
        spans = [(self._starts[piece], self._sizes[piece] + 1) for piece in pieces]
        return PackedRow(tuple(self.tokens[start : start + size] for start, size in spans))

    @property
    def efficiency(self) -> float:
        """Share of the places that hold a token."""
        return float(self._sizes.sum()) / (len(self) * self.context_length)

    def collate(self, packed: Sequence[PackedRow], rows: Sequence[int] = ()) -> Batch:
        """Every token predicts the next of its document. `segments` numbers a row's documents, and then its pads."""
        shape = (len(packed), self.context_length)
        tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
        mask = np.zeros(shape, np.float32)
        for b, row in enumerate(packed):
            place = 0
            for number, document in enumerate(row.documents):
                stop = place + document.size - 1
                tokens[b, place:stop], targets[b, place:stop] = document[:-1], document[1:]
                segments[b, place:stop], mask[b, place:stop] = number, 1
                place = stop
            segments[b, place:] = len(row.documents)
        lengths = np.array([len(row) for row in packed], np.int32)
        return Batch(tokens, targets, mask, lengths, segments=segments, rows=tuple(rows))


def warn_of_cut(name: str, packed: PackedDocuments) -> None:
    """Say once that documents were longer than a row."""
    if packed.num_cut:
        print(
            f"note: {name}: {packed.num_cut} documents are longer than the context and are cut into pieces that do not "
            f"see each other (the longest has {packed.longest} tokens, a row {packed.context_length})",
            file=sys.stderr,
        )


def _pack(sizes: np.ndarray, capacity: int, seed: int) -> np.ndarray:
    """The row of each piece."""
    order = np.random.default_rng([seed, 2]).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the number of places that are still free
    free, num_rows = 0, 0  # bit f of `free`: some row has f free places
    found = np.empty(len(sizes), np.int64)
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if fitting := free >> size:
            places = size + (fitting & -fitting).bit_length() - 1
            row = rows[places].pop()
            if not rows[places]:
                free ^= 1 << places
        else:
            row, places, num_rows = num_rows, capacity, num_rows + 1
        found[piece] = row
        if left := places - size:
            rows[left].append(row)
            free |= 1 << left
    return found
