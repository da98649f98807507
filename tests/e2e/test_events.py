"""The log under mainrun's event names: what it says, and that a resumed run says nothing twice."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlx_training.checkpoint import CheckpointStore
from tests.e2e.workbench import Workbench, metrics

DESCRIPTIONS = ["hyperparameters_configured", "device_info", "dataset_info", "model_configured", "model_info"]
ON = "logging.events=true"


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_llm: Path) -> Workbench:
    return Workbench(tmp_path, tiny_llm, capsys)


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_every_event_has_its_fields(bench: Workbench) -> None:
    bench.use_decoder()
    bench.train(ON)
    found = events(bench.run)
    assert [event["event"] for event in found[:5]] == DESCRIPTIONS
    assert all(event["timestamp"] <= after["timestamp"] for event, after in pairwise(found))
    by_name = {event["event"]: event for event in found}
    assert by_name["hyperparameters_configured"]["batch_size"] == 4 and by_name["device_info"]["device"] == "cpu"
    assert by_name["dataset_info"]["vocab_size"] == 300 and by_name["dataset_info"]["tokens"]["train"] > 100
    assert by_name["model_configured"]["family"] == "decoder" and by_name["model_info"]["parameters_count"] > 1000
    for name, event in (("loss", "training_step"), ("eval/loss", "validation_step")):
        expected = [(record["step"], record[name]) for record in metrics(bench.run) if name in record]
        steps = [record for record in found if record["event"] == event]
        assert [(record["step"], record["loss"]) for record in steps] == expected and steps
        assert all(set(r) == {"event", "timestamp", "step", "max_steps", "loss", "elapsed_time"} for r in steps)
        assert steps[0]["max_steps"] == 4 and steps[0]["elapsed_time"] <= steps[-1]["elapsed_time"]


def test_nothing_is_said_twice(bench: Workbench) -> None:
    """The last checkpoint is lost: steps 3 and 4 are taken again."""
    bench.train(ON)
    before = events(bench.run)
    store = CheckpointStore(bench.run)
    for path in store.paths()[1:]:
        (path / "model.safetensors").write_bytes(b"")
    with (bench.run / "events.jsonl").open("a") as file:
        file.write('{"event": "training_st')  # torn by a kill
    bench.json("train", bench.config, ON, "--resume", "auto")
    again = events(bench.run)

    def told(found: list[dict[str, Any]]) -> list[Any]:
        return [(record["event"], record["step"], record.get("loss")) for record in found]

    assert told(again) == told(before)
    bench.json("train", bench.config, ON, "--resume", "auto", "training.max_steps=5", "training.schedule=constant",
               "--allow-change", "training.schedule")  # fmt: skip
    more = events(bench.run)
    assert [record["event"] for record in more[len(again) :]] == [
        "hyperparameters_configured", "training_step", "validation_step"
    ]  # fmt: skip
    assert more[-1]["elapsed_time"] > before[-1]["elapsed_time"]


def test_off_unless_asked_for(bench: Workbench) -> None:
    bench.train()
    assert not (bench.run / "events.jsonl").exists()
