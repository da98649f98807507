"""Fill in the middle: a document's end is moved to its middle's place, so that a causal model learns to fill gaps.

Bavarian et al. 2022 (arXiv 2207.14255), on tokens: two cuts, uniform over the document, give prefix, middle and suffix.
PSM: <prefix> p <suffix> s <middle> m. SPM: <prefix> <suffix> s <middle> p m.
"""

from dataclasses import dataclass

import numpy as np

from mlx_training.data.packing import PackedRow
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import DataError

NUM_ADDED = 3  # tokens that a document grows by
PARTS = ("prefix", "middle", "suffix")
SPELLINGS = ("<fim_{}>", "<|fim_{}|>", "<fim-{}>")


@dataclass(frozen=True)
class FillInTheMiddle:
    """Turns a share `rate` of the documents around, a share `spm_rate` of them in the order SPM."""

    prefix: int
    middle: int
    suffix: int
    bos_id: int | None
    eos_id: int
    rate: float
    spm_rate: float
    context_length: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, rate: float, spm_rate: float, context_length: int) -> "FillInTheMiddle":
        """With the tokenizer's own sentinels. Raises DataError when it has none, or no row could hold them."""
        if context_length <= NUM_ADDED:
            raise DataError(f"a context of {context_length} tokens is too short for the {NUM_ADDED} sentinels")
        for spelling in SPELLINGS:
            prefix, middle, suffix = (tokenizer.model.id_of(spelling.format(name)) for name in PARTS)
            if prefix is not None and middle is not None and suffix is not None:
                bos_id = tokenizer.bos_id if tokenizer.add_bos else None
                return cls(prefix, middle, suffix, bos_id, tokenizer.eos_id, rate, spm_rate, context_length)
        names = ", ".join(SPELLINGS[0].format(name) for name in PARTS)
        raise DataError(
            f"training.objective fill_in_the_middle: the tokenizer has no tokens {names}; add them with "
            'model.tokenizer.special_tokens=["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]'
        )

    def window(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A window with the documents in it turned around, each by itself. What no longer fits is cut off its end."""
        ends = np.flatnonzero(tokens == self.eos_id) + 1
        documents = [self.document(part, rng) for part in np.split(tokens, ends) if part.size]
        return np.concatenate(documents)[: self.context_length + 1]

    def row(self, row: PackedRow, rng: np.random.Generator) -> PackedRow:
        """A packed row with its documents turned around."""
        return PackedRow(tuple(self.document(document, rng) for document in row.documents))

    def document(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One document, turned around or as it is. BOS stays first and EOS last."""
        first = int(self.bos_id is not None and tokens[0] == self.bos_id)
        last = tokens.size - int(tokens[-1] == self.eos_id)
        if rng.random() >= self.rate or last - first < 2:
            return tokens
        one, two = np.sort(rng.integers(first, last + 1, 2))
        head, prefix, middle = tokens[:first], tokens[first:one], tokens[one:two]
        suffix, tail = tokens[two:last], tokens[last:]
        pre, suf, mid = np.array([[self.prefix], [self.suffix], [self.middle]], tokens.dtype)
        if rng.random() < self.spm_rate:
            parts = (head, pre, suf, suffix, mid, prefix, middle, tail)
        else:
            parts = (head, pre, prefix, suf, suffix, mid, middle, tail)
        return np.concatenate(parts)
