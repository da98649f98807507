"""The processes that train together, in MLX: those that mlx.launch started, over its ring."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from select import select
from threading import Thread

import mlx.core as mx
import numpy as np

from mlx_training.backend import TIMEOUT
from mlx_training.errors import ProcessLostError

GRACE = 30  # seconds, once a signal to stop has come; as long as torchrun's


class Group:
    """This process alone, until it joins the others."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._waits_since: float | None = None  # while it waits for the others

    def join(self) -> None:
        """Meet the other processes of this job, if a launcher started several."""
        if "MLX_RANK" in os.environ:
            group = mx.distributed.init()
            self.rank, self.size = group.rank(), group.size()
        if self.size > 1:
            signals, wakeup = os.pipe()
            os.set_blocking(wakeup, False)
            signal.set_wakeup_fd(wakeup)  # Python's own handlers do not run while MLX waits
            Thread(target=self._watch, args=[signals], name="group", daemon=True).start()

    def leave(self) -> None:
        """Say good-bye, when there is nothing more to sum."""

    def sum(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Each array summed over the processes: all of them in one message. Raises ProcessLostError."""
        flat = mx.concatenate([x.flatten().astype(mx.float32) for x in arrays])
        ends = np.cumsum([x.size for x in arrays])[:-1].tolist()
        parts = mx.split(self._all_sum(flat), ends)
        return [part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, arrays, strict=True)]

    def total(self, array: np.ndarray) -> np.ndarray:
        """An array of the host (float32 or int32) summed over the processes. Raises ProcessLostError."""
        return array if self.size == 1 else np.array(self._all_sum(mx.array(array)))

    def _all_sum(self, x: mx.array) -> mx.array:
        mx.eval(x)
        self._waits_since = time.monotonic()
        try:
            summed = mx.distributed.all_sum(x)
            mx.eval(summed)
        except RuntimeError as error:
            raise ProcessLostError(self.rank, error) from error
        finally:
            self._waits_since = None
        return summed

    def _watch(self, signals: int) -> None:
        """End this process when the others do not answer: MLX waits for ever, even for one that has ended."""
        patience = TIMEOUT
        while True:
            if select([signals], [], [], 1)[0]:
                os.read(signals, 1)
                patience = GRACE
            since = self._waits_since
            if since is not None and time.monotonic() - since > patience:
                error = ProcessLostError(self.rank, f"no answer for {patience} s")
                print(f"error: {error}", file=sys.__stderr__, flush=True)
                os._exit(error.exit_code)
