"""The short form of `tools/torture.py --damage`."""

from pathlib import Path

from tools.trials import damage


def test_every_kind_of_damage_is_found_and_the_previous_checkpoint_used(tmp_path: Path, backends: list[str]) -> None:
    report = damage.run(len(damage.KINDS), backends[-1:], 0, tmp_path)
    assert not report.failures
    assert report.lines[-1].split() == ["all", "15", "15", "15", "3"]
