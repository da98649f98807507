"""The plan: counts against the built model, arithmetic against PyTorch's own counter, memory against the process."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training import backend as backends_module
from mlx_training.assemble import assemble
from mlx_training.backend import Runtime
from mlx_training.config import RunConfig, load_config
from mlx_training.data.rows import Row, write_rows
from mlx_training.diagnostics import machine
from mlx_training.diagnostics import plan as plan_module
from mlx_training.diagnostics.flops import Flops, batch_shape, count_flops, lm_shape, spared
from mlx_training.diagnostics.machine import Machine
from mlx_training.diagnostics.plan import plan, show
from mlx_training.errors import ConfigError, DataError
from mlx_training.llm_source import read_llm_config
from mlx_training.objectives.lm import lm
from tests.e2e.tiny import decoder_config, language_config, rows, save_tiny_llama, timeseries_config

REPOSITORY = Path(__file__).resolve().parents[2]
LLAMA_1B = Path("/tmp/llama1b")  # `tools/make_llama.py llama-3.2-1b /tmp/llama1b`
NPZ, TS, QA = (
    "har_uci/har_total_acc_train.npz",
    "japanesevowels/JapaneseVowels_TRAIN.ts",
    "timeseriesexam/qa_dataset.json",
)
SHIPPED = {
    "quick_test": None,
    "tiny_llama": None,
    "timeseries/har": NPZ,
    "timeseries/japanesevowels": TS,
    "timeseries/timeseriesexam": QA,
}

# Trains three steps on the longest of the first batches (2,048 rows); prints the bytes it took beyond the imports.
MEASURE = """
import importlib, json, resource, sys
from pathlib import Path
from mlx_training.assemble import assemble, open_backend
from mlx_training.config import load_config
from mlx_training.init import initialise
from mlx_training.objectives.lm import lm
from mlx_training.trainer import learning_rates, plan

def resident(key):
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024

config = load_config(sys.argv[1], sys.argv[2:])
backend = open_backend(config)
if backend.name == "torch":
    import torch
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)
else:
    importlib.import_module("mlx_lm.models.llama")
imported = resident("VmRSS")
assembly = assemble(config)
batches, total = plan(assembly)
candidates = [batches.batch(i) for i in range(min(batches.num_batches, max(4, 2048 // config.training.batch_size)))]
batch = max(candidates, key=lambda batch: (batch.tokens.size, batch.targets.size))
model = backend.build(assembly.spec)
backend.load(model, backend.export(model) | initialise(assembly.spec, 0))
step = backend.make_step(model, lm, config.optim, seed=0)
for number in (1, 2, 3):
    micro_batches = [batch] * config.training.grad_accumulation_steps
    float(step(micro_batches, step=number, lr=learning_rates(config, number, total))["loss"])
print(json.dumps({"peak": resident("VmHWM") - imported, "tokens": list(batch.tokens.shape)}))
"""


@pytest.fixture(autouse=True)
def fixed_machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Rates that need no measurement, except where the test is about them."""
    if "machine" not in request.node.name:
        monkeypatch.setattr(machine, "measure", lambda name, *_, **__: Machine(name, "cpu", 1, 1e11, 1e10))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llm") / "tiny-4bit")


@pytest.fixture
def tiny(tmp_path: Path, llm: Path) -> Path:
    """A configuration of a time-series LM with 32 rows."""
    write_rows(tmp_path / "rows.jsonl", rows(32))
    path = tmp_path / "config.yaml"
    path.write_text(timeseries_config(llm, tmp_path / "rows.jsonl", tmp_path / "run"))
    return path


def measured(config: str, backend: str, *overrides: str) -> int:
    """Bytes at the peak of three steps above what the imports take, in a fresh process."""
    command = [sys.executable, "-c", MEASURE, config, f"backend={backend}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def compare(config: str, backend: str, *overrides: str) -> None:
    """The plan is within 15 % or 100 MB of what a process takes."""
    planned = plan(load_config(config, [f"backend={backend}", *overrides]))["memory_bytes"]["total"]
    peak = measured(config, backend, *overrides)
    print(f"| {config} | {backend} | {planned / 1e6:.0f} | {peak / 1e6:.0f} | {(planned / peak - 1):+.0%} |")
    assert abs(planned - peak) <= max(0.15 * peak, 100e6), f"{config}, {backend}: planned {planned}, measured {peak}"


def test_plan_of_the_quick_test(tmp_path: Path) -> None:
    result = plan(load_config("quick_test"))
    parameters = result["parameters"]
    assert (
        parameters["total"] == parameters["trainable"] + parameters["frozen"] == sum(parameters["by_module"].values())
    )
    assert parameters["frozen"] == 590_720
    assert result["steps"] == 600
    assert result["tokens_per_step"] == 64 * result["batch_shape"]["tokens"]
    assert result["batch_shape"]["origin"] == "data"
    memory = result["memory_bytes"]
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
    assert memory["optimizer"] == 2 * 4 * parameters["trainable"]
    flops = result["flops_per_token"]
    assert flops["total"] == pytest.approx(flops["forward"] + flops["backward"], abs=1)
    for seconds in result["expected_seconds"].values():
        assert seconds["total"] == pytest.approx(600 * seconds["per_step"])
    assert "600" in show(result) and "frozen" in show(result)
    json.dumps(result)


def test_the_plan_imports_no_framework() -> None:
    code = (
        "import sys; from mlx_training.config import load_config; from mlx_training.diagnostics import machine, plan;"
        "machine.measure = lambda *_, **__: None; result = plan.plan(load_config('timeseries/har'));"
        "assert result['steps'] == 'unknown' and None in result['expected_seconds'].values(), result;"
        "plan.show(result); loaded = {name.split('.')[0] for name in sys.modules};"
        "print(*sorted(loaded & {'torch', 'mlx', 'mlx_lm', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_without_data_the_shape_comes_from_the_limits(tiny: Path) -> None:
    absent = plan(load_config(tiny, ["dataset.path=absent.jsonl", "training.max_steps=null", "training.num_epochs=2"]))
    assert absent["steps"] == "unknown"
    assert absent["batch_shape"]["origin"] == "limits"
    assert all(seconds["total"] is None for seconds in absent["expected_seconds"].values())
    assert plan(load_config(tiny, ["dataset.path=absent.jsonl"]))["steps"] == 4
    limited = plan(load_config(tiny, ["dataset.path=absent.jsonl", "dataset.max_length=48"]))
    assert limited["batch_shape"]["tokens"] == 48
    there = plan(load_config(tiny, ["training.max_steps=null", "training.num_epochs=2"]))
    assert there["steps"] == 2 * 16 / 4
    assert there["batch_shape"]["origin"] == "data"
    assert "unknown" in show(absent)


@pytest.mark.parametrize("by", ["rows", "tokens"])
def test_the_batch_is_the_largest_of_an_epoch(by: str, tiny: Path) -> None:
    ragged = [replace(row, pre_prompt="Trend? " * (1 + i % 8) ** 2) for i, row in enumerate(rows(32))]
    write_rows(tiny.parent / "rows.jsonl", ragged)
    config = load_config(tiny, [f"training.batch_by={by}"])
    batches = assemble(config).data.train_batches()
    largest = max((batches.batch(i) for i in range(batches.num_batches)), key=lambda batch: batch.tokens.size)
    shape = plan(config)["batch_shape"]
    assert shape["rows"] * shape["tokens"] == largest.tokens.size
    assert (shape["rows"] == 4) == (by == "rows")


def test_a_missing_model_and_damaged_data_are_errors(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="no directory"):
        plan(load_config(tiny, ["model.llm_id=/nowhere/llama"]))
    (tiny.parent / "rows.jsonl").write_text("{")
    with pytest.raises(DataError):
        plan(load_config(tiny))


def test_a_batch_larger_than_the_data_is_refused_as_in_training() -> None:
    with pytest.raises(DataError, match="batch_size 100000 is larger than the training data"):
        plan(load_config("quick_test", ["training.batch_size=100000"]))


def test_counts_are_those_of_the_built_model(tiny: Path, backend_name: str) -> None:
    config = load_config(tiny, [f"backend={backend_name}"])
    parameters = plan(config)["parameters"]
    backend = backends_module.get(backend_name, Runtime("cpu"))
    known = backend.parameters(backend.build(assemble(config).spec))
    sizes = {train: sum(math.prod(p.shape) for p in known.values() if p.trainable == train) for train in (True, False)}
    assert (parameters["trainable"], parameters["frozen"]) == (sizes[True], sizes[False])


# Overrides of the tiny configuration of a family.
LANGUAGE = {
    "decoder": (),
    "decoder gelu": ("model.decoder.activation=gelu",),
    "decoder bottleneck": ("model.decoder={num_heads: 4, num_kv_heads: 2, intermediate_dim: 8}",),
    "decoder sparse": (
        "model.decoder={num_layers: 3, mixers: [local, strided, fixed], window: 5, stride: 3}",
        "model.decoder.fixed={block_size: 2, local_context: 6}",
    ),
    "decoder sinks": ("model.decoder={num_sinks: 3, mixers: [local], window: 6}",),
    "decoder chunks": (),
    "recurrent chunks": ("model.recurrent.embed_size=24",),
    "ssm chunks": (),
    "decoder experts": ("model.decoder.experts={num_experts: 4, num_active: 2}",),
    "recurrent lstm": ("model.recurrent.embed_size=24",),
    "recurrent gru": ("model.recurrent.cell=gru", "model.recurrent.tie_word_embeddings=true"),
    "kgram onehot": ("model.kgram.form=onehot",),
    "kgram embedding": ("model.kgram.embed_size=24",),
    "ssm": (),
    "kgram convolution": ("model.kgram.form=convolution",),
}


@pytest.mark.parametrize("kind", ["timeseries", "train_lm_head", *LANGUAGE])
def test_flops_are_those_that_torch_counts(kind: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config: RunConfig
    if kind in LANGUAGE:
        tiny.write_text(language_config(tiny.parent / "run", kind.split()[0]))
        config = load_config(tiny, LANGUAGE[kind])
    else:
        head = "true" if kind == "train_lm_head" else "false"
        # what rows share is counted for each of them
        config = load_config(tiny, [f"model.train_lm_head={head}", "performance.frozen_prefix=compute"])
    if kind.endswith("chunks"):
        monkeypatch.setattr(backends_module, "MAX_LOGITS", 4000)
    from mlx_training.diagnostics.subject import from_config

    subject = from_config(config, "torch")
    batch = subject.batch(0)
    backend: Any = subject.backend
    # the counter does not know the CPU's fused attention kernel
    plain_kernels = sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False)  # nor oneDNN's LSTM
    with plain_kernels[0], plain_kernels[1], FlopCounterMode(display=False) as counter:
        sums = lm(subject.model, backend._ready(subject.model, batch))
        forward = counter.get_total_flops()
        torch.autograd.backward(sums["loss"])
    counted = Flops(forward, counter.get_total_flops() - forward)
    spec = subject.spec
    is_text = kind in LANGUAGE
    llm_config = None if is_text else read_llm_config(spec.llm.directory)  # type: ignore[attr-defined]
    shape = batch_shape(batch, 1 if is_text else 4)
    shape = spared(shape, spec, config.performance)
    assert bool(shape.chunk) == kind.endswith("chunks")
    expected = count_flops(spec, lm_shape(spec, llm_config), shape)
    assert expected.forward == pytest.approx(counted.forward, rel=0.02), (expected, counted)
    assert expected.backward == pytest.approx(counted.backward, rel=0.02), (expected, counted)


def test_the_plan_of_a_sharded_model_says_whose_figures_they_are() -> None:
    config = load_config("tiny_llama", ["dataset.num_samples_train=500"])
    assert not [note for note in plan(config)["notes"] if "shard" in note]
    shared = config.model_copy(update={"performance": config.performance.model_copy(update={"shard": True})})
    result = plan(shared)
    (note,) = (note for note in result["notes"] if "shard" in note)
    parts = result["memory_bytes_by_backend"]["torch"]
    held = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert f"1/N of the {held / 1e6:,.0f} MB" in note and f"note: {note}" in show(result)


def test_the_plan_says_why_mlx_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not plan(load_config("quick_test"))["notes"], "both are as fast"
    monkeypatch.setattr(
        machine, "measure", lambda name, *_: Machine(name, "cpu", 1, 1e11 / (1 + 9 * (name == "mlx")), 1e10)
    )
    result = plan(load_config("quick_test"))
    assert "note: MLX's products make 10 GFLOP/s here, PyTorch's 100, so that large models take longer" in show(result)


def test_machine_is_measured_once_a_day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend_name: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mlx-training").mkdir()
    (tmp_path / "mlx-training" / "machine.json").write_text("not JSON")
    first = machine.measure(backend_name, "cpu")
    assert first is not None and first.flops_per_second > 1e8 and first.bytes_per_second > 1e7
    monkeypatch.setattr(machine, "_measure", lambda *_: pytest.fail("measured again"))
    assert machine.measure(backend_name, "cpu") == first
    monkeypatch.setattr(machine, "_measure", lambda *_: None)
    assert machine.measure(backend_name, "cuda") is None
    assert machine.measure("jax") is None


def test_steps_of_a_decoder_need_no_data_unless_they_are_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(decoder_config(tmp_path / "run"))
    epochs = plan(load_config(path, ["training.max_steps=null", "training.num_epochs=1"]))
    assert isinstance(epochs["steps"], int) and epochs["steps"] > 0
    monkeypatch.setattr(plan_module, "assemble", lambda *_: pytest.fail("read the data"))
    result = plan(load_config(path))
    assert (result["steps"], result["batch_shape"]["labels"], result["parameters"]["frozen"]) == (4, 16, 0)


def test_memory_of_a_batch_that_matters(backend_name: str) -> None:
    compare("quick_test", backend_name, "training.batch_size=128")


@pytest.mark.proof
@pytest.mark.parametrize("config", SHIPPED)
def test_memory_of_shipped_configurations(config: str, backend_name: str, shared_data: Path) -> None:
    path = SHIPPED[config]
    compare(config, backend_name, *([f"dataset.path={shared_data / path}"] if path else []))


@pytest.mark.proof
@pytest.mark.parametrize(
    "kind", [kind for kind in LANGUAGE if not kind.startswith("decoder") and not kind.endswith("chunks")]
)
def test_memory_of_families_without_attention(kind: str, tmp_path: Path, backend_name: str) -> None:
    family = kind.split()[0]
    (tmp_path / "config.yaml").write_text(language_config(tmp_path / "run", family))
    at = f"model.{family}"
    wide = (f"{at}.hidden_size=256", f"{at}.num_layers=2", f"{at}.context_length=128", "model.tokenizer.train=2048")
    overrides = [o for o in LANGUAGE[kind] if "embed_size" not in o]
    more = ("training.batch_size=32", "dataset.num_samples_train=4000")
    compare(str(tmp_path / "config.yaml"), backend_name, *overrides, *wide, *more)


@pytest.mark.proof
@pytest.mark.parametrize(("family", "chunked"), [("decoder", True), ("decoder", False), ("recurrent", True)])
def test_memory_of_many_logits(family: str, chunked: bool, tmp_path: Path, backend_name: str) -> None:
    """4,096 labels and 40,000 words: 655 MB of logits a copy."""
    (tmp_path / "config.yaml").write_text(language_config(tmp_path / "run", family))
    long = (f"model.{family}.context_length=128", "model.vocab_size=40000", f"model.{family}.hidden_size=64")
    more = ("training.batch_size=32", "dataset.num_samples_train=4000", f"performance.chunked_head={chunked}")
    compare(str(tmp_path / "config.yaml"), backend_name, *long, *more)


@pytest.mark.proof
def test_memory_at_real_size(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    if not LLAMA_1B.is_dir():
        pytest.skip(f"no {LLAMA_1B}: tools/make_llama.py llama-3.2-1b {LLAMA_1B}")
    rng = np.random.default_rng(0)
    walks = (np.cumsum(rng.normal(size=128)).astype(np.float32) for _ in range(40))
    write_rows(
        tmp_path / "rows.jsonl",
        [Row("What happens here?", (walk,), ("Series:",), "Answer:", "It rises, then it is flat.") for walk in walks],
    )
    compare("timeseries/llama_3_2_1b", "torch", f"model.llm_id={LLAMA_1B}", f"dataset.path={tmp_path / 'rows.jsonl'}")
