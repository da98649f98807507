"""A short relay between the backends, and that a leg which loses its moments is seen."""

from pathlib import Path

import pytest

from mlx_training.backend import Arrays
from tools.trials import relay

pytestmark = pytest.mark.usefixtures("both_backends")


def only(family: str, ending: type[relay.Ending], monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the relays."""
    monkeypatch.setattr(relay, "FAMILIES", {family: relay.FAMILIES[family]})
    monkeypatch.setattr(relay, "ENDINGS", (ending,))


SHORT = {
    "decoder": relay.Ending,
    "timeseries": relay.Signals,
    "pretrained": relay.Ending,
    "sparse": relay.Signals,
    "recurrent": relay.Ending,
    "ssm": relay.Signals,
    "kgram": relay.Ending,
}


def test_every_family_has_a_short_form() -> None:
    assert SHORT.keys() == relay.FAMILIES.keys()


@pytest.mark.parametrize(("family", "ending"), SHORT.items())
def test_the_short_form(
    family: str, ending: type[relay.Ending], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(family, ending, monkeypatch)
    report = relay.run(2, ["mlx", "torch"], 0, tmp_path)
    assert report.failures == []
    assert len(report.lines) == 4


def test_a_leg_that_loses_its_moments_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_backend.step import Step

    def forget(step: Step, arrays: Arrays) -> None:
        load(step, {name: array * (name == "step") for name, array in arrays.items()})

    load = Step.load
    monkeypatch.setattr(Step, "load", forget)
    only("decoder", relay.Signals, monkeypatch)
    failures = relay.run(2, ["mlx", "torch"], 0, tmp_path).failures
    assert {what for failure in failures for what in ("m", "v", "loss") if f": {what} is " in failure} == {
        "m",
        "v",
        "loss",
    }


def test_one_backend_alone_is_skipped(tmp_path: Path) -> None:
    assert "without torch" in relay.run(2, ["mlx"], 0, tmp_path).skipped
