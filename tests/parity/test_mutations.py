"""Deliberate faults each turn a test red (tools/mutations.py), so that a green suite means something."""

from dataclasses import replace
from pathlib import Path

import pytest

from tools.mutations import REPOSITORY, Edit, Fault, check_baseline, copy_checkout, load_faults, mutate, try_fault

FAULTS = load_faults()
COLLATE = "tests/unit/test_data_collate.py"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("mutations") / "checkout")


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_can_still_be_planted(name: str) -> None:
    """If this fails, the code has moved on: give the entry of tools/mutations.toml its new text."""
    for path, text in mutate(FAULTS[name], REPOSITORY).items():
        compile(text, str(path), "exec")
    file, _, function = FAULTS[name].test.partition("::")
    assert f"def {function}(" in (REPOSITORY / file).read_text(encoding="utf-8")


@pytest.mark.proof
@pytest.mark.usefixtures("both_backends")
def test_without_a_fault_all_is_green(checkout: Path) -> None:
    result = check_baseline(checkout, FAULTS.values())
    assert result.status == "green", result.detail


@pytest.mark.proof
@pytest.mark.usefixtures("both_backends")
@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_caught(name: str, checkout: Path) -> None:
    result = try_fault(checkout, FAULTS[name])
    assert result.status == "caught", result.detail


@pytest.mark.proof
def test_only_a_failed_assertion_is_a_catch(checkout: Path) -> None:
    """A harmless edit survives; code that no longer runs, a moved text and a missing test are no catch."""
    file, old = "mlx_training/data/collate.py", "round_up(max(*counts, 1), 4)"
    fault = Fault("", "", f"{COLLATE}::test_shapes_are_rounded_up", (Edit(file, old, "round_up(max(*counts, 1), 8)"),))
    before = (checkout / file).read_text(encoding="utf-8")

    def status(new: str) -> str:
        return try_fault(checkout, replace(fault, edits=(Edit(file, old, new),))).status

    assert status(f"0 or {old}") == "survived"
    assert status("round_up(max(*counts, 1), 16)") == "caught"
    assert status(f"{old})") == "broken"  # a syntax error
    assert status("missing_name") == "broken"  # fails in the test, by a NameError
    assert try_fault(checkout, replace(fault, edits=(Edit(file, "np", "numpy"),))).status == "broken"
    assert try_fault(checkout, replace(fault, test=f"{COLLATE}::test_none")).status == "broken"
    assert (checkout / file).read_text(encoding="utf-8") == before
