"""Dropout that drops the same values when a layer is computed again."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

_KEYS: list[mx.array] = []  # of the layers that are running, the innermost last


def new_key() -> mx.array:
    """A key, drawn from the global random state."""
    return mx.stop_gradient(mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32))


@contextmanager
def drawing_from(key: mx.array) -> Iterator[None]:
    """Dropout draws from this key, not from the global random state: what is computed again drops the same values."""
    _KEYS.append(key)
    try:
        yield
    finally:
        _KEYS.pop()


class _KeyedDropout(nn.Dropout):
    """MLX's own, but for where it draws from while a layer is running (`drawing_from`)."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _KEYS or not self.training or self._p_1 == 1:
            return super().__call__(x)
        _KEYS[-1], key = mx.random.split(_KEYS[-1])
        return mx.random.bernoulli(self._p_1, x.shape, key=key) * x / self._p_1


Dropout = _KeyedDropout
