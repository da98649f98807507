"""Adapters on the command line: trained, resumed, exported, merged and read back; the wrong ones refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.checkpoint import CheckpointStore
from mlx_training.quantize import quantize_directory
from tests.e2e.tiny import pretrained_config, save_tiny_llama, timeseries_config
from tests.e2e.workbench import CONFIG, DATA, Workbench, metrics

TASKS = [{"instruction": f"Add one to {i}.", "input": "", "output": f"That is {i + 1}."} for i in range(16)]
STILL = ("training.learning_rate=1e-12", "training.weight_decay=0", "training.max_steps=1")


@pytest.fixture
def tasks(bench: Workbench, backend_name: str) -> Workbench:
    """A bench with adapters on instructions."""
    bench.backend = backend_name
    bench.data.with_name("tasks.json").write_text(json.dumps(TASKS))
    bench.write(pretrained_config(bench.llm, bench.data.with_name("tasks.json"), bench.run, "instruct"))
    return bench


def eval_loss(bench: Workbench, run: Path) -> float:
    return next(record["eval/loss"] for record in reversed(metrics(bench.folder / run)) if "eval/loss" in record)


def test_trained_resumed_exported_and_read_back(tasks: Workbench) -> None:
    result = tasks.train("training.max_steps=8", "dataset.splits.fraction={validation: 0.5, test: 0.1}")
    assert "accuracy_without_series" not in result["eval"]
    losses = [record["loss"] for record in metrics(tasks.run) if "loss" in record]
    assert losses[-1] < losses[0] - 0.05
    config = ["dataset.splits.fraction={validation: 0.5, test: 0.1}"]
    for form in ("peft", "mlx-lm", "hf", "mlx"):
        written = tasks.json("checkpoint", "export", tasks.run, "--to", tasks.folder / form, "--format", form)[
            "written"
        ]
        assert written.startswith("LoRA: 4 arrays (rank 2, alpha 8) of step ")
    assert "packing" in written and "4 bits in groups of 32" in written

    best = CheckpointStore(tasks.run).best_or_latest()
    for form in ("peft", "mlx-lm"):
        tasks.train(
            *config, *STILL, f"output_dir={tasks.folder / 'from'}{form}", f"training.init_from={tasks.folder / form}"
        )
        after = CheckpointStore(tasks.folder / f"from{form}").load().model
        assert after.keys() == best.model.keys()
        for name, array in after.items():
            np.testing.assert_allclose(array, best.model[name], rtol=0, atol=1e-7)
    for form, error in (("hf", 1e-5), ("mlx", 0.5)):  # merged: fresh adapters change nothing
        tasks.train(*config, *STILL, f"output_dir={tasks.folder / 'on'}{form}", f"model.llm_id={tasks.folder / form}")
        assert eval_loss(tasks, Path(f"on{form}")) == pytest.approx(eval_loss(tasks, Path("frompeft")), abs=error)
    assert tasks.json("evaluate", tasks.run, "--split", "test")["rows"] == 2
    assert len(tasks.json("generate", tasks.run, "--rows", tasks.data.with_name("tasks.json"))["rows"]) == 16


def test_exact_resume(tasks: Workbench) -> None:
    """With dropout, DoRA and packed weights."""
    hard = ["model.lora.dora=true", "model.lora.dropout=0.3", "model.llm_weights=resident"]
    tasks.train(*hard)
    tasks.train(*hard, f"output_dir={tasks.folder / 'b'}", "--resume", tasks.run / "checkpoints/step_00000002")
    whole, parts = (CheckpointStore(folder).load() for folder in (tasks.run, tasks.folder / "b"))
    assert whole.step == parts.step == 4 and [name for name in whole.model if name.endswith("lora_magnitude_vector")]
    for name, array in whole.model.items():
        np.testing.assert_array_equal(array, parts.model[name], err_msg=name)
    assert parts.state["adapter"] == {"rank": 2, "alpha": 8.0, "dropout": 0.3, "dora": True}


def test_adapters_for_another_base(tasks: Workbench, tmp_path: Path) -> None:
    tasks.train()
    tasks.json("checkpoint", "export", tasks.run, "--to", tasks.folder / "peft", "--format", "peft")
    save_tiny_llama(tmp_path / "other", vocab_size=400)
    start = [f"training.init_from={tasks.folder / 'peft'}", f"output_dir={tasks.folder / 'b'}"]
    message = tasks.refused(DATA, "train", tasks.config, *start, f"model.llm_id={tmp_path / 'other'}")
    assert "adapters for another base" in message and "set model.llm_id" in message
    message = tasks.refused(DATA, "train", tasks.config, *start, "model.lora.alpha=16")
    assert "alpha 8, where model.lora says 16.0; set model.lora.alpha=8" in message
    message = tasks.refused(CONFIG, "train", tasks.config, *start, "model.lora.targets=[query]")
    assert "model.lora.targets: 'query' names no Linear" in message and "q_proj" in message
    quantize_directory(tasks.llm.with_name(tasks.llm.name + "-float"), tmp_path / "eight", 8, 32)
    config = (tasks.run / "config.yaml").read_text().replace(str(tasks.llm), str(tmp_path / "eight"))
    (tasks.run / "config.yaml").write_text(config)
    message = tasks.refused(DATA, "checkpoint", "export", tasks.run, "--to", tasks.folder / "x", "--format", "hf")
    assert "is another model than" in message and "put the base back" in message


def test_rows_with_series_and_formats_that_have_them_are_refused(tasks: Workbench) -> None:
    message = tasks.refused(DATA, "train", tasks.config, f"dataset.path={tasks.data}", "dataset.format=jsonl")
    assert "1 series, but a model of family pretrained reads text only" in message
    message = tasks.refused(CONFIG, "train", tasks.config, "dataset.format=npz")
    assert "the pretrained family reads corpus, text, instruct, jsonl, parquet" in message
    tasks.data.with_name("tasks.json").write_text('[{"instruction": "Add."}]')
    assert "task 1: missing field 'output'" in tasks.refused(DATA, "validate", tasks.config)


def test_a_time_series_run_with_adapters(bench: Workbench, backend_name: str) -> None:
    """Trains them beside the encoder; what is exported says what it leaves out."""
    bench.backend = backend_name
    bench.write(timeseries_config(bench.llm, bench.data, bench.run))
    lora: list[Any] = ["model.lora={rank: 2, targets: [q_proj, v_proj]}"]
    rates = "training.learning_rate={encoder: 1e-2, projector: 1e-2, lora: 1e-3}"
    bench.train(*lora, rates)
    model = CheckpointStore(bench.run).load().model
    assert sum(".lora_" in name for name in model) == 4
    assert all(np.abs(array).max() > 0 for name, array in model.items() if ".lora_B" in name)
    for form in ("peft", "hf"):
        out = bench.json("checkpoint", "export", bench.run, "--to", bench.folder / form, "--format", form)
        assert out["written"].endswith("; encoder and projector are not in it")
    parameters = bench.json("plan", bench.config, *lora, rates)["parameters"]
    assert parameters["trainable"] == sum(array.size for array in model.values())
    message = bench.refused(CONFIG, "train", bench.config, *lora, "training.learning_rate={encoder: 1, projector: 1}")
    assert "no rate for lora" in message
    bench.train(f"output_dir={bench.folder / 'plain'}")
    message = bench.refused(CONFIG, "checkpoint", "export", bench.folder / "plain", "--to", "x", "--format", "peft")
    assert "family timeseries; --format peft holds family adapters only. Give --format opentslm" in message
