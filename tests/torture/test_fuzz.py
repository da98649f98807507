"""The short form of the fuzzing, and that its guard and its clock would see what they are for."""

import os
import sys
from pathlib import Path

import pytest

from tools.trials import fuzz
from tools.trials.fuzz_worker import Guard, written


def test_spoilt_files_are_refused_or_read(tmp_path: Path, backends: list[str]) -> None:
    report = fuzz.run(100, backends[-1:], 20, tmp_path)
    assert not report.failures, report.failures[0]
    assert report.lines[-3].startswith("100 cases: ")


def test_guard_refuses_what_lies_outside(tmp_path: Path) -> None:
    guard = Guard()
    guard.watching, guard.allowed = True, [str(tmp_path / "run")]
    guard("open", (str(tmp_path / "run/a"), "w", os.O_WRONLY | os.O_CREAT))
    guard("open", ("/etc/hosts", "r", os.O_RDONLY))
    assert not guard.seen
    for event, args in {
        "open": (str(tmp_path / "rows.jsonl"), "w", os.O_WRONLY),
        "os.rename": (str(tmp_path / "run/a"), str(tmp_path / "run/../b"), -1, -1),
        "os.remove": (str(tmp_path / "running"), -1),
    }.items():
        with pytest.raises(PermissionError):
            guard(event, args)
    assert len(guard.seen) == 3
    guard("pickle.find_class", ("os", "system"))
    guard("subprocess.Popen", ("/bin/rm", ["rm"], None, None))
    assert len(guard.seen) == 5


def test_a_place_that_was_asked_for_is_refused_without_blame(tmp_path: Path) -> None:
    guard = Guard()
    guard.watching, guard.asked = True, str(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        guard("os.mkdir", (str(tmp_path / "elsewhere"), 0o777, -1))
    assert not guard.seen
    assert written("os.rmdir", ("inside", 3)) == []


def test_worker_says_what_a_process_died_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    report = fuzz.run(1, ["torch"], 0, tmp_path)
    assert "did not begin" in report.failures[0]
