"""Long evaluations say how far they are, short ones nothing, and a terminal is left clean."""

import io

import numpy as np
import pytest

from mlx_training.data.batch import Batch
from mlx_training.waiting import Waiting, duration


class Stream(io.StringIO):
    def __init__(self, on_terminal: bool) -> None:
        super().__init__()
        self.on_terminal = on_terminal

    def isatty(self) -> bool:
        return self.on_terminal


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def said(on_terminal: bool, seconds_each: float, total: int | None = 10) -> str:
    stream, clock = Stream(on_terminal), Clock()
    with Waiting("answering", total, stream=stream, clock=clock) as waiting:
        for _ in range(10):
            clock.now += seconds_each
            waiting.add(1)
    return stream.getvalue()


def test_a_terminal_has_one_line_that_is_gone_in_the_end() -> None:
    text = said(True, 0.6)
    drawn = text.split("\r")[1:]
    assert drawn[0] == "answering: 2 of 10 rows, ETA 0:05\033[K"
    assert drawn[-1] == "\033[K"
    assert len(drawn) == 5  # after 2, 4, 6 and 8 rows; the last ones end it
    assert "\n" not in text


def test_a_file_has_a_line_a_minute() -> None:
    assert said(False, 40).splitlines()[:2] == [
        "answering: 2 of 10 rows, ETA 5:20",
        "answering: 4 of 10 rows, ETA 4:00",
    ]


def test_without_a_total_there_is_no_eta() -> None:
    assert said(False, 60, None).splitlines()[0] == "answering: 1 rows"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_what_ends_soon_says_nothing(on_terminal: bool) -> None:
    assert said(on_terminal, 0.05) == ""


def test_batches_pass_through() -> None:
    stream, clock = Stream(False), Clock()
    tokens = np.zeros((3, 2), np.int32)
    batches = [Batch(tokens, tokens, np.ones((3, 2)), np.full(3, 2))] * 2
    for batch in Waiting("scoring", stream=stream, clock=clock).over(batches):
        assert batch is batches[0]
        clock.now += 61
    assert stream.getvalue() == "scoring: 3 rows\nscoring: 6 rows\n"


def test_durations() -> None:
    assert (duration(61.4), duration(3_661)) == ("1:01", "1:01:01")
