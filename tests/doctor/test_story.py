"""The doctor's pages say what happens: the week of `grad_norm=0.00`, the examples, the table of causes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_training.cli import VERBS
from mlx_training.diagnostics.causes import CAUSES
from mlx_training.diagnostics.doctor import CHECKS
from tests.conftest import REPOSITORY
from tests.doctor import story
from tests.doctor.cases import healthy

DOCS = REPOSITORY / "docs"
PAGES = [DOCS / "doctor.md", DOCS / "grad_norm_is_zero.md"]
NAMING = [*PAGES, DOCS / "plan.md", REPOSITORY / "README.md"]


def test_the_loss_falls_and_the_norm_is_zero(
    backend_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story.train(story.as_it_was(healthy("timeseries", backend_name, tmp_path)), 30)
    lines = capsys.readouterr().out.splitlines()
    losses = [float(re.search(r"loss=(\S+)", line)[1]) for line in lines]  # type: ignore[index]
    assert len(lines) == 4
    assert all("grad_norm=0.00" in line for line in lines), lines
    assert losses[-1] < 0.7 * losses[0], lines


def test_the_doctor_names_both_mistakes(backend_name: str, tmp_path: Path) -> None:
    first, second, third = story.visit(healthy("timeseries", backend_name, tmp_path))
    assert first.cause == "norm_misreported", str(first)
    assert "reported 0.000e+00" in first.failed[0].figure
    assert second.cause == "full_logits", str(second)
    assert not third.failed, str(third)


def test_the_table_of_causes_is_fresh() -> None:
    table = "\n".join(f"| `{name}` | {cause.sentence} |" for name, cause in CAUSES.items())
    assert f"\n{table}\n" in PAGES[0].read_text(encoding="utf-8"), f"docs/doctor.md should hold:\n{table}"


def test_every_check_is_described() -> None:
    described = re.findall(r"^\| \*{0,2}([^|*]+?)\*{0,2} \|", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE)
    assert {check.name for check in CHECKS} <= set(described)


def test_causes_in_the_pages_exist() -> None:
    for page in PAGES:
        named = re.findall(r"\[(\w+)\]$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert named and set(named) <= set(CAUSES), page
    rows = re.findall(r"^\|[^|]*\|[^|]*\| (`.*?`) \|", PAGES[1].read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) <= set(CAUSES)


@pytest.mark.parametrize("framework", ["torch", "mlx"])
def test_the_example_runs_and_says_what_the_page_says(framework: str, backends: list[str], tmp_path: Path) -> None:
    if framework not in backends:
        pytest.skip(f"backend {framework} is not installed")
    examples = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (text for text in examples if f'get("{framework}")' in text)
    healthy = "\n".join(line for line in example.splitlines() if "experiment" not in line)
    (tmp_path / "own.py").write_text(f"{example}\nprint('--- and without the fault')\n{healthy}")
    done = subprocess.run([sys.executable, tmp_path / "own.py"], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    ill, well = done.stdout.split("--- and without the fault")
    assert "[disconnected]\n      where: embedding.weight" in ill
    assert " 0 fail," in well, well


@pytest.mark.parametrize("page", NAMING, ids=lambda page: page.stem)
def test_commands_name_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for tool in re.findall(r"python (tools/\w+\.py)", text):
        assert (REPOSITORY / tool).is_file(), tool
    assert set(re.findall(r"^(?:\$ )?(?:\.venv/bin/)?mlx-training (\w+)", text, re.MULTILINE)) <= set(VERBS)
