"""Interleaved measurements of two or more sides, each a process of its own, and what they say as ratios."""

import multiprocessing
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tools.benchmarks.worker import serve

Sample = dict[str, float]


class PeerError(Exception):
    """A side failed; carries its traceback."""


def context() -> Any:
    """Sides are forked from a process that has imported the frameworks, where that is safe."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(["tools.benchmarks.heavy"])
    return chosen


class Side:
    """A process that takes steps when it is told to."""

    def __init__(self, function: str, options: Mapping[str, Any]) -> None:
        chosen = context()
        self.function = function
        self.connection, theirs = chosen.Pipe()
        self.process = chosen.Process(target=serve, args=(theirs, function, dict(options)), daemon=True)
        self.process.start()
        theirs.close()
        self.absent = self._read().get("absent", "")

    def run(self, steps: int) -> Sample:
        """Take steps; seconds a step, peak bytes, and what the side itself says. 0 steps: the last word."""
        self.connection.send(steps)
        return self._read()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()

    def _read(self) -> dict[str, Any]:
        try:
            said = self.connection.recv()
        except EOFError:
            raise PeerError(f"{self.function} ended with exit code {self.process.exitcode}") from None
        if "failed" in said:
            raise PeerError(f"{self.function}: {said['failed']}")
        return said


@dataclass
class Measured:
    """What every side did, and the ratios of all others to the first."""

    work: str
    target: str = ""
    quantity: str = "cpu"  # what ratios are of: seconds of the processor, or "wall" where a GPU works
    samples: dict[str, list[Sample]] = field(default_factory=dict)  # side -> one a repetition
    absent: dict[str, str] = field(default_factory=dict)  # side -> the reason

    def ratio(self, side: str, quantity: str = "") -> tuple[float, float, float]:
        """Median and 95 % interval of side / first, paired by repetition (bootstrap of the median)."""
        first, quantity = next(iter(self.samples.values())), quantity or self.quantity
        pairs = zip(self.samples[side], first, strict=True)
        return interval([theirs[quantity] / ours[quantity] for theirs, ours in pairs])

    def median(self, side: str, quantity: str) -> float:
        """Median over the repetitions."""
        return statistics.median(sample[quantity] for sample in self.samples[side])

    def lines(self) -> list[str]:
        """A line a side."""
        said = [self.work + (f" (aim: {self.target})" if self.target else "")]
        for number, side in enumerate(self.samples):
            cpu, wall, peak = (self.median(side, quantity) for quantity in ("cpu", "wall", "peak"))
            text = f"  {side:34} {cpu * 1e3:9.1f} ms CPU {wall * 1e3:9.1f} ms"
            if "tokens" in self.samples[side][0]:
                text += f" {self.median(side, 'tokens') / self.median(side, self.quantity):9.0f} tok/s"
            text += f" {peak / 2**20:7.0f} MiB"
            if number:
                middle, low, high = self.ratio(side)
                spread = f"[{low:.2f}, {high:.2f}]" if len(self.samples[side]) > 1 else "(once)"
                text += f"  x {middle:.2f} {spread}; memory x {self.ratio(side, 'peak')[0]:.2f}"
            if "loss" in self.samples[side][0]:
                text += f"  loss {self.samples[side][-1]['loss']:.4f}"
            said.append(text)
        return said + [f"  {side:34} not measured: {reason}" for side, reason in self.absent.items()]

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"ratios": {side: self.ratio(side) for side in list(self.samples)[1:]}}


def compare(
    work: str,
    sides: Mapping[str, tuple[str, Mapping[str, Any]]],
    *,
    repetitions: int,
    steps: int,
    warm_up: int,
    target: str = "",
    quantity: str = "cpu",
) -> Measured:
    """Start all sides, warm them up, and let them take turns; the order turns around every repetition.

    `sides`: name -> (MODULE:FUNCTION, options). The first is what the others are divided by.
    """
    measured = Measured(work, target, quantity)
    started: dict[str, Side] = {}
    try:
        for name, (function, options) in sides.items():
            side = Side(function, options)
            started[name] = side
            if side.absent:
                measured.absent[name] = side.absent
            else:
                if warm_up:
                    side.run(warm_up)
                measured.samples[name] = []
        for repetition in range(repetitions):
            order = list(measured.samples)
            for name in order if repetition % 2 == 0 else reversed(order):
                measured.samples[name].append(started[name].run(steps))
        for name in measured.samples:
            measured.samples[name][-1] |= started[name].run(0)
    finally:
        for side in started.values():
            side.close()
    return measured


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median, and the 2.5th and 97.5th percentile of the medians of 2,000 resamples."""
    array = np.asarray(values)
    drawn = np.random.default_rng(seed).integers(0, array.size, (2000, array.size))
    low, high = np.percentile(np.median(array[drawn], axis=1), [2.5, 97.5])
    return float(np.median(array)), float(low), float(high)
