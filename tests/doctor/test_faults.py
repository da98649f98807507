"""Every planted fault is found, and called by its name; nothing healthy is called ill."""

from pathlib import Path
from typing import Any

import pytest

from mlx_training.diagnostics import doctor
from mlx_training.diagnostics.report import Report
from tests.doctor.cases import healthy
from tests.doctor.faults import FAULTS, LOOKALIKES, Fault, Lookalike
from tests.doctor.faults.heldout import HELDOUT, HELDOUT_LOOKALIKES

KNOWN = [(fault, backend) for fault in FAULTS for backend in fault.backends]
# written by somebody who had not seen the checks; docs/doctor.md has what was found and named at first contact
UNSEEN = [(fault, backend) for fault in HELDOUT for backend in fault.backends]
PAIRS = [
    pytest.param(fault, backend, id=f"{fault.name}-{backend}", marks=[pytest.mark.proof] if pair in UNSEEN else [])
    for pair in (*KNOWN, *UNSEEN)
    for fault, backend in [pair]
]


def examine(subject: Any, *, full: bool) -> Report:
    """A run directory, or a subject."""
    return doctor.examine_run(subject, full=full) if isinstance(subject, Path) else doctor.examine(subject, full=full)


def planted(case: Fault | Lookalike, backend: str, folder: Path) -> Any:
    """The subject with the fault in it."""
    subject = healthy(case.case, backend, folder)
    return case.plant(subject) or subject


@pytest.mark.parametrize(("fault", "backend"), PAIRS)
def test_fault_is_found_and_named(fault: Fault, backend: str, backends: list[str], tmp_path: Path) -> None:
    if backend not in backends:
        pytest.skip(f"backend {backend} is not installed")
    report = examine(planted(fault, backend, tmp_path), full=fault.level == "full")
    assert report.failed, str(report)
    assert report.cause in fault.causes, str(report)
    assert any(fault.where in place for place in (*report.failed[0].where, "")), str(report)


@pytest.mark.parametrize("case", ["timeseries", "decoder", "recurrent", "kgram", "ssm", "adapters", "trained", "run"])
def test_healthy_subjects_pass_every_check(case: str, backend_name: str, tmp_path: Path) -> None:
    report = examine(healthy(case, backend_name, tmp_path), full=True)
    assert not report.failed, str(report)


@pytest.mark.parametrize("lookalike", [*LOOKALIKES, *HELDOUT_LOOKALIKES], ids=lambda lookalike: lookalike.name)
def test_lookalikes_pass(lookalike: Lookalike, backend_name: str, tmp_path: Path) -> None:
    report = examine(planted(lookalike, backend_name, tmp_path), full=False)
    assert not report.failed, str(report)


def test_the_catalogue_is_large() -> None:
    assert len(FAULTS) >= 40
    assert len(LOOKALIKES) >= 12
