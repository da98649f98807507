"""The command `doctor`: configurations and runs, one backend or both, JSON and exit codes; and `plan`."""

import json
from pathlib import Path

import pytest

from mlx_training import cli
from mlx_training.data.rows import write_rows
from tests.doctor.cases import healthy, saw_rows, write_timeseries
from tests.e2e.test_curriculum import raw_rows
from tests.e2e.tiny import save_tiny_llama

FIELDS = {"subject", "backend", "healthy", "cause", "counts", "summary", "seconds", "findings"}


def command(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    capsys.readouterr()
    code = cli.main([str(word) for word in argv])
    return code, *capsys.readouterr()


def test_a_healthy_configuration(capsys: pytest.CaptureFixture[str], backend_name: str, tmp_path: Path) -> None:
    code, out, err = command(capsys, "doctor", write_timeseries(tmp_path), "--backend", backend_name, "--json")
    report = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert report.keys() == FIELDS and report["healthy"] and report["cause"] is None
    assert report["backend"] == backend_name
    assert sum(report["counts"].values()) == len(report["findings"]) >= 35
    assert "pass  gradient reach" in err  # findings as they come, away from the result
    assert not (tmp_path / "run").exists()


def test_a_fault_in_the_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = saw_rows(60)
    write_rows(tmp_path / "rows.jsonl", rows)
    config = write_timeseries(tmp_path)
    write_rows(tmp_path / "rows.jsonl", rows + rows[:20])
    code, out, _ = command(capsys, "doctor", config)
    assert code == 1
    assert "rows of test are training rows too" in out or "rows of validation are training rows too" in out
    assert "cause: rows of the training split stand in another split too [leakage]" in out
    assert "change: split by group" in out and "likeliest cause: leakage" in out


def test_overrides_and_both_backends(
    capsys: pytest.CaptureFixture[str], both_backends: list[str], tmp_path: Path
) -> None:
    config = write_timeseries(tmp_path)
    code, out, _ = command(
        capsys,
        "doctor",
        config,
        "training.learning_rate={encoder: 1e-2, projector: 0, lm_head: 1e-2}",
        "--backend",
        "both",
        "--json",
    )
    result = json.loads(out)
    assert code == 1 and not result["healthy"] and result["cause"] == "learning_rate_zero"
    assert [report["backend"] for report in result["reports"]] == both_backends
    for report in result["reports"]:
        (failed,) = [finding for finding in report["findings"] if finding["status"] == "fail"]
        assert "projector.linear.weight" in failed["where"] and "encoder.patch_embed.weight" not in failed["where"]


def test_a_run(capsys: pytest.CaptureFixture[str], backend_name: str, tmp_path: Path) -> None:
    run = healthy("run", backend_name, tmp_path)
    code, out, _ = command(capsys, "doctor", run)
    assert code == 0 and "pass  series matter" in out and "pass  loss curve" in out
    assert command(capsys, "doctor", run, "training.max_steps=3")[0] == 2

    weights = next((run / "checkpoints").glob("step_*/model.safetensors"))
    for file in (run / "checkpoints").glob("step_*/model.safetensors"):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    code, out, _ = command(capsys, "doctor", run, "--json")
    report = json.loads(out)
    assert (code, report["cause"]) == (1, "checkpoint_damaged")
    assert weights.name in report["findings"][-1]["figure"]


def test_errors_of_the_user(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = command(capsys, "doctor", tmp_path / "no.yaml")
    assert code == 2 and err.startswith("error: ")
    code, _, err = command(capsys, "doctor", tmp_path)
    assert code in (2, 3) and "config.yaml" in err
    code, _, err = command(capsys, "doctor", "quick_tset")
    assert code == 2 and "quick_test" in err


def test_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = write_timeseries(tmp_path)
    code, out, _ = command(capsys, "plan", config, "--json")
    result = json.loads(out)
    assert code == 0 and result["steps"] == 200 and result["parameters"]["trainable"] > 0
    (tmp_path / "rows.jsonl").unlink()
    overrides = ("training.max_steps=null", "training.num_epochs=3")
    code, out, _ = command(capsys, "plan", config, *overrides, "--json")
    assert code == 0 and json.loads(out)["steps"] == "unknown"
    code, out, _ = command(capsys, "plan", config)
    assert code == 0 and " train, " in out and "time, " in out


@pytest.mark.parametrize("number", range(1, 6))
def test_no_false_alarm_over_the_curriculum(
    capsys: pytest.CaptureFixture[str], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The five stages as shipped but for the language model and the encoder's size, on rows in each raw format."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    made = [raw_rows(i) for i in range(30)]
    for i, row in enumerate(made):  # raw_rows gives all of them one answer
        row["sleep_cot"]["rationale"] = ("Slow waves. Answer: Wake", "Fast waves. Answer: REM sleep")[i % 2]
        row["ecg_qa_cot"]["rationale"] = ("It is regular. Answer: yes", "It is not. Answer: no")[i % 2]
    for name in made[0]:
        text = "".join(json.dumps(row[name]) + "\n" for row in made)
        (tmp_path / "data" / f"{name}.jsonl").write_text(text)
    llm = save_tiny_llama(tmp_path / "llm")
    overrides = [f"model.llm_id={llm}", "training.init_from=null", "model.encoder={num_layers: 1, ffn_size: 64}"]
    code, out, err = command(capsys, "doctor", f"timeseries/curriculum/stage{number}", *overrides)
    assert code == 0, out + err


DATA = {
    "timeseries/har": "har_uci/har_total_acc_train.npz",
    "timeseries/japanesevowels": "japanesevowels/JapaneseVowels_TRAIN.ts",
    "timeseries/timeseriesexam": "timeseriesexam/qa_dataset.json",
}
SLOW = {(name, level) for name in ("quick_test", "tiny_llama", *DATA) for level in ("--quick", "--full")} - {
    ("quick_test", "--quick"),
}


@pytest.mark.parametrize(
    ("config", "level"),
    [
        pytest.param(config, level, marks=[pytest.mark.proof] if (config, level) in SLOW else [])
        for config in ("quick_test", "tiny_llama", *DATA)
        for level in ("--quick", "--full")
    ],
)
def test_no_false_alarm_over_shipped_configurations(
    capsys: pytest.CaptureFixture[str], config: str, level: str, backend_name: str, request: pytest.FixtureRequest
) -> None:
    overrides = []
    if config in DATA:
        overrides = [f"dataset.path={request.getfixturevalue('shared_data') / DATA[config]}"]
    code, out, err = command(capsys, "doctor", config, *overrides, "--backend", backend_name, level)
    assert code == 0, out + err
