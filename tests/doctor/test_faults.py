"""Every planted fault is found, and called by its name; nothing healthy is called ill."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlx_training.diagnostics import doctor
from mlx_training.diagnostics.report import Finding, Report
from mlx_training.environment import BACKENDS
from tests.doctor.cases import by_turns, healthy
from tests.doctor.faults import FAULTS, LOOKALIKES, Fault, Lookalike
from tests.doctor.faults.heldout import HELDOUT, HELDOUT_LOOKALIKES


def pairs(cases: Sequence[Fault | Lookalike]) -> list[Any]:
    """Each case on its backends, by turns."""
    return by_turns(cases, lambda case: case.backends if isinstance(case, Fault) else BACKENDS)


def unseen(cases: Sequence[Fault | Lookalike]) -> list[Any]:
    """Cases by somebody who had not seen the checks; docs/doctor.md has what was found and named at first contact."""
    return [pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.proof]) for case in pairs(cases)]


PAIRS = [*pairs(FAULTS), *unseen(HELDOUT)]
HEALTHY = [*pairs(LOOKALIKES), *unseen(HELDOUT_LOOKALIKES)]


def examine(subject: Any, *, full: bool, watch: doctor.Watcher | None = None) -> Report:
    """A run directory, or a subject."""
    examination: Any = doctor.examine_run if isinstance(subject, Path) else doctor.examine
    return examination(subject, full=full, watch=watch)


def planted(case: Fault | Lookalike, backend: str, folder: Path) -> Any:
    """The subject with the fault in it."""
    subject = healthy(case.case, backend, folder)
    return case.plant(subject) or subject


class Found(Exception):
    """A fault: what comes after it is not looked at."""


def examine_up_to_a_fault(subject: Any, *, full: bool) -> Report:
    """The report as it is when the first check fails, whose cause the doctor would name."""
    report = Report(subject="")

    def watch(finding: Finding) -> None:
        report.findings.append(finding)
        if finding.status == "fail":
            raise Found

    with contextlib.suppress(Found):
        examine(subject, full=full, watch=watch)
    return report


@pytest.mark.parametrize(("fault", "backend"), PAIRS)
def test_fault_is_found_and_named(fault: Fault, backend: str, tmp_path: Path) -> None:
    report = examine_up_to_a_fault(planted(fault, backend, tmp_path), full=fault.level == "full")
    assert report.failed, str(report)
    assert report.cause in fault.causes, str(report)
    assert any(fault.where in place for place in (*report.failed[0].where, "")), str(report)


SUBJECTS = ["timeseries", "decoder", "sparse", "recurrent", "kgram", "ssm", "adapters", "trained", "run"]


@pytest.mark.parametrize(("case", "backend"), by_turns(SUBJECTS))
def test_healthy_subjects_pass_every_check(case: str, backend: str, tmp_path: Path) -> None:
    report = examine(healthy(case, backend, tmp_path), full=True)
    assert not report.failed, str(report)


@pytest.mark.parametrize(("lookalike", "backend"), HEALTHY)
def test_lookalikes_pass(lookalike: Lookalike, backend: str, tmp_path: Path) -> None:
    report = examine(planted(lookalike, backend, tmp_path), full=False)
    assert not report.failed, str(report)


def test_the_catalogue_is_large() -> None:
    assert len(FAULTS) >= 40
    assert len(LOOKALIKES) >= 12
