"""The step profile: every phase of a real step, on each backend, and the tool around it."""

import json

import pytest

from mlx_training.config import load_config
from mlx_training.diagnostics.machine import Machine
from mlx_training.diagnostics.profile import ADVICE, PHASES, full_subject, profile_subject, show
from mlx_training.errors import DataError
from tests.e2e.workbench import Workbench
from tools import profile_step


@pytest.fixture(autouse=True)
def fixed_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mlx_training.diagnostics.machine.measure", lambda name, *_, **__: Machine(name, "cpu", 1, 1e11, 1e10)
    )


def test_phases_add_up_to_a_step(tiny: Workbench) -> None:
    subject = full_subject(load_config(tiny.config, ["training.grad_accumulation_steps=2"]))
    before = subject.backend.export(subject.model)
    report = profile_subject(subject, num_steps=3)
    after = subject.backend.export(subject.model)
    assert all((before[name] == after[name]).all() for name in before)
    assert "hidden" not in vars(subject.model) and "inputs" not in vars(subject.model)

    seconds = report["seconds"]
    assert tuple(seconds) == PHASES
    assert all(value > 0 for value in seconds.values()), seconds
    assert report["sum_seconds"] == pytest.approx(sum(seconds.values()) - seconds["data"])
    assert report["compiled_saves_seconds"] == pytest.approx(report["sum_seconds"] - report["step_seconds"])
    assert 0.05 < report["sum_seconds"] / report["step_seconds"] < 20, report
    assert report["batch_shape"]["rows"] == 4
    assert 0 < report["tokens_per_second"]["supervised"] < report["tokens_per_second"]["all"]
    assert 0 < report["gflops_per_second"]["achieved"] < 100 == report["gflops_per_second"]["matmul_peak"]
    assert report["peak_memory_bytes"] > 1e7
    assert (report["num_compilations"] > 0) == (tiny.backend == "mlx")
    assert report["advice"] == ADVICE[report["largest"]]
    assert all(name in show(report) for name in PHASES)


def test_a_decoder_has_the_same_phases(tiny: Workbench) -> None:
    tiny.use_decoder()
    assert tuple(profile_subject(full_subject(load_config(tiny.config)), num_steps=2)["seconds"]) == PHASES


def test_the_tool_draws_and_traces(tiny: Workbench) -> None:
    picture, recorded = tiny.folder / "phases.png", tiny.folder / "trace.json"
    argv = [str(tiny.config), "--steps", "2", "training.batch_size=2", "--json", "--plot", str(picture)]
    code = profile_step.main([*argv, "--trace", str(recorded)])
    out, err = tiny.capsys.readouterr()
    assert json.loads(out)["batch_shape"]["rows"] == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    if tiny.backend == "torch":
        assert code == 0
        assert json.loads(recorded.read_text())["traceEvents"]
    elif code:
        assert "Metal" in err and "Traceback" not in err


def test_the_tool_reports_errors_as_errors(tiny: Workbench) -> None:
    assert profile_step.main([str(tiny.config), "dataset.path=absent.jsonl"]) == DataError.exit_code
    assert "absent.jsonl" in tiny.capsys.readouterr().err
