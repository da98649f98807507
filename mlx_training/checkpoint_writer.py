"""Checkpoints written beside the training loop."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from mlx_training.checkpoint import CheckpointStore
from mlx_training.checkpoint_files import Arrays


class CheckpointWriter:
    """Saves in a thread of its own, one checkpoint at a time, so that a training step hides the time a disk takes.

    A write that failed is raised by the next call, whichever that is.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[Path] | None = None

    def save(
        self, step: int, model: Arrays, optimizer: Arrays, state: Mapping[str, Any], *, best: bool, keep: int
    ) -> None:
        """`CheckpointStore.save`, begun once the one before is done. The arrays must not change any more."""
        self.wait()
        self._pending = self._thread.submit(self.store.save, step, model, optimizer, state, best=best, keep=keep)

    def wait(self) -> None:
        """Return when everything is on the disk."""
        if self._pending:
            wait([self._pending])
            done, self._pending = self._pending, None
            done.result()

    def close(self) -> None:
        """Finish what was begun."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
