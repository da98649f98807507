"""What processes that train together tell each other; here they are threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_training.config import load_config
from mlx_training.errors import ConfigError, DivergedError
from mlx_training.together import diverging_together, expect_alike, gather, share, share_arrays


class Thread:
    """A member of a group of three."""

    size = 3

    def __init__(self, rank: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.table, self.barrier = rank, table, barrier

    def total(self, array: np.ndarray) -> np.ndarray:
        self.table[self.rank] = array
        self.barrier.wait(10)
        summed = sum(self.table)
        self.barrier.wait(10)
        assert summed.dtype == array.dtype
        return summed


def three(work: Callable[[Thread], Any]) -> list[Any]:
    """What each of three returns."""
    table, barrier = [None] * 3, threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda rank: work(Thread(rank, table, barrier)), range(3)))


def test_everybody_hears_everybody_and_all_hear_the_first() -> None:
    values = [{"loss": 0.1 + 0.2, "text": "ä"}, None, [1, True]]
    assert three(lambda group: gather(group, values[group.rank])) == [values] * 3
    assert three(lambda group: share(group, values[group.rank])) == [values[0]] * 3


def test_all_start_as_the_first() -> None:
    """Whatever the others have: arrays of their own, or none."""

    def start(group: Thread) -> dict[str, np.ndarray]:
        own = {"a": np.full((2, 3), group.rank + 0.5, np.float32), "step": np.asarray(group.rank + 7, np.float32)}
        return share_arrays(group, own if group.rank < 2 else {}, {"a": (2, 3), "step": ()})  # type: ignore[arg-type]

    for found in three(start):
        assert {name: x.shape for name, x in found.items()} == {"a": (2, 3), "step": ()}
        assert (found["a"] == 0.5).all() and found["step"] == 7


def test_what_differs_is_named() -> None:
    config = load_config("quick_test")

    def compare(group: Thread) -> None:
        tokenizer = SimpleNamespace(fingerprint="t" if group.rank < 2 else "u")
        spec = SimpleNamespace(num_parameters=3)
        training = config.training.model_copy(update={"batch_size": 4 + group.rank // 2})
        given = config.model_copy(update={"training": training, "output_dir": f"run{group.rank}"})
        assembly = SimpleNamespace(config=given, spec=spec, data=SimpleNamespace(tokenizer=tokenizer))
        with pytest.raises(ConfigError, match="process 2 differs from process 0 in: training, tokenizer."):
            expect_alike(group, assembly, "8 train")  # type: ignore[arg-type]

    three(compare)


def test_all_that_diverged_say_why() -> None:
    texts = ["nothing odd", "First not finite: lm.0", "nothing odd"]

    def diverge(group: Thread) -> str:
        with pytest.raises(DivergedError) as found, diverging_together(group):  # type: ignore[arg-type]
            raise DivergedError(texts[group.rank], 5)
        assert found.value.step == 5
        return str(found.value)

    assert set(three(diverge)) == {"nothing odd\nprocess 1: First not finite: lm.0"}
