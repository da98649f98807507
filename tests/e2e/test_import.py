"""`mlx-training checkpoint import`, and exported decoders as the frozen LM of other runs, on both backends."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from mlx_training.checkpoint import CheckpointStore
from tests.e2e.tiny import decoder_config, language_config
from tests.e2e.workbench import CONFIG, DATA, Workbench, metrics

GPT2 = (
    "model.decoder.norm=layernorm",
    "model.decoder.positions=learned",
    "model.decoder.activation=gelu_tanh",
    "model.decoder.attention_bias=true",
    "model.decoder.mlp_bias=true",
)
LLAMA = (
    "model.decoder={hidden_size: 32, intermediate_size: 64, num_layers: 1, num_heads: 2, context_length: 64}",
    "model.tokenizer.train=384",
)
MAMBA = ("model.ssm={mixers: [mamba], num_layers: 1, head_dim: 64, num_filters: 24, num_heads: 4, window: 256}",)
TEXT = "The line rises. The line falls. The line is flat and then it rises again, and falls.\n"


def exported(bench: Workbench, family: str, *overrides: str) -> Path:
    """A run of this shape as a directory in Hugging Face's format."""
    bench.write(language_config(bench.run, family))
    bench.train(*overrides)
    bench.json("checkpoint", "export", bench.run, "--to", "hf", "--format", "hf")
    (bench.folder / "book.txt").write_text(TEXT * 40)
    return Path("hf")


@pytest.mark.parametrize(
    ("family", "shape"), [("decoder", GPT2), ("decoder", LLAMA), ("ssm", MAMBA)], ids=["gpt2", "llama", "mamba"]
)
def test_an_exported_run_comes_back(tiny: Workbench, family: str, shape: tuple[str, ...]) -> None:
    exported(tiny, family, *shape)
    imported = tiny.json("checkpoint", "import", "hf", "--to", "back")
    assert imported["family"] == family
    best, back = (CheckpointStore(Path(run)).best_or_latest().model for run in (tiny.run, "back"))
    assert [*back] == [*best] and all(back[name].tobytes() == best[name].tobytes() for name in best)
    assert tiny.json("checkpoint", "verify", "back")["shapes"] == "checked"
    on = ["--backend", tiny.backend]
    book = ["--data", "book.txt", "--context-length", 16]
    scores = [tiny.json("evaluate", run, *book, *on)["loss"] for run in (tiny.run, "back")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)  # batches are of other sizes
    ask = ["--prompt", "The line", "--max-new-tokens", 5, *on]
    texts = [tiny.json("generate", run, *ask)["samples"] for run in (tiny.run, "back")]
    assert texts[0] == texts[1]
    tiny.json("checkpoint", "export", "back", "--to", "again", "--format", "hf")
    once, twice = (load_file(f"{folder}/model.safetensors") for folder in ("hf", "again"))
    assert once.keys() == twice.keys() and all((once[name] == twice[name]).all() for name in once)


def test_an_imported_model_is_trained_further(tiny: Workbench) -> None:
    exported(tiny, "decoder", *GPT2)
    tiny.json("checkpoint", "import", "hf", "--to", "back")
    further = ["training.max_steps=2", "training.batch_size=4", "dataset.path=book.txt"]
    further += ["logging.every_steps=1", f"backend={tiny.backend}"]
    tiny.json("train", "back/config.yaml", "output_dir=further", *further)
    first = metrics(Path("further"))[0]["loss"]
    fresh = [*further, "training.init_from=null", "output_dir=fresh"]
    tiny.json("train", "back/config.yaml", *fresh)
    assert abs(first - metrics(Path("fresh"))[0]["loss"]) > 0.01
    tiny.json("train", "back/config.yaml", *further, "training.init_from=hf", "output_dir=straight")
    assert metrics(Path("straight")) == metrics(Path("further"))


def test_what_cannot_be_imported(bench: Workbench) -> None:
    bench.write(decoder_config(bench.run))
    hf = exported(bench, "decoder", *GPT2)
    verb = ["checkpoint", "import"]
    assert "is not empty; give a directory" in bench.refused(CONFIG, *verb, hf, "--to", bench.run)
    assert "there is no directory './nowhere'" in bench.refused(CONFIG, *verb, "./nowhere", "--to", "new")
    message = bench.refused(
        CONFIG, "train", "run/config.yaml", "training.init_from=hf", "output_dir=n", "model.decoder.norm_eps=1e-6"
    )
    assert "hf holds another model than this run trains: norm_eps: 1e-05 there, 1e-06 in this run" in message
    bench.json(*verb, hf, "--to", "back")
    message = bench.refused(DATA, "train", "back/config.yaml", "--resume", "back/checkpoints/step_00000000")
    assert "training.init_from instead of --resume" in message
    message = bench.refused(CONFIG, "checkpoint", "export", "back", "--to", "q4", "--format", "mlx")
    assert "--format mlx holds Llama and Qwen3, this is a gpt2: give --format hf" in message
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    assert "activation_function = 'relu'" in bench.refused(CONFIG, *verb, hf, "--to", "new")
    (hf / "config.json").write_text(json.dumps(config))
    (hf / "tokenizer.json").unlink()
    assert "no tokenizer in 'hf'" in bench.refused(DATA, *verb, hf, "--to", "new")
    assert not (bench.folder / "new").exists()
