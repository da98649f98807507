"""From a YAML to a trained and evaluated run, on every installed backend."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training import evaluate, trainer
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import load_config
from mlx_training.data.rows import read_rows, write_rows
from tests.e2e.tiny import rows
from tests.e2e.workbench import Workbench, contents, metrics

EVAL = {"accuracy", "macro_f1", "invalid", "rows", "chance", "accuracy_without_series"}
OPTIONS = ("rising", "falling")


def test_a_run_and_what_it_leaves(tiny: Workbench) -> None:
    result = tiny.train("training.max_steps=8", "checkpoint.keep=2", "evaluation.metrics=[loss,accuracy,macro_f1]")
    assert set(result) == {"run", "backend", "steps", "loss", "seconds", "eval"}
    assert (result["run"], result["backend"], result["steps"]) == (str(tiny.run), tiny.backend, 8)
    assert set(result["eval"]) == EVAL | {"by_type"} and result["eval"]["rows"] == 8
    assert result == json.loads((tiny.run / "result.json").read_text())

    logged = metrics(tiny.run)
    training = [record for record in logged if "loss" in record]
    assert [record["step"] for record in training] == list(range(1, 9))
    assert set(training[0]) == {"step", "loss", "grad_norm", "lr/encoder", "lr/projector"}
    assert training[-1]["loss"] == result["loss"] < training[0]["loss"]
    rates = [record["lr/encoder"] for record in training]
    assert rates[0] == pytest.approx(0.005) and rates[1] == pytest.approx(0.01) and rates[2:] == sorted(rates[2:])[::-1]
    evaluations = [record for record in logged if "eval/loss" in record]
    assert [record["step"] for record in evaluations] == [2, 4, 6, 8]
    assert set(evaluations[0]) == {"step", "eval/loss", "eval/accuracy", "eval/macro_f1"}

    best = min(evaluations, key=lambda record: record["eval/loss"])["step"]
    kept = {f"step_{step:08d}" for step in (6, 8, best)}
    assert {path.name for path in CheckpointStore(tiny.run).paths()} == kept
    assert (tiny.run / "checkpoints/best").read_text().strip() == f"step_{best:08d}"
    assert {path.name for path in tiny.run.iterdir()} == {
        *("config.yaml", "env.json", "metrics.jsonl", "checkpoints", "result.json", "predictions_test.jsonl")
    }
    resolved = load_config(tiny.run / "config.yaml")
    assert resolved.training.max_steps == 8 and resolved.training.betas == (0.9, 0.999)
    environment = json.loads((tiny.run / "env.json").read_text())
    assert (environment["backend"], environment["seed"]) == (tiny.backend, 7)
    assert environment["versions"]["packages"]["numpy"] and "git" in environment
    assert len(environment["llm_sha256"]) == 64
    predictions = [json.loads(line) for line in (tiny.run / "predictions_test.jsonl").read_text().splitlines()]
    assert len(predictions) == 8 and set(predictions[0]) == {"id", "type", "answer", "prediction"}


def test_it_learns_and_reads_the_series(tiny: Workbench) -> None:
    """The random LM knows no words; with a trained head the model answers, and only with the series."""
    write_rows(tiny.data, rows(64))
    result = tiny.train(
        *("training.max_steps=80", "model.train_lm_head=true", "training.learning_rate=0.02"),
        *("dataset.stats_in_text=false", "evaluation.every_steps=40", "checkpoint.every_steps=40"),
    )
    assert result["eval"]["accuracy"] == 1.0 and result["eval"]["invalid"] == 0 and result["eval"]["macro_f1"] == 1.0
    assert result["eval"]["accuracy_without_series"] <= result["eval"]["chance"] <= 0.8
    assert result["eval"]["by_type"] == {"a": 1.0, "b": 1.0}

    predicted = [json.loads(line) for line in (tiny.run / "predictions_test.jsonl").read_text().splitlines()]
    assert all(line["prediction"].strip() == line["answer"] for line in predicted)
    unseen = tiny.folder / "unseen.jsonl"
    write_rows(unseen, rows(10, start=1000))
    before = contents(tiny.run)
    scores = tiny.json("evaluate", tiny.run, "--data", unseen)
    assert scores["accuracy"] == 1.0 and scores["rows"] == 10 and set(scores) == EVAL | {"by_type"}
    assert contents(tiny.run).items() > before.items()  # nothing but its predictions were added
    assert tiny.json("evaluate", tiny.run, "--split", "train")["rows"] == 32
    assert tiny.json("evaluate", tiny.run) == result["eval"] == tiny.json("evaluate", tiny.run, "--split", "test")
    answers = tiny.json("generate", tiny.run, "--rows", unseen)["rows"]
    assert [row["id"] for row in answers] == [row.id for row in read_rows(unseen)]
    assert all(row["prediction"].strip() == row["answer"] for row in answers)


def test_evaluating_a_file_does_not_replace_the_predictions_of_a_split(tiny: Workbench) -> None:
    tiny.train("training.max_steps=1")
    before = contents(tiny.run)
    write_rows(tiny.folder / "test.jsonl", rows(3))
    assert tiny.json("evaluate", tiny.run, "--data", "test.jsonl")["rows"] == 3
    assert contents(tiny.run).items() > before.items()


def test_a_run_is_used_where_its_training_data_is_not(tiny: Workbench) -> None:
    tiny.train("training.max_steps=1")
    write_rows(tiny.folder / "new.jsonl", rows(3))
    tiny.data.unlink()
    assert len(tiny.json("generate", tiny.run, "--rows", "new.jsonl")["rows"]) == 3
    assert tiny.json("evaluate", tiny.run, "--data", "new.jsonl")["rows"] == 3
    assert "no data file" in tiny.refused(3, "evaluate", tiny.run, "--split", "test")


# Course of training


def test_accumulated_micro_batches_are_one_batch(tiny: Workbench) -> None:
    losses = []
    for size, accumulated in ((16, 1), (4, 4)):  # every step sees all 16 rows
        batches = f"training.batch_size={size}", f"training.grad_accumulation_steps={accumulated}"
        tiny.train(*batches, f"output_dir=run{size}")
        losses.append([record["loss"] for record in metrics(Path(f"run{size}")) if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_epochs(tiny: Workbench) -> None:
    epochs = "training.max_steps=null", "training.num_epochs=3", "evaluation.every_steps=null", "training.batch_size=5"
    result = tiny.train(*epochs, "checkpoint.every_steps=null")
    assert result["steps"] == 3 * 4  # 16 rows: 4 batches, the last of one row
    assert [record["step"] for record in metrics(tiny.run) if "eval/loss" in record] == [4, 8, 12]
    tokens = CheckpointStore(tiny.run).load().state["progress"]["tokens"]
    once = tiny.train(*epochs, "training.num_epochs=1", "output_dir=once")
    assert once["steps"] == 4 and tokens == 3 * CheckpointStore("once").load().state["progress"]["tokens"]


def test_early_stopping(tiny: Workbench) -> None:
    stop = "training.early_stopping_patience=2", "training.early_stopping_min_delta=100", "training.max_steps=20"
    result = tiny.train(*stop)
    assert result["steps"] == 6  # the evaluation at 2 is the best, those at 4 and 6 are not 100 better
    assert (tiny.run / "checkpoints/best").read_text().strip() == "step_00000002"
    assert tiny.train(*stop, "--resume", "auto") == result
    assert len(metrics(tiny.run)) == 6 + 3


# What else can be trained


def test_a_decoder_on_text(tiny: Workbench) -> None:
    tiny.use_decoder()
    result = tiny.train("training.max_steps=8")
    assert result["backend"] == tiny.backend
    assert {"loss", "perplexity", "bits_per_byte", "tokens"} <= set(result["eval"])
    assert result["loss"] < metrics(tiny.run)[0]["loss"]
    assert tiny.json("evaluate", tiny.run) == result["eval"]
    assert tiny.json("evaluate", tiny.run, "--split", "validation")["tokens"] != result["eval"]["tokens"]
    assert "is a language model; give it --prompt" in tiny.refused(3, "generate", tiny.run, "--rows", tiny.data)
    assert "no text in field 'text'" in tiny.refused(3, "evaluate", tiny.run, "--data", tiny.data)
    text = tiny.folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"The {i} is {i + 1} less one."}) + "\n" for i in range(60)))
    from_file = tiny.folder / "from_file.yaml"
    from_file.write_text(
        f"extends: {tiny.config.name}\noutput_dir: {tiny.folder / 'from_file'}\n"
        f"model: {{tokenizer: {tiny.run / 'tokenizer'}}}\n"
        "dataset: {format: text, path: text.jsonl, num_samples_train: null, num_samples_validation: null,"
        " num_samples_test: null}\n"
    )
    result = tiny.json("train", from_file)
    assert tiny.json("evaluate", tiny.folder / "from_file") == result["eval"]
    assert not (tiny.folder / "from_file/tokenizer").exists()


@pytest.mark.parametrize("family", ["recurrent", "kgram"])
def test_families_without_attention(tiny: Workbench, family: str) -> None:
    tiny.use_language(family)
    result = tiny.train("training.max_steps=8")
    assert result["loss"] < metrics(tiny.run)[0]["loss"]
    assert tiny.json("evaluate", tiny.run) == result["eval"]
    assert tiny.json("validate", tiny.config)["family"] == tiny.json("plan", tiny.config)["family"] == family
    assert tiny.main("checkpoint", "verify", tiny.run)[0] == 0
    message = tiny.refused(2, "checkpoint", "export", tiny.run, "--format", "hf", "--to", tiny.folder / "hf")
    assert (
        f"family {family}; --format hf holds family decoder or ssm or adapters only. No format holds family {family}"
        in message
    )


def test_a_decoder_is_resumed_with_its_own_tokenizer(tiny: Workbench) -> None:
    tiny.use_decoder()
    tiny.train("output_dir=whole", "training.max_steps=4")
    tiny.train("training.max_steps=2", "training.schedule=constant")
    tiny.train("output_dir=constant", "training.schedule=constant")
    tiny.train("training.schedule=constant", "--resume", "auto")
    names = [f"checkpoints/step_00000004/{part}.safetensors" for part in ("model", "optimizer")]
    for name in names:
        assert (tiny.run / name).read_bytes() == Path("constant", name).read_bytes()
        assert (tiny.run / name).read_bytes() != Path("whole", name).read_bytes()


def test_rows_without_series(tiny: Workbench) -> None:
    """Alone in their batch, and with nothing to train on at all."""
    plain = [replace(row, series=(), series_text=()) for row in rows(32)]
    for given in ([a if i % 3 else b for i, (a, b) in enumerate(zip(rows(32), plain, strict=True))], plain):
        write_rows(tiny.data, given)
        result = tiny.train("training.batch_size=1", f"output_dir=run{len(given[1].series)}")
        assert result["steps"] == 4 and result["loss"] > 0


def test_a_trained_head(tiny: Workbench) -> None:
    rates = "training.learning_rate={encoder: 1e-3, projector: 0, lm_head: 1e-2}"
    tiny.train("model.train_lm_head=true", rates, "checkpoint.keep=9")
    first, last = (CheckpointStore(tiny.run).load(path).model for path in CheckpointStore(tiny.run).paths())
    assert first["lm_head.weight"].shape == (384, 32)
    moved = {name for name in first if not np.array_equal(first[name], last[name])}
    assert "lm_head.weight" in moved and "encoder.pos_embed" in moved
    assert not any(name.startswith("projector.") for name in moved)


@pytest.mark.parametrize(
    ("override", "tolerance"),
    [("training.precision=bfloat16", 0.05), ("model.llm_weights=resident", 1e-3), ("model.layout=opentslm", None)],
)
def test_other_ways_to_run(tiny: Workbench, override: str, tolerance: float | None) -> None:
    usual = tiny.train("output_dir=usual")
    scale = ["model.encoder.numeric_scale=false"] if tolerance is None else []
    result = tiny.train(override, *scale)
    if tolerance is not None:
        assert result["loss"] == pytest.approx(usual["loss"], rel=tolerance)
    else:
        assert result["loss"] != usual["loss"]
    assert {array.dtype for array in CheckpointStore(tiny.run).load().model.values()} == {np.dtype(np.float32)}
    assert tiny.json("evaluate", tiny.run) == result["eval"]


# Formats


def write_npz(path: Path) -> str:
    time = np.arange(12)
    windows = np.stack([np.stack([slope * time, np.sin(time + slope)], axis=-1) for slope in [1, -1] * 16])
    np.savez(path, X=windows, y=np.array([0, 1] * 16), labels=np.array(OPTIONS), subject=np.arange(32) // 2)
    return "dataset={format: npz, splits: {fraction: null, group: {validation: [1, 2], test: [3, 4, 5]}}}"


def write_ts(path: Path) -> str:
    lines = ["@univariate false", "@dimensions 2", "@classLabel true rising falling", "@data"]
    for row in rows(32):
        values = ",".join(f"{v:.3f}" for v in row.series[0])
        lines.append(f"{values}:{values[: values.rindex(',')]}:{row.answer}")
    path.write_text("\n".join(lines) + "\n")
    return "dataset={format: auto, options: {question: Up or down, channel_names: [a, b]}}"


def write_csv(path: Path) -> str:
    lines = ["name,kind,label," + ",".join(f"v{i}" for i in range(14))]
    for row in rows(32):
        cells = [f"{v:.3f}" for v in row.series[0]]
        lines.append(",".join([row.id, row.type, row.answer, *cells, *[""] * (14 - len(cells))]))
    path.write_text("\n".join(lines) + "\n")
    return "dataset={format: csv, options: {value_columns: [v0, v13], id_column: name, type_column: kind}}"


def write_canonical(path: Path) -> str:
    write_rows(path, rows(32))
    return f"dataset={{format: {path.suffix[1:]}}}"


@pytest.mark.parametrize(
    ("name", "write", "num_test"),
    [
        ("windows.npz", write_npz, 6),
        ("recordings.ts", write_ts, 8),
        ("table.csv", write_csv, 8),
        ("rows.parquet", write_canonical, 8),
    ],
)
def test_formats(tiny: Workbench, name: str, write: Any, num_test: int) -> None:
    override = write(tiny.folder / name)
    result = tiny.train(f"dataset.path={name}", override)
    assert result["eval"]["rows"] == num_test
    assert 0.3 < result["eval"]["chance"] < 1
    assert tiny.json("evaluate", tiny.run, "--data", name)["rows"] == 32
    assert tiny.json("validate", tiny.config, f"dataset.path={name}", override)["rows"]["test"] == num_test


# Weights & Biases


def test_a_run_does_not_need_wandb(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = tiny.main("train", tiny.config, "logging.wandb=offline")
    assert code == 0 and err.count("wandb: not logging") == 1 and "metrics.jsonl has everything" in err
    assert len(metrics(tiny.run)) == 4 + 2


def test_seconds_include_the_last_evaluation(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    began, ended = [], []
    claim, measure = trainer.claim_run_directory, evaluate.Evaluator.during_training

    def claimed(*args: Any) -> Path:
        began.append(time.monotonic())
        return claim(*args)

    def slow(self: evaluate.Evaluator) -> dict[str, float]:
        values = measure(self)
        time.sleep(0.1)
        ended.append(time.monotonic())
        return values

    monkeypatch.setattr(trainer, "claim_run_directory", claimed)
    monkeypatch.setattr(evaluate.Evaluator, "during_training", slow)
    assert tiny.train()["seconds"] >= ended[-1] - began[0] - 0.01  # it is rounded
