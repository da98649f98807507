"""Adapters on a run of this project, on the command line: trained, merged into a run, exported; wrong bases refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from mlx_training.assemble import RowData, load_run
from mlx_training.checkpoint import CheckpointStore
from mlx_training.generate import Continuation, generator_of
from mlx_training.sampling import Sampling
from mlx_training.trained_run import read_decoder
from tests.e2e.tiny import language_config
from tests.e2e.workbench import CONFIG, DATA, Workbench

GPT = "model.decoder={hidden_size: 16, intermediate_size: 24, num_layers: 2, num_heads: 2, context_length: 16, norm: \
layernorm, activation: gelu_tanh, positions: learned, attention_bias: true, mlp_bias: true, dropout: 0.1}"
SINKS = "model.decoder={hidden_size: 16, num_layers: 1, num_heads: 2, context_length: 16, num_sinks: 1, experts: \
{num_experts: 4}}"
ONCE = ("training.max_steps=1", "evaluation.every_steps=1", "checkpoint.every_steps=1")
STILL = (*ONCE, "training.learning_rate=1e-12", "training.weight_decay=0")


def adapters(base: Path, run: Path) -> str:
    """DoRA with dropout on a run, trained on the generated corpus: 4 steps, evaluated and saved every second."""
    return f"""\
experiment: {{name: tiny, seed: 7}}
output_dir: {run}
device: cpu
model:
  family: pretrained
  llm_id: {base}
  lora: {{rank: 2, alpha: 8, dropout: 0.1, targets: [q_proj, down_proj], dora: true}}
  context_length: 16
dataset: {{format: corpus, num_samples_train: 40, num_samples_validation: 4, num_samples_test: 4}}
training: {{max_steps: 4, batch_size: 4, learning_rate: 1e-2, warmup_fraction: 0.25}}
evaluation: {{every_steps: 2}}
checkpoint: {{every_steps: 2}}
logging: {{every_steps: 1}}
"""


def on_base(bench: Workbench, shape: str, *overrides: str) -> Path:
    """A run of a decoder, and a configuration of adapters on it."""
    base = bench.folder / "base"
    bench.use_decoder()
    bench.train(shape, *overrides, f"output_dir={base}")
    bench.write(adapters(base, bench.run))
    return base


def test_trained_resumed_merged_and_exported(bench: Workbench, backend_name: str) -> None:
    bench.backend = backend_name
    base = on_base(bench, GPT)
    frozen = CheckpointStore(base).best_or_latest().model
    parameters = bench.json("plan", bench.config)["parameters"]
    assert parameters["frozen"] == sum(array.size for array in frozen.values())
    bench.train()
    trained = CheckpointStore(bench.run).best_or_latest().model
    assert parameters["trainable"] == sum(array.size for array in trained.values())
    assert sum(name.endswith("lora_magnitude_vector") for name in trained) == 4
    bench.train(f"output_dir={bench.folder / 'b'}", "--resume", bench.run / "checkpoints/step_00000002")
    whole, parts = (CheckpointStore(folder).load() for folder in (bench.run, bench.folder / "b"))
    for name, array in whole.model.items():
        np.testing.assert_array_equal(array, parts.model[name], err_msg=name)
    for name, array in CheckpointStore(base).best_or_latest().model.items():
        np.testing.assert_array_equal(array, frozen[name], err_msg=name)

    bench.folder.joinpath("text.txt").write_text("The line rises, then it falls. " * 20)
    for form in ("run", "hf"):
        made = bench.json("checkpoint", "export", bench.run, "--to", f"as-{form}", "--format", form)
        assert made["written"].startswith("DoRA: 12 arrays (rank 2, alpha 8) of step ")
    bench.json("checkpoint", "import", "./as-hf", "--to", "imported")
    runs = base, bench.run, Path("as-run"), Path("imported")
    plain, adapted, *merged = (bench.json("evaluate", run, "--data", "text.txt")["loss"] for run in runs)
    assert merged == pytest.approx([adapted] * 2, abs=2e-6) and abs(plain - adapted) > 1e-4
    assert bench.json("generate", bench.run, "--prompt", "The", "--max-new-tokens", 3)["samples"]
    assert bench.json("checkpoint", "verify", bench.run)["shapes"] == "checked"
    message = bench.refused(CONFIG, "checkpoint", "export", bench.run, "--to", "x", "--format", "peft")
    assert "of their base Llama has no norm: layernorm" in message and f"training.init_from={bench.run}" in message

    further = bench.folder / "further"
    bench.train(*STILL, f"training.init_from={bench.run}", f"output_dir={further}")
    for name, array in CheckpointStore(further).load().model.items():
        np.testing.assert_allclose(array, trained[name], rtol=0, atol=1e-7)
    start = [f"training.init_from={bench.run}", f"output_dir={bench.folder / 'c'}"]
    message = bench.refused(DATA, "train", bench.config, *start, "model.llm_id=./as-run")
    assert "adapters for another base" in message


def test_a_base_with_sinks_and_experts(bench: Workbench) -> None:
    bench.backend = "torch"
    base = on_base(bench, SINKS, *ONCE)
    message = bench.refused(CONFIG, "train", bench.config)
    assert "'down_proj' names no Linear of" in message and "the stacked weights of its experts" in message
    assert "there are: k_proj, o_proj, q_proj, router, v_proj" in message
    bench.train("model.lora.targets=[router, v_proj]", *ONCE)
    message = bench.refused(CONFIG, "checkpoint", "export", bench.run, "--to", "x", "--format", "hf")
    assert "has no num_sinks: 1" in message
    bench.json("checkpoint", "export", bench.run, "--to", bench.folder / "whole", "--format", "run")
    merged, before = (CheckpointStore(run).best_or_latest().model for run in (bench.folder / "whole", base))
    assert {name for name in before if not np.array_equal(before[name], merged[name])} == {
        "model.layers.0.mlp.router.weight",
        "model.layers.0.self_attn.v_proj.weight",
    }


def test_bases_that_cannot_be_one(bench: Workbench) -> None:
    bench.backend = "torch"
    base = on_base(bench, GPT, *ONCE)

    def refused(code: int, llm: Path, *overrides: str) -> str:
        return bench.refused(code, "train", bench.config, f"model.llm_id={llm}", *overrides)

    message = refused(CONFIG, base, "model.context_length=17")
    assert "given 17" in message and "reads at most 16 tokens" in message
    assert "'gate_proj' names no Linear of" in refused(CONFIG, base, "model.lora.targets=[gate_proj]")
    (checkpoint,) = (base / "checkpoints").glob("step_*")
    assert read_decoder(base).spec.dropout == 0 and read_decoder(base).checkpoint == checkpoint
    assert bench.train(*ONCE, f"model.llm_id={checkpoint}", f"output_dir={bench.folder / 'on'}")["steps"] == 1
    assert "which cannot be a frozen LM; merge its adapters first" in refused(CONFIG, bench.folder / "on")
    other = bench.folder / "kgram"
    other.mkdir()
    (other / "config.yaml").write_text(language_config(other, "kgram"))
    assert "is a run of family kgram, which cannot be a frozen LM" in refused(CONFIG, other)
    masked = yaml.safe_load((base / "config.yaml").read_text())
    masked["model"]["decoder"] |= {"mixers": ["bidirectional"]}
    masked["training"] |= {"objective": "masked"}
    shutil.copytree(base, bench.folder / "masked")
    (bench.folder / "masked/config.yaml").write_text(yaml.safe_dump(masked))
    assert "is a masked model (mixers: [bidirectional])" in refused(CONFIG, bench.folder / "masked")

    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "damaged checkpoint" in refused(DATA, base)
    shutil.rmtree(base / "checkpoints")
    assert "this run has saved no checkpoint yet" in refused(DATA, base)


def test_rows_end_where_learned_positions_do(bench: Workbench) -> None:
    """Also where padding goes beyond them, and answers would."""
    bench.backend = "torch"
    on_base(bench, GPT.replace("context_length: 16", "context_length: 59"), *ONCE)
    tasks = [{"instruction": f"Add {i}.", "output": "one and one and one and " * i} for i in range(1, 17)]
    bench.folder.joinpath("tasks.json").write_text(json.dumps(tasks))
    rows = ["dataset={path: tasks.json, format: instruct, splits: {fraction: {validation: 0.25, test: 0.25}}}"]
    rows += ["model.context_length=128", *ONCE]
    message = bench.refused(CONFIG, "train", bench.config, *rows, "dataset.max_length=60")
    assert "dataset.max_length: given 60" in message and "has positions for 59 tokens" in message
    bench.train(*rows, "evaluation.max_new_tokens=99")
    loaded, lengths = load_run(bench.run), {}

    def watch(text: Continuation, _: str) -> None:
        lengths[text.row] = len(text.prompt) + len(text.tokens), text.finish

    assert isinstance(loaded.data, RowData)
    generator = generator_of(loaded, Sampling(max_new_tokens=99), watch)
    generator.answers(loaded.data.read(Path("tasks.json")), loaded.data.encode_prompt)
    assert (59, "length") in lengths.values() and max(lengths.values())[0] == 59


def test_a_llama_of_one_s_own_in_every_format(bench: Workbench) -> None:
    bench.backend = "torch"
    base = on_base(bench, "model.decoder.hidden_size=32", *ONCE)
    bench.train(*ONCE)
    for form in ("peft", "mlx-lm"):
        bench.json("checkpoint", "export", bench.run, "--to", form, "--format", form)
        bench.train(*STILL, f"training.init_from=./{form}", f"output_dir=from-{form}")
        after, trained = (CheckpointStore(Path(run)).load().model for run in (f"from-{form}", bench.run))
        for name, array in trained.items():
            np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-7)
    packed = ("--format", "mlx", "--bits", 8, "--group-size", 32)
    written = bench.json("checkpoint", "export", bench.run, "--to", "packed", *packed)["written"]
    assert f"merged into {base}" in written and "quantised to 8 bits in groups of 32" in written
    assert bench.train(*STILL, "model.llm_id=./packed", "output_dir=on-packed")["steps"] == 1
