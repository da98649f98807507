"""Healthy subjects, small and fast, made the way a run is made: configuration file, `load_config`, `from_config`."""

import atexit
import importlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.assemble import RowData
from mlx_training.backend import Arrays
from mlx_training.config import load_config
from mlx_training.data.batch import Batch
from mlx_training.data.collate import collate
from mlx_training.data.rows import Row, write_rows
from mlx_training.diagnostics.subject import from_config
from mlx_training.environment import BACKENDS, installed_backends
from mlx_training.trainer import train
from tests.e2e.tiny import decoder_config, language_config, pretrained_config, save_tiny_llama

ANSWERS = ("up", "going down", "neither way")  # of different numbers of tokens
NUM_ROWS = 112
TRAINED_STEPS = 60
SPARSE = [
    "model.decoder.num_layers=3",
    "model.decoder.mixers=[local, strided, fixed]",
    "model.decoder.window=5",
    "model.decoder.stride=3",
    "model.decoder.fixed={block_size: 2, local_context: 6}",
    "model.decoder.experts={num_experts: 3, num_active: 2}",
]
LANGUAGE_OVERRIDES = {
    "recurrent": ["training.max_steps=200", "model.recurrent.dropout=0.1"],
    "ssm": ["training.max_steps=200"],
    "kgram": ["training.max_steps=200", "model.kgram.form=convolution"],
}


def by_turns(cases: Sequence[Any], backends: Callable[[Any], Sequence[str]] = lambda _: BACKENDS) -> list[Any]:
    """Each case on its backends: of two, by turns, one is `proof`. Skipped where a backend is not installed."""
    made, installed = [], installed_backends()
    for index, case in enumerate(cases):
        names = backends(case)
        for place, name in enumerate(names):
            absent = pytest.mark.skipif(name not in installed, reason=f"backend {name} is not installed")
            proof = [pytest.mark.proof] * (len(names) > 1 and (index + place) % 2 == 1)
            made.append(pytest.param(case, name, id=f"{getattr(case, 'name', case)}-{name}", marks=[absent, *proof]))
    return made


def healthy(case: str, backend: str, folder: Path) -> Any:
    """A healthy subject on a backend, its files in `folder`; for "run" the directory of a finished run.

    "timeseries": encoder and projector in front of a frozen 4-bit Llama, at initial values. "trained": the same after
    a few steps, which reads its series. "decoder": a small Llama from scratch; "sparse": one with every sparse
    mixer and with experts; "recurrent" and "kgram": a small LSTM
    and a small convolution over three tokens; "ssm": every state-space mixer; "adapters": LoRA on the
    frozen Llama.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if backend == "mlx":  # a compiled function that raised leaves its traces in the global random state
        importlib.import_module("mlx.core").random.seed(0)
    if case == "decoder":
        return from_config(load_config(_write_decoder(folder)), backend)
    if case == "sparse":
        return from_config(load_config(_write_decoder(folder), SPARSE), backend)
    if case in LANGUAGE_OVERRIDES:
        (folder / "config.yaml").write_text(language_config(folder / "run", case))
        return from_config(load_config(folder / "config.yaml", LANGUAGE_OVERRIDES[case]), backend)
    if case == "adapters":
        return from_config(load_config(_write_adapters(folder)), backend)
    if case == "run":
        run = folder / "run"
        shutil.copytree(_finished_run(backend), run)
        config = run / "config.yaml"
        config.write_text(config.read_text().replace(str(_finished_run(backend)), str(run)))
        return run
    subject = from_config(load_config(write_timeseries(folder)), backend)
    if case == "trained":
        subject.backend.load(subject.model, trained_arrays(backend))
        subject.fresh, subject.trained = False, True
    else:
        assert case == "timeseries", f"no case {case!r}"
    return subject


def saw_rows(count: int, seed: int = 0) -> list[Row]:
    """Which way the teeth of one or two noisy saws lean; ragged lengths, offsets and scales, two question types."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        answer = i % len(ANSWERS)
        series = tuple(_series(rng, answer) for _ in range(1 + i // 3 % 2))
        names = ("First saw", "Second saw")[: len(series)]
        question = ("Which way?", "Which way do the teeth lean?")[i // 6 % 2]
        kind = ("short", "long")[i // 6 % 2]
        made.append(
            Row(question, series, names, "Answer:", ANSWERS[answer], ANSWERS, f"r{i}", f"subject {i // 8}", kind)
        )
    return made


def write_timeseries(folder: Path, *, steps: int = 200) -> Path:
    """`config.yaml` of the time-series case, beside its rows."""
    write_rows(folder / "rows.jsonl", saw_rows(NUM_ROWS))
    path = folder / "config.yaml"
    path.write_text(f"""\
experiment: {{name: tiny, seed: 7}}
output_dir: {folder / "run"}
device: cpu
model:
  family: timeseries
  llm_id: {_tiny_llama()}
  train_lm_head: true
  encoder: {{patch_size: 4, hidden_size: 16, num_layers: 2, num_heads: 2, ffn_size: 32, max_patches: 16,
             numeric_scale: true, dropout: 0.1}}
dataset:
  path: {folder / "rows.jsonl"}
  format: jsonl
  splits: {{fraction: {{validation: 0.2, test: 0.2}}}}
training:
  max_steps: {steps}
  batch_size: 4
  grad_accumulation_steps: 2
  learning_rate: {{encoder: 1e-2, projector: 2e-2, lm_head: 1e-2}}
  warmup_fraction: 0.02
  weight_decay: 0.1
  grad_clip_norm: 1.0
evaluation: {{every_steps: 10, metrics: [accuracy, loss], max_new_tokens: 8}}
checkpoint: {{every_steps: 10, best: eval/loss}}
logging: {{every_steps: 1}}
""")
    return path


def _write_decoder(folder: Path) -> Path:
    text = decoder_config(folder / "run")
    text = text.replace("num_layers: 1, num_heads: 2", "num_layers: 2, num_heads: 2, num_kv_heads: 1")
    text = text.replace(
        "max_steps: 4", "max_steps: 200, grad_accumulation_steps: 2, weight_decay: 0.1, grad_clip_norm: 1.0"
    )
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def _write_adapters(folder: Path) -> Path:
    tasks = [{"instruction": f"Add one to {i}.", "output": f"That is {i + 1}."} for i in range(NUM_ROWS)]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    text = pretrained_config(_tiny_llama(), folder / "tasks.json", folder / "run", "instruct")
    text = text.replace("[q_proj, up_proj]", "[q_proj, o_proj, up_proj], dropout: 0.1")
    text = text.replace("max_steps: 4", "max_steps: 200, grad_accumulation_steps: 2, weight_decay: 0.1")
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def _series(rng: np.random.Generator, answer: int) -> np.ndarray:
    length = int(rng.integers(13, 40))
    tooth = np.array([(-1.5, -0.5, 0.5, 1.5), (1.5, 0.5, -0.5, -1.5), (1.0, -1.0, -1.0, 1.0)][answer])
    values = np.resize(tooth, length) + 0.3 * rng.standard_normal(length)
    scale = 10.0 ** rng.uniform(-1.0, 2.0)
    return (scale * (values + rng.uniform(-5.0, 5.0))).astype(np.float32)


@cache
def _scratch() -> Path:
    """A folder for what is made once a process."""
    path = Path(tempfile.mkdtemp(prefix="doctor-cases-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def _tiny_llama() -> Path:
    return save_tiny_llama(_scratch() / "llm" / "tiny-4bit")


@cache
def trained_arrays(backend: str) -> Arrays:
    """Parameters after a few steps on larger batches: it reads the series."""
    return _trained(backend, lambda row, _: row)


@cache
def untaught_arrays(backend: str) -> Arrays:
    """Parameters after as many steps of the head alone, on answers drawn at random, most of them the first."""

    def random(row: Row, rng: np.random.Generator) -> Row:
        return replace(row, answer=str(rng.choice(ANSWERS, p=(0.6, 0.2, 0.2))))

    return _trained(backend, random, encoder=0.0, projector=0.0)


def _trained(backend: str, change: Callable[[Row, np.random.Generator], Row], **rates: float) -> Arrays:
    folder = Path(tempfile.mkdtemp(dir=_scratch()))
    subject = from_config(load_config(write_timeseries(folder), ["training.batch_size=16"]), backend, max_rows=16)
    data, step, peak = subject.data, subject.new_step(), dict.fromkeys(subject.spec.groups, 2e-2) | rates
    assert isinstance(data, RowData)

    def batch(index: int) -> Batch:
        chosen, rng = subject.batch(index).rows, np.random.default_rng(index)
        return collate([data.encode(change(data.rows("train")[row], rng)) for row in chosen], chosen)

    for number in range(1, TRAINED_STEPS + 1):
        lr = {group: rate * min(1.0, number / 10) for group, rate in peak.items()}
        step([batch(2 * number), batch(2 * number + 1)], step=number, lr=lr)
    return subject.backend.export(subject.model)


@cache
def _finished_run(backend: str) -> Path:
    folder = _scratch() / f"run-{backend}"
    folder.mkdir()
    config = load_config(write_timeseries(folder, steps=80), [f"backend={backend}"])
    train(config)
    return folder / "run"
