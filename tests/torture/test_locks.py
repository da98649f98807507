"""A few rounds of processes in one run directory, and that the trial sees what it should."""

from pathlib import Path

import pytest

from mlx_training import checkpoint_tools
from tools.trials import locks


def test_the_short_form(backends: list[str], tmp_path: Path) -> None:
    report = locks.run(2, backends[:1], 0, tmp_path)
    assert report.failures == []
    assert report.lines[0] == "2 rounds, 5 processes: 2 trained, 3 and 2 more were refused"
    assert "verify 10, ls 10, diff 10, evaluate 2, generate 2" in report.lines[1]


def test_a_false_word_of_a_reader_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    found = {"run": "", "checkpoints": [{"complete": False}]}
    monkeypatch.setattr(checkpoint_tools, "list_checkpoints", lambda run: found)
    problems = dict(locks.read_everything(tmp_path))
    assert all(problems.values()), problems
    found["checkpoints"] = [{"complete": True}]
    assert not dict(locks.read_everything(tmp_path))["ls"]
