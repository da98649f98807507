"""Checks that only an accelerator can show, on a pretended one."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_training.diagnostics.exam import Exam
from mlx_training.diagnostics.speed_checks import host_sync
from mlx_training.diagnostics.subject import Subject
from tests.doctor.cases import healthy


class Device:
    """A loss that is ready some time after the step was launched."""

    def __init__(self) -> None:
        self.ready = time.perf_counter() + 0.02

    def __float__(self) -> float:
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return 1.0


@pytest.mark.parametrize(("waits", "status"), [(False, "pass"), (True, "warn")])
def test_a_step_that_waits_for_its_device(waits: bool, status: str, backends: list[str], tmp_path: Path) -> None:
    subject: Subject = healthy("decoder", backends[0], tmp_path)

    def step(batches: Any, **_: Any) -> dict[str, Any]:
        loss = Device()
        if waits:
            float(loss)
        return {"loss": loss}

    backend = subject.backend
    assert host_sync(Exam(subject)).status == "skip"
    backend.runtime = replace(backend.runtime, device="gpu")
    finding = host_sync(Exam(replace(subject, make_step=lambda _: step)))  # type: ignore[arg-type,return-value]
    assert (finding.status, finding.cause) == (status, "host_sync" if waits else None)
