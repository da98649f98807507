"""Which keys a query may look at: the patterns of attention, as rules and as tables.

Shape suffixes: T queries, S keys, N heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Mixer = Literal["causal", "local", "strided", "fixed", "sparsek", "bidirectional"]


@dataclass(frozen=True)
class FixedPattern:
    """`fixed` sparse attention (Child et al. 2019, "Generating Long Sequences with Sparse Transformers") per head.

    Tokens stand in blocks, `stride` blocks make a segment of `local_context` tokens. A query sees its own segment, and
    of earlier segments the `vert_size` summary blocks of its head; heads take turns among `num_verts` choices, the
    last blocks of a segment first. Never the future.
    """

    block_size: int = 16
    local_context: int = 64
    num_verts: int = 1
    vert_size: int = 1

    @property
    def stride(self) -> int:
        """Blocks a segment."""
        return self.local_context // self.block_size

    def broken_rules(self, num_heads: int) -> Iterator[tuple[str, str]]:
        """(key, what is wrong and the nearest valid values) of settings that describe no pattern."""
        if self.local_context % self.block_size:
            near = _multiples(self.local_context, self.block_size)
            yield (
                "local_context",
                f"given {self.local_context}; a multiple of block_size {self.block_size}: {near}",
            )
            return
        if self.vert_size > self.stride:
            yield "vert_size", f"given {self.vert_size}; a segment has {self.stride} blocks: at most {self.stride}"
            return
        if self.stride % self.vert_size:
            near = " or ".join(map(str, _divisors(self.stride, self.vert_size)))
            yield "vert_size", f"given {self.vert_size}; it must divide the {self.stride} blocks of a segment: {near}"
            return
        most = self.stride // self.vert_size
        if self.num_verts > most or num_heads % self.num_verts:
            valid = ", ".join(str(n) for n in range(1, most + 1) if num_heads % n == 0)
            places = f"{self.stride} blocks have {most} places of {self.vert_size}"
            yield "num_verts", f"given {self.num_verts}; {places}, and it must divide num_heads {num_heads}: {valid}"

    def summaries(self, num_heads: int) -> np.ndarray:
        """bool (N, stride): whether later segments see this block of a segment."""
        choices = np.arange(self.stride)[::-1].reshape(-1, self.vert_size)
        table = np.zeros((num_heads, self.stride), bool)
        for head in range(num_heads):
            table[head, choices[head % self.num_verts]] = True
        return table


def visible(mixer: Mixer, q: Any, k: Any, *, window: int, stride: int, fixed: FixedPattern, summaries: Any) -> Any:
    """Whether the query at position `q` may look at the key at position `k`: the definition of every mixer.

    `q` (..., 1, T, 1) and `k` (..., 1, 1, S) are integer arrays of any framework, `summaries` the table of
    `FixedPattern.summaries` in it. Boolean (..., 1 or N, T, S). `sparsek` chooses among what is visible here.
    """
    if mixer == "bidirectional":
        return (k >= 0) & (q >= 0)
    seen = k <= q
    if mixer == "local":
        return seen & (q - k < window)
    if mixer == "strided":
        return seen & ((q - k) % stride == 0)
    if mixer == "fixed":
        blocks_q, blocks_k = q // fixed.block_size, k // fixed.block_size
        same_segment = blocks_q // fixed.stride == blocks_k // fixed.stride
        places = (blocks_k % fixed.stride)[..., 0, 0, :]  # (..., S)
        is_summary = summaries[:, places]  # (N, ..., S)
        is_summary = is_summary.swapaxes(0, 1) if places.ndim > 1 else is_summary
        return seen & (same_segment | is_summary[..., None, :])
    return seen


def _multiples(given: int, of: int) -> str:
    below = max(given // of, 1) * of
    return str(below) if below == given or given < of else f"{below} or {below + of}"


def _divisors(number: int, near: int) -> list[int]:
    """The divisors of a number next to another, below and above."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < near], [d for d in divisors if d > near]
    return [*below[-1:], *above[:1]]
