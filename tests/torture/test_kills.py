"""tools/torture.py --kills, in short, and what it would not let pass."""

from pathlib import Path

from mlx_training.environment import installed_backends
from mlx_training.json_lines import METRICS
from tools.trials import kills


def test_the_short_form(tmp_path: Path) -> None:
    backend = next(iter(installed_backends()))  # both take part in the full form
    report = kills.run(2, [backend], seed=3, folder=tmp_path)
    assert not report.failures and len(report.lines) == 2, report
    run = tmp_path / f"{backend}-decoder" / "run"
    assert not kills.wrong_at_the_end(run)
    lines = (run / METRICS).read_text().splitlines()
    (run / METRICS).write_text("\n".join([*lines, lines[0]]) + "\n")
    assert "does not hold every step once" in kills.wrong_at_the_end(run)[0]
