"""SIGINT and SIGTERM while a run trains, and while it reports."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_training.errors import Interrupted


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM so that a step can finish and be saved; a second one aborts at once."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        for known, handler in previous.items():
            signal.signal(known, handler)
        print("\nfinishing this step and saving; press Ctrl-C again to stop at once", file=sys.stderr)

    for expected in (signal.SIGINT, signal.SIGTERM):
        previous[expected] = signal.signal(expected, receive)
    try:
        yield received
    finally:
        for expected, handler in previous.items():
            signal.signal(expected, handler)


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Raise Interrupted with this message as soon as SIGINT or SIGTERM comes."""

    def stop(number: int, _frame: Any) -> None:
        raise Interrupted(number, message)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
