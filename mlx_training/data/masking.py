"""Masked language modelling: some tokens of a row are hidden, and told from those on both sides of them.

Devlin et al. 2019 (BERT): of the chosen tokens 80 % become the mask token, 10 % any token, 10 % stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.data.packing import PackedDocuments, PackedRow
from mlx_training.data.text import TextWindows
from mlx_training.data.token_cache import TokenStream
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import DataError

SPELLINGS = ("<mask>", "<|mask|>", "[MASK]")
MASKED, ANY = 0.8, 0.1  # shares of the chosen tokens
FIXED = 5  # of the seeds of evaluation: the same tokens are hidden every time, in every run


@dataclass(frozen=True)
class MaskedRow:
    """A row as the model reads it, the places of the chosen tokens, and what they were."""

    tokens: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    segments: np.ndarray | None = None

    def __len__(self) -> int:
        return self.tokens.size


@dataclass(frozen=True)
class Masking:
    """Hides a share `rate` of a row's tokens, to the nearest number and at least one. BOS and EOS are not chosen."""

    mask_id: int
    special_ids: tuple[int, ...]  # neither chosen nor put in the place of others
    vocab_size: int
    rate: float
    context_length: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, rate: float, context_length: int) -> "Masking":
        """With the tokenizer's own mask token. Raises DataError when it has none."""
        mask_id = next((i for name in SPELLINGS if (i := tokenizer.model.id_of(name)) is not None), None)
        if mask_id is None:
            raise DataError(
                f"training.objective masked: the tokenizer has no token {SPELLINGS[0]}; add it with "
                f'model.tokenizer.special_tokens=["{SPELLINGS[0]}"] (a directory PATH becomes '
                f'model.tokenizer={{load: PATH, special_tokens: ["{SPELLINGS[0]}"]}})'
            )
        known = (mask_id, tokenizer.bos_id, tokenizer.eos_id)
        special_ids = tuple(i for i in known if i is not None)
        return cls(mask_id, special_ids, tokenizer.vocab_size, rate, context_length)

    def row(self, row: np.ndarray | PackedRow, rng: np.random.Generator) -> MaskedRow:
        """A window, or the documents of a packed row, with tokens that `rng` chooses hidden."""
        segments = None
        if isinstance(row, PackedRow):
            documents = [document[:-1] for document in row.documents]  # the last one, EOS, has no place
            row = np.concatenate(documents)
            segments = np.repeat(np.arange(len(documents)), [document.size for document in documents])
        eligible = np.flatnonzero(~np.isin(row, self.special_ids))
        eligible = eligible if eligible.size else np.arange(row.size)
        count = min(num_chosen(row.size, self.rate), eligible.size)
        places = np.sort(rng.choice(eligible, count, replace=False))
        tokens, fate = row.astype(np.int32), rng.random(count)
        others = np.setdiff1d(np.arange(self.vocab_size), self.special_ids)
        anything = rng.choice(others, count)
        hidden = np.where(fate < MASKED, self.mask_id, np.where(fate < MASKED + ANY, anything, tokens[places]))
        targets, tokens[places] = tokens[places], hidden
        return MaskedRow(tokens, places, targets, segments)

    def fixed(self, row: np.ndarray | PackedRow, index: int) -> MaskedRow:
        """A row of an evaluation, by its index: always the same."""
        return self.row(row, np.random.default_rng([0, 0, FIXED, index]))

    def collate(self, rows: Sequence[MaskedRow], indices: Sequence[int] = ()) -> Batch:
        """Each chosen place predicts its own token. `segments` as `PackedDocuments.collate` has them."""
        shape = (len(rows), self.context_length)
        label_shape = (len(rows), num_chosen(self.context_length, self.rate))
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        positions, targets, mask = (np.zeros(label_shape, kind) for kind in (np.int32, np.int32, np.float32))
        for b, row in enumerate(rows):
            size, count = len(row), row.places.size
            tokens[b, :size] = row.tokens
            positions[b, :count], targets[b, :count], mask[b, :count] = row.places, row.targets, 1
            if row.segments is not None:
                segments[b, :size], segments[b, size:] = row.segments, row.segments[-1] + 1
        lengths, packed = np.array([len(row) for row in rows], np.int32), rows[0].segments is not None
        return Batch(
            tokens, targets, mask, lengths, positions, segments=segments if packed else None, rows=tuple(indices)
        )


class MaskedWindows(TextWindows):
    """Windows of `context_length` tokens, none of which is in two; the last may be shorter."""

    def __init__(self, tokens: np.ndarray, masking: Masking) -> None:
        super().__init__(tokens, masking.context_length)
        self.masking = masking

    def __len__(self) -> int:
        return -(-self.tokens.size // self.context_length)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int -> window; slices are not needed
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.tokens[index * self.context_length : (index + 1) * self.context_length]

    def collate(self, rows: Sequence[MaskedRow], indices: Sequence[int] = ()) -> Batch:  # type: ignore[override]
        return self.masking.collate(rows, indices)


class MaskedDocuments(PackedDocuments):
    """Packed documents whose tokens are hidden and told; EOS takes no place and is not told."""

    def __init__(self, stream: TokenStream, masking: Masking, seed: int) -> None:
        super().__init__(stream, masking.context_length, seed)
        self.masking = masking

    def collate(self, rows: Sequence[MaskedRow], indices: Sequence[int] = ()) -> Batch:  # type: ignore[override]
        return self.masking.collate(rows, indices)


def num_chosen(size: int, rate: float) -> int:
    """How many tokens of a row of `size` are hidden."""
    return max(1, round(size * rate))
