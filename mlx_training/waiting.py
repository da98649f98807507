"""How far work that takes a while has come, on standard error."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self, TextIO

from mlx_training.data.batch import Batch


class Waiting:
    """Counts rows: a line that is redrawn every second on a terminal, and is gone in the end; elsewhere one a minute.

    What ends sooner says nothing. Without a `total` there is no ETA.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.done = what, total, 0
        self.stream, self.clock = stream or sys.stderr, clock
        self.on_terminal = self.stream.isatty()
        self.start = clock()
        self.said, self.pause = self.start, 1.0 if self.on_terminal else 60.0

    def add(self, number: int) -> None:
        """So many more rows are done."""
        self.done += number
        now = self.clock()
        if now - self.said < self.pause or not self.done or self.done == self.total:
            return
        self.said = now
        line = f"{self.what}: {self.done:,} rows"
        if self.total is not None:
            left = (self.total - self.done) * (now - self.start) / self.done
            line = f"{self.what}: {self.done:,} of {self.total:,} rows, ETA {duration(left)}"
        self.stream.write(f"\r{line}\033[K" if self.on_terminal else f"{line}\n")
        self.stream.flush()

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the rows of one are done when the next is asked for."""
        with self:
            for batch in batches:
                yield batch
                self.add(len(batch.lengths))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.on_terminal and self.said > self.start:
            self.stream.write("\r\033[K")
            self.stream.flush()


def duration(seconds: float) -> str:
    """Minutes and seconds, m:ss, or with hours, h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
