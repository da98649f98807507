"""Dropout that drops the same values when a layer is computed again."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def new_key() -> int:
    """A seed, drawn from the global random state."""
    return int(torch.randint(2**62, ()))


@contextmanager
def drawing_from(key: int) -> Iterator[None]:
    """Dropout draws from this seed, not from the global random state: what is computed again drops the same values."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(key)
        yield
