"""Checks that only an accelerator can show, on a pretended one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_training.diagnostics import speed_checks
from mlx_training.diagnostics.exam import Exam
from mlx_training.diagnostics.speed_checks import host_sync, shapes
from mlx_training.diagnostics.subject import Subject
from tests.doctor.cases import healthy


class Clock:
    """A time that passes only where somebody waits, so that a busy machine changes nothing."""

    now = 0.0


class Loss:
    """A loss that is ready some time after the step was launched."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.ready = clock, clock.now + 0.02

    def __float__(self) -> float:
        self.clock.now = max(self.clock.now, self.ready)
        return 1.0


@pytest.mark.parametrize(("waits", "status"), [(False, "pass"), (True, "warn")])
def test_a_step_that_waits_for_its_device(
    waits: bool, status: str, backends: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject: Subject = healthy("decoder", backends[0], tmp_path)
    clock = Clock()
    monkeypatch.setattr(speed_checks, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def step(batches: Any, **_: Any) -> dict[str, Any]:
        clock.now += 0.001
        loss = Loss(clock)
        if waits:
            float(loss)
        return {"loss": loss}

    backend = subject.backend
    assert host_sync(Exam(subject)).status == "skip"
    backend.runtime = replace(backend.runtime, device="gpu")
    finding = host_sync(Exam(replace(subject, make_step=lambda _: step)))  # type: ignore[arg-type,return-value]
    assert (finding.status, finding.cause) == (status, "host_sync" if waits else None)


@pytest.mark.parametrize(
    ("first", "again", "anew", "status"),
    [
        (1.2, 1.0, False, "pass"),  # every batch has its own shape; compiling one costs little
        (3.0, 1.0, False, "fail"),  # and much
        (1.2, 1.2, True, "fail"),  # a step that is compiled at every call
    ],
)
def test_a_step_that_is_compiled_for_every_batch(
    first: float,
    again: float,
    anew: bool,
    status: str,
    backends: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of batches that all have shapes of their own, and of a step that takes so long first and again."""
    subject: Subject = healthy("decoder", backends[0], tmp_path)
    one, clock, known = subject.batch(0), Clock(), set[tuple[int, ...]]()
    names = [name for name, array in one.arrays().items() if array.ndim == 2]

    def batch(index: int) -> Any:
        return replace(one, **{name: np.pad(getattr(one, name), ((0, 0), (0, index))) for name in names})

    class Step:
        num_compilations = 0

        def __call__(self, batches: Any, **_: Any) -> dict[str, Any]:
            is_new = batches[0].tokens.shape not in known
            known.add(batches[0].tokens.shape)
            self.num_compilations += is_new or anew
            clock.now += first if is_new else again
            return {"loss": 1.0}

    monkeypatch.setattr(speed_checks, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    subject.backend.name = "mlx"
    finding = shapes(Exam(replace(subject, batch=batch, make_step=lambda _: Step())))  # type: ignore[arg-type,return-value]
    assert (finding.status, finding.cause) == (status, "recompiles" if status == "fail" else None), finding.figure
