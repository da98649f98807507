"""SIGINT, SIGTERM and SIGHUP (a terminal that is closed) while a run trains, and while it reports."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from mlx_training.errors import Interrupted

Value = TypeVar("Value")


def _to_stop() -> list[signal.Signals]:
    """SIGHUP too, unless the process was told to ignore it (nohup)."""
    known = [signal.SIGINT, signal.SIGTERM]
    hang_up = getattr(signal, "SIGHUP", None)
    return known if hang_up is None or signal.getsignal(hang_up) is signal.SIG_IGN else [*known, hang_up]


class _Left(BaseException):
    """A signal came while a function ran that can be left anywhere."""


class Received(list[int]):
    """Signals to stop that came."""

    _leaves = False

    def unless_stopped(self, function: Callable[[], Value]) -> Value | None:
        """The function's value; None where a signal came before its end, and left it."""
        if self:
            return None
        try:
            self._leaves = True
            return function()
        except _Left:
            return None
        finally:
            self._leaves = False

    def receive(self, number: int) -> None:
        """Note a signal. Raises _Left in a function that can be left."""
        self.append(number)
        doing = "leaving the evaluation" if self._leaves else "finishing this step"
        print(f"\n{doing} and saving; press Ctrl-C again to stop at once", file=sys.stderr)
        if self._leaves:
            raise _Left


@contextmanager
def interruptible() -> Iterator[Received]:
    """Collect signals to stop, so that a step can finish and be saved; a second one aborts at once."""
    received = Received()
    previous: dict[signal.Signals, Any] = {}

    def receive(number: int, _frame: Any) -> None:
        for known, handler in previous.items():
            signal.signal(known, handler)
        received.receive(number)

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
