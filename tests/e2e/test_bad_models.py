"""Language models and checkpoints that are missing, damaged or do not fit: a clear message, and nothing lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.checkpoint import CheckpointStore
from tests.e2e.tiny import save_tiny_llama
from tests.e2e.workbench import CONFIG, DATA, Workbench, flip_a_bit, truncate

# The language model


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids that were looked for on the hub."""
    hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []

    def snapshot_download(repo_id: str, **_: Any) -> str:
        asked.append(repo_id)
        raise OSError("no network in tests")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(
    "llm_id", ["models/lama", "modles/llama", "./models/lama", "models/llama/../lama", "llama", "~/no/such/llama"]
)
def test_a_mistyped_path_is_never_looked_up_on_the_hub(bench: Workbench, no_hub: list[str], llm_id: str) -> None:
    shutil.copytree(bench.llm, bench.folder / "models/llama")
    message = bench.refused(CONFIG, "train", bench.config, f"model.llm_id={llm_id}")
    assert not no_hub
    assert f"there is no directory {llm_id!r}" in message and "Give an existing directory" in message
    if llm_id in ("models/lama", "modles/llama"):
        assert "did you mean models/llama?" in message


def test_a_hub_id_that_cannot_be_had(bench: Workbench, no_hub: list[str]) -> None:
    message = bench.refused(CONFIG, "train", bench.config, "model.llm_id=someone/something")
    assert no_hub == ["someone/something"]
    assert "no network in tests" in message and "give the directory" in message


def test_vocabularies_that_disagree(bench: Workbench) -> None:
    llm = save_tiny_llama(bench.folder / "llm", vocab_size=301, tokenizer_size=302)
    message = bench.refused(DATA, "train", bench.config, f"model.llm_id={llm}")
    assert "the tokenizer has 302 ids but the model embeds 301" in message and "Use the tokenizer" in message
    assert bench.no_step_was_taken
    llm = save_tiny_llama(bench.folder / "padded", vocab_size=302, tokenizer_size=301)  # an embedding padded to a size
    assert bench.train(f"model.llm_id={llm}", "training.max_steps=1")["steps"] == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokenizer.json", "looked for tokenizer.json and tokenizer.model"),
        ("tokenizer_config.json", ""),  # config.json names BOS and EOS too
        ("model.safetensors", "holds no model*.safetensors"),
        ("config.json", "has no config.json"),
    ],
)
def test_missing_files_of_the_language_model(bench: Workbench, name: str, words: str) -> None:
    llm = Path(shutil.copytree(bench.llm, bench.folder / "llm"))
    (llm / name).unlink()
    if not words:
        assert bench.train(f"model.llm_id={llm}", "training.max_steps=1")["steps"] == 1
        return
    message = bench.refused(DATA, "train", bench.config, f"model.llm_id={llm}")
    assert words in message and str(llm) in message
    assert bench.no_step_was_taken


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json"])
def test_cut_off_files_of_the_language_model(bench: Workbench, name: str) -> None:
    llm = Path(shutil.copytree(bench.llm, bench.folder / "llm"))
    content = (llm / name).read_bytes()
    (llm / name).write_bytes(content[: len(content) // 2])
    message = bench.refused(DATA, "train", bench.config, f"model.llm_id={llm}")
    assert str(llm / name) in message
    assert bench.no_step_was_taken


@pytest.mark.parametrize("content", ["{cut", "[]", "{}", '{"weight_map": {"a": 3}}'])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_garbled_files_of_the_language_model(bench: Workbench, name: str, content: str) -> None:
    llm = Path(shutil.copytree(bench.llm, bench.folder / "llm"))
    (llm / name).write_text(content)
    if name == "tokenizer_config.json" and content[-2:] in ("{}", "}}"):
        assert bench.train(f"model.llm_id={llm}", "training.max_steps=1")["steps"] == 1
        return
    code, _, err = bench.main("train", bench.config, f"model.llm_id={llm}")
    assert code in (CONFIG, DATA) and err.startswith("error: ") and str(llm) in err
    assert bench.no_step_was_taken


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", []),
        ("hidden_size", "32"),
        ("vocab_size", None),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 3),
        ("head_dim", -1),
        ("rms_norm_eps", "small"),
        ("rope_theta", {}),
        ("rope_scaling", 3),
        ("tie_word_embeddings", 1),
        ("quantization", True),
        ("eos_token_id", "x"),
    ],
)
def test_values_that_no_language_model_has(bench: Workbench, key: str, value: object) -> None:
    llm = Path(shutil.copytree(bench.llm, bench.folder / "llm"))
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps({**config, key: value}))
    message = bench.refused(CONFIG, "train", bench.config, f"model.llm_id={llm}")
    assert str(llm / "config.json") in message and key in message
    assert bench.no_step_was_taken


def test_another_language_model_than_the_soft_prompt_was_trained_for(bench: Workbench) -> None:
    bench.train()
    llm = Path(shutil.copytree(bench.llm, bench.folder / "llm"))
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))
    argv = ("train", bench.config, f"model.llm_id={llm}", "--resume", "auto")
    assert "(--allow-change model.llm_id)" in bench.refused(CONFIG, *argv)
    message = bench.refused(DATA, *argv, "--allow-change", "model.llm_id")
    assert "was trained with another frozen LM" in message and "set model.llm_id" in message


# Checkpoints

MISFITS = [
    ("model.encoder.num_layers=2", "missing: encoder.layers.1.norm2.bias (8,)"),
    ("model.encoder.numeric_scale=false", "unknown: encoder.scale_in.weight (8, 2)"),
    ("model.encoder.ffn_size=12", "shape: encoder.layers.0.linear1.bias is (8,), expected (12,)"),
]


@pytest.mark.parametrize(("override", "problem"), MISFITS)
def test_parameters_that_do_not_fit(bench: Workbench, override: str, problem: str) -> None:
    bench.train()
    older, newest = (bench.run / f"checkpoints/step_0000000{number}" for number in (2, 4))
    other, key = f"output_dir={bench.folder / 'other'}", override.partition("=")[0]
    assert f"(--allow-change {key})" in bench.refused(CONFIG, "train", bench.config, override, "--resume", "auto")
    for step, argv in (
        (newest, ["--resume", "auto", "--allow-change", key]),
        (older, ["--resume", older, "--allow-change", key]),
        (newest, [f"training.init_from={bench.run}", other]),
    ):
        message = bench.refused(DATA, "train", bench.config, override, *argv)
        assert problem in message and str(step) in message and "model section" in message
    assert not (bench.folder / "other/config.yaml").exists()
    assert bench.train("--resume", "auto")["steps"] == 4


@pytest.mark.parametrize(("fault", "problem"), [("missing", "missing"), ("extra", "unknown"), ("shape", "shape")])
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_checkpoints_that_do_not_fit(bench: Workbench, fault: str, problem: str, part: str) -> None:
    """Whole, with right sums, but of another program."""
    bench.train()
    checkpoint = CheckpointStore(bench.run).load("latest")
    arrays = {"model": checkpoint.model, "optimizer": checkpoint.optimizer}
    name = "encoder.pos_embed" + (".m" if part == "optimizer" else "")
    if fault == "missing":
        del arrays[part][name]
    elif fault == "extra":
        arrays[part][name + ".old"] = np.zeros(3, np.float32)
    else:
        arrays[part][name] = arrays[part][name][:, :4]
    other = CheckpointStore(bench.folder / "other")
    path = other.save(4, arrays["model"], arrays["optimizer"], checkpoint.state, best=True, keep=1)
    message = bench.refused(DATA, "train", bench.config, "--resume", path, f"output_dir={bench.folder / 'new'}")
    assert f"{problem}: {name}" in message and str(path) in message
    if part == "model":
        shutil.copy(bench.run / "config.yaml", bench.folder / "other")
        assert f"{problem}: {name}" in bench.refused(DATA, "evaluate", bench.folder / "other")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint(bench: Workbench, name: str, damage: Callable[[Path], None]) -> None:
    bench.train()
    checkpoints = bench.run / "checkpoints"
    damage(checkpoints / "step_00000004" / name)
    message = bench.refused(DATA, "train", bench.config, "--resume", checkpoints / "step_00000004")
    assert name in message and f"--resume {checkpoints / 'step_00000002'}" in message

    code, _, err = bench.main("train", bench.config, "--resume", "auto")  # goes on from the one before
    assert code == 0 and f"using the older checkpoint {checkpoints / 'step_00000002'}" in err
    assert bench.json("evaluate", bench.run)["rows"] == 8

    for step in checkpoints.glob("step_*"):
        truncate(step / "model.safetensors")
    for argv in (["train", bench.config, "--resume", "auto"], ["evaluate", bench.run]):
        assert "model.safetensors" in bench.refused(DATA, *argv)


def test_what_is_no_run(bench: Workbench) -> None:
    (bench.folder / "empty").mkdir()
    for run, words in (("empty", "no config.yaml"), ("nowhere", "is not a directory"), ("rows.jsonl", "directory")):
        for argv in (["evaluate", run], ["generate", run, "--rows", bench.data]):
            assert words in bench.refused(DATA, *argv)
    assert "nothing to start from" in bench.refused(DATA, "train", bench.config, "training.init_from=empty")
    assert "there is no such file or directory" in bench.refused(DATA, "train", bench.config, "--resume", "nowhere")
    assert "not a checkpoint directory" in bench.refused(DATA, "train", bench.config, "--resume", "empty")
    assert not Path(bench.run).exists()
