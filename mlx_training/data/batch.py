"""Batch: what a model sees at one micro-batch, as NumPy arrays with fixed meanings.

Shapes: B rows, L tokens, K labels a row, S series, T samples, P patches a series (P = T / patch_size).
"""

from dataclasses import dataclass, fields
from typing import Any

Array = Any  # np.ndarray; the backends put their own arrays into the same fields


@dataclass(frozen=True)
class Batch:
    """Aligned tokens, targets and mask. Nothing downstream shifts labels again.

    Rows are padded at the end only; pads are never supervised, and no row can see another's. With `segments`
    a row holds several documents, one after another, each a causal sequence of its own; pads are one more.
    `targets[b, k]` is the token to predict from the hidden state at `positions[b, k]`; with
    `positions=None` every place is a label place (K == L), as in language-model windows. The positions of a row follow
    each other; those of padding labels are 0.
    """

    tokens: Array  # int32 (B, L); a patch's place holds id 0, which is overwritten
    targets: Array  # int32 (B, K)
    mask: Array  # float32 (B, K): 1 where supervised, 0 at padding labels
    lengths: Array  # int32 (B,): tokens and patches before the padding
    positions: Array = None  # int32 (B, K)
    series: Array = None  # float32 (S, T): normalised, zero-padded to a patch multiple
    scale: Array = None  # float32 (S, 2): asinh(mean), log(std) of the raw series
    num_patches: Array = None  # int32 (S,): real patches of each series, at least 1
    series_place: Array = None  # int32 (S,): 0 for the first series of its row, 1 for the second, ...
    patch_index: Array = None  # int32 (B, L): 0 = text, else 1 + s * P + p
    segments: Array = None  # int32 (B, L): the number of a place's document within its row; nobody sees another's
    past: Array = None  # (2, layers, B or 1, heads, N, D): keys and values of the first N places, from the model itself
    prefix: int = 0  # so many leading places of every row stand before any series and any label
    rows: tuple[int, ...] = ()  # index of each row in its dataset, for reports

    def arrays(self) -> dict[str, Array]:
        """The arrays that are present, by field name (what a backend moves to its device)."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rows", "prefix")}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens."""
        return int(self.mask.sum())
