"""A masked language model through the command line: training, evaluation, the doctor, and what it cannot do."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_training.config import load_config
from mlx_training.diagnostics.doctor import examine
from mlx_training.diagnostics.exam import Exam
from mlx_training.diagnostics.label_checks import supervision
from mlx_training.diagnostics.subject import from_config
from mlx_training.errors import ConfigError
from mlx_training.json_lines import read_metrics
from tests.e2e.tiny import decoder_config, language_config
from tests.e2e.workbench import CONFIG, Workbench

MASKED = (
    "model.tokenizer.special_tokens=[<mask>]",
    "model.decoder.mixers=[bidirectional]",
    "training.objective=masked",
)


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_llm: Path, backend_name: str) -> Workbench:
    bench = Workbench(tmp_path, tiny_llm, capsys, backend_name)
    bench.use_decoder()
    return bench


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_trains_resumes_and_is_evaluated(bench: Workbench, packing: str) -> None:
    given = (*MASKED, f"dataset.packing={packing}")
    whole = bench.train(*given, "training.max_steps=8", "evaluation.every_steps=4")
    assert set(whole["eval"]) == {"loss", "accuracy", "hidden_tokens"} and np.isfinite(whole["eval"]["loss"])
    losses = [record["loss"] for record in read_metrics(bench.run / "metrics.jsonl") if "loss" in record]
    halves = (*given, f"output_dir={bench.folder / 'halves'}", "training.schedule=constant")
    bench.train(*halves)
    more = bench.json("train", bench.config, *halves, "training.max_steps=6", "--resume", "auto")
    assert more["steps"] == 6 and losses[-1] < losses[0]
    again = bench.json("evaluate", bench.run)
    assert {key: again[key] for key in whole["eval"]} == pytest.approx(whole["eval"]), "always the same tokens"
    text = bench.folder / "other.txt"
    text.write_text("The series goes up, then down. " * 40)
    other = bench.json("evaluate", bench.run, "--data", text)
    assert other["hidden_tokens"] > 20 and other["loss"] != again["loss"]
    bench.json("evaluate", bench.run, "--every-checkpoint")


def test_what_a_masked_model_cannot_do(bench: Workbench) -> None:
    bench.train(*MASKED)
    for protocol in ("windows", "sliding", "lines", "position"):
        message = bench.refused(CONFIG, "evaluate", bench.run, "--protocol", protocol)
        assert f"--protocol {protocol}: " in message and "masked model" in message
    assert "cannot continue a text" in bench.refused(CONFIG, "generate", bench.run, "--prompt", "The")


def test_the_doctor_and_the_plan_know_it(bench: Workbench) -> None:
    config = load_config(bench.config, [*MASKED, "training.max_steps=60"])
    report = examine(from_config(config), full=True)
    assert not report.failed, str(report)
    exam = Exam(from_config(config))
    shown = [batch.tokens.copy() for batch in exam.batches]
    for tokens, batch in zip(shown, exam.batches, strict=True):
        np.put_along_axis(tokens, batch.positions, batch.targets, 1)
    vars(exam)["batches"] = [replace(batch, tokens=tokens) for tokens, batch in zip(shown, exam.batches, strict=True)]
    assert [finding.cause for finding in supervision(exam)] == ["labels_visible"]
    plan = bench.json("plan", bench.config, *MASKED, "training.mask_rate=0.25")
    assert plan["batch_shape"]["labels"] == 4 and plan["batch_shape"]["tokens"] == 16


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (MASKED[:2], "model.decoder.mixers: given bidirectional; the objective causal predicts the next token"),
        (MASKED[2:], "training.objective: given masked, which needs layers that see both sides"),
        ((*MASKED, "model.decoder.mixers=[causal, bidirectional]"), "is causal, bidirectional; give"),
        ((*MASKED, "evaluation.samples={prompts: [A], every_steps: 1}"), "cannot continue a text"),
        ((*MASKED, "model.decoder.positions=alibi"), "ALiBi goes with causal only"),
        (("training.mask_rate=0.5",), "objective: causal does not read it; remove it or give masked"),
        ((*MASKED, "training.mask_rate=1.0"), "training.mask_rate"),
    ],
)
def test_settings_that_do_not_agree(tmp_path: Path, overrides: tuple[str, ...], says: str) -> None:
    (tmp_path / "config.yaml").write_text(decoder_config(tmp_path / "run"))
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "config.yaml", list(overrides))
    assert says in str(error.value)


def test_other_families_are_not_masked(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(language_config(tmp_path / "run", "recurrent"))
    with pytest.raises(ConfigError, match="it trains the decoder family"):
        load_config(tmp_path / "config.yaml", ["training.objective=masked"])
