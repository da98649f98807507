"""A short soak, and that its judgement can fall."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.trials import soak
from tools.trials.soak import Sample, Soaked

FLAT = {"memory": 0.0, "files": 0.0, "threads": 0.0, "cpu": 0.0}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize(("backend", "family"), [("mlx", "timeseries"), ("torch", "decoder")])
def test_the_short_form(
    backend: str, family: str, backends: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend not in backends:
        pytest.skip(f"backend {backend} is not installed")
    monkeypatch.setattr(soak, "FAMILIES", {family: soak.FAMILIES[family]})
    report = soak.run(100, [backend], 0, tmp_path)
    assert report.failures == []
    assert len(report.lines) == 4 and "open files" in report.lines[1]


def soaked(**growth: float) -> Soaked:
    """20,000 noisy steps, after which a figure has grown so much (`cpu`: by this share of a step)."""
    noise, rate = np.random.default_rng(0).normal(0, 0.3, 1000), FLAT | growth
    samples, cpu = [], 0.0
    for i, step in enumerate(range(2000, 20000, 20)):
        share = step / 20000
        cpu += 20 * 0.002 * (1 + 0.2 * abs(noise[i]) + rate["cpu"] * share)
        memory = 80 + noise[i] + rate["memory"] * share
        samples.append(Sample(step, memory, 6 + int(rate["files"] * share), 5 + int(rate["threads"] * share), cpu))
    record: dict[str, Any] = {"seconds_per_step": 0.002, "traces": 5, "shapes": 4}
    return Soaked(samples, [record | {"step": sample.step} for sample in samples])


def test_what_is_flat_passes() -> None:
    assert soaked().faults() == []
    assert soaked(memory=3.0).faults() == [], "within 5 %"
    assert abs(soaked(memory=20.0).slope() - 1.0) < 0.02


@pytest.mark.parametrize(
    ("figure", "growth", "expected"),
    [
        ("memory", 15.0, "memory: 8"),
        ("files", 2.0, "open files: 6 became 7"),
        ("threads", 2.0, "open threads: 5 became 6"),
    ]
    + [("cpu", 0.5, "CPU time of a step")],
)
def test_what_grows_fails(figure: str, growth: float, expected: str) -> None:
    (fault,) = soaked(**{figure: growth}).faults()
    assert fault.startswith(expected)


def test_shapes_that_are_traced_again_fail() -> None:
    good = soaked()
    end = good.records[-1]
    for change, expected in (({"traces": 10}, "10 traces of 4 shapes"), ({"shapes": 5}, "4 shapes at half time, 5")):
        (fault,) = replace(good, records=[*good.records[:-1], end | change]).faults()
        assert fault.startswith(expected)
