"""SIGINT, SIGTERM and SIGHUP (a terminal that is closed) while a run trains, and while it reports."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_training.errors import Interrupted


def _to_stop() -> list[signal.Signals]:
    """SIGHUP too, unless the process was told to ignore it (nohup)."""
    known = [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)
    return known if hang_up is None or signal.getsignal(hang_up) is signal.SIG_IGN else [*known, hang_up]


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect signals to stop, so that a step can finish and be saved; a second one aborts at once."""
    received: list[int] = []
    previous: dict[signal.Signals, Any] = {}

    def receive(number: int, _frame: Any) -> None:
        received.append(number)
        for known, handler in previous.items():
            signal.signal(known, handler)
        print("\nfinishing this step and saving; press Ctrl-C again to stop at once", file=sys.stderr)

    for expected in _to_stop():
        previous[expected] = signal.signal(expected, receive)
    try:
        yield received
    finally:
        for expected, handler in previous.items():
            signal.signal(expected, handler)


@contextmanager
def stoppable(message: str) -> Iterator[None]:
    """Raise Interrupted with this message as soon as a signal to stop comes."""

    def stop(number: int, _frame: Any) -> None:
        raise Interrupted(number, message)

    previous = {number: signal.signal(number, stop) for number in _to_stop()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
