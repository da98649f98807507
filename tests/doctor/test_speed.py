"""Checks that only an accelerator can show, on a pretended one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_training.diagnostics import speed_checks
from mlx_training.diagnostics.exam import Exam
from mlx_training.diagnostics.speed_checks import host_sync
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
