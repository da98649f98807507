"""The short form of `tools/torture.py --disk`, where disks can be mounted."""

import subprocess
from pathlib import Path

import pytest

from tools import torture
from tools.trials import disk


def test_a_disk_that_refuses_costs_nothing(tmp_path: Path, backends: list[str]) -> None:
    report = disk.run(len(disk.KINDS), backends[-1:], 0, tmp_path)
    if report.skipped:
        pytest.skip(report.skipped)
    assert not report.failures
    assert len(report.lines) == len(set(disk.KINDS)) and sum(" 0 refused" in line for line in report.lines) < 5
    assert str(tmp_path) not in Path("/proc/mounts").read_text(), "every disk is unmounted"


def test_where_mounting_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = subprocess.CompletedProcess("mount", 32, "", "mount: only root can do that\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: refused)
    monkeypatch.setattr(torture, "RESULTS", tmp_path)
    assert torture.main(["--disk", "4", "--backend", "torch", "--write"]) == 0
    assert "disk 4, seed" in (said := capsys.readouterr().out)
    assert "skipped: no disk can be mounted here: [Errno 32] mount: only root can do that" in said
    assert not list(tmp_path.iterdir())
