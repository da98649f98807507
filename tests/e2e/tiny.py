"""A tiny 4-bit Llama with its tokenizer, made without a framework, and configurations that run in a second."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mlx_training.data.questions import QuestionDataset
from mlx_training.data.rows import Row
from mlx_training.data.tokenizer import train_bpe
from mlx_training.init import initialise
from mlx_training.quantize import quantize_directory
from mlx_training.spec import DecoderSpec

VOCABULARY = 384
SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}


def save_tiny_llama(directory: Path, vocab_size: int = VOCABULARY, tokenizer_size: int = VOCABULARY) -> Path:
    """Random weights, std 0.1 (at the usual 0.02 attention is flat), in MLX's 4-bit format."""
    source = directory.with_name(directory.name + "-float")
    texts = [f"{row.pre_prompt} {row.series_text[0]} {row.post_prompt} " for row in QuestionDataset(0, "train", 120)]
    tokenizer = train_bpe(texts, tokenizer_size, source)
    assert tokenizer.vocab_size == tokenizer_size
    spec = DecoderSpec(vocab_size, context_length=2048, init_std=0.1, **SHAPE)
    save_file(initialise(spec, 0), source / "model.safetensors", {"format": "pt"})
    config = spec.hf_config(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    (source / "config.json").write_text(json.dumps(config))
    quantize_directory(source, directory, 4, 32)
    return directory


def rows(count: int, *, start: int = 0, length: int = 14) -> list[Row]:
    """Short questions about rising and falling series; lengths vary and are no multiple of the patch."""
    rng = np.random.default_rng(start)
    made = []
    for i in range(start, start + count):
        slope = (1.0, -1.0)[i % 2]
        values = slope * np.arange(length - i % 3) + 0.1 * rng.standard_normal(length - i % 3)
        answer = ("rising", "falling")[i % 2]
        row = Row("Trend?", (values.astype(np.float32),), ("The series",), "Answer:", answer, ("rising", "falling"))
        made.append(Row(**{**vars(row), "id": f"r{i}", "group": f"g{i % 4}", "type": ("a", "b")[i // 2 % 2]}))
    return made


def timeseries_config(llm: Path, data: Path, run: Path) -> str:
    """A time-series LM on a file of rows: 4 steps, evaluated and saved every second."""
    return f"""\
experiment: {{name: tiny, seed: 7}}
output_dir: {run}
device: cpu
model:
  family: timeseries
  llm_id: {llm}
  encoder: {{patch_size: 4, hidden_size: 8, num_layers: 1, num_heads: 2, ffn_size: 8, max_patches: 8}}
dataset:
  path: {data}
  format: jsonl
  splits: {{fraction: {{validation: 0.25, test: 0.25}}}}
training: {{max_steps: 4, batch_size: 4, learning_rate: 1e-2, warmup_fraction: 0.25}}
evaluation: {{every_steps: 2, max_new_tokens: 3}}
checkpoint: {{every_steps: 2}}
logging: {{every_steps: 1}}
"""


SHAPES = {
    "decoder": "{hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, context_length: 16}",
    "recurrent": "{hidden_size: 16, num_layers: 2, context_length: 16}",
    "ssm": "{hidden_size: 16, state_size: 4, head_dim: 8, num_filters: 4, num_heads: 2, window: 6, context_length: 16, "
    "mixers: [mamba, mamba2, s4d, stu, local], num_layers: 5}",
    "kgram": "{hidden_size: 16, k: 3, context_length: 16}",
}


def decoder_config(run: Path) -> str:
    """A decoder from scratch on the generated corpus: 4 steps, evaluated and saved every second."""
    return language_config(run, "decoder")


def language_config(run: Path, family: str) -> str:
    """The same of another family."""
    return f"""\
experiment: {{name: tiny, seed: 7}}
output_dir: {run}
device: cpu
model:
  family: {family}
  {family}: {SHAPES[family]}
  tokenizer: {{train: 300}}
dataset: {{format: corpus, num_samples_train: 40, num_samples_validation: 4, num_samples_test: 4}}
training: {{max_steps: 4, batch_size: 4, learning_rate: 1e-2, warmup_fraction: 0.25}}
evaluation: {{every_steps: 2}}
checkpoint: {{every_steps: 2}}
logging: {{every_steps: 1}}
"""


def pretrained_config(llm: Path, data: Path, run: Path, form: str = "text") -> str:
    """Adapters on a frozen LM, trained on text or on rows without series: 4 steps, evaluated every second."""
    context = "  context_length: 16\n" if form == "text" else ""
    answers = "" if form == "text" else ", max_new_tokens: 3"
    return f"""\
experiment: {{name: tiny, seed: 7}}
output_dir: {run}
device: cpu
model:
  family: pretrained
  llm_id: {llm}
  lora: {{rank: 2, alpha: 8, targets: [q_proj, up_proj]}}
{context}dataset: {{path: {data}, format: {form}, splits: {{fraction: {{validation: 0.25, test: 0.25}}}}}}
training: {{max_steps: 4, batch_size: 4, learning_rate: 1e-2, warmup_fraction: 0.25}}
evaluation: {{every_steps: 2{answers}}}
checkpoint: {{every_steps: 2}}
logging: {{every_steps: 1}}
"""
