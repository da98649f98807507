"""The state that a run is continued with."""

from dataclasses import asdict

import pytest

from mlx_training.progress import Progress, wrong_progress

GOOD = {"progress": asdict(Progress(loss=0.5)), "backend": "mlx", "llm_sha256": None}


@pytest.mark.parametrize("values", [{}, {"best": 0.5, "evaluated": 8}, {"best": 1, "loss": -2, "stopped_early": True}])
def test_what_is_sound(values: dict[str, object]) -> None:
    assert wrong_progress(GOOD | {"progress": GOOD["progress"] | values}, 8) == []  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("best", float("nan"), "a number or null"),
        ("best", 10**400, "a number or null"),
        ("loss", float("nan"), "a number or null"),
        ("tokens", True, "a count"),
        ("skipped", -1, "a count"),
        ("evaluated", 9, "at most 8"),
        ("seconds", -0.5, "seconds"),
        ("stopped_early", 0, "true or false"),
    ],
)
def test_each_value_is_checked(name: str, value: object, expected: str) -> None:
    (wrong,) = wrong_progress(GOOD | {"progress": GOOD["progress"] | {name: value}}, 8)  # type: ignore[operator]
    assert wrong == f"progress.{name} is {value!r}, expected {expected}"


@pytest.mark.parametrize("state", [{"progress": []}, {"progress": {}}, {"backend": 1}])
def test_what_is_not_there(state: dict[str, object]) -> None:
    assert len(wrong_progress(GOOD | state, 8)) == 1
    assert (
        len(wrong_progress({name: GOOD[name] for name in GOOD if name not in state and name != "llm_sha256"}, 8)) == 1
    )
