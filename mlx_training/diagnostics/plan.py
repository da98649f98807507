"""What a run will cost, before anything is built: parameters, arithmetic, memory, steps and time.

Nothing is imported that computes: sizes come from the configuration, the LM's `config.json` and the headers of its
weight files; the batch's shape from the data where it is at hand, else from the settings' limits.

**Expected time.** A step takes (operations / matmul rate + bytes / copy rate) / efficiency. The two rates are measured
on this machine by each installed framework in a process of its own (`diagnostics.machine`). The bytes are activations
and logits, written once and read twice, the frozen weights read in both passes, and the update's passes over the
trained parameters (AdamW: seven). EFFICIENCY holds the one fitted number a backend. It was calibrated on an x86 core
(AVX-512, one thread, float32, torch 2.13, MLX 0.32.4 with NumPy's OpenBLAS): median CPU seconds of seven steps on the
longest batch were 0.26 (`quick_test`) and 1.27 (`tiny_llama`) in torch, 0.48 and 2.44 in MLX; the estimates stand
within 20 % of these and of a second run on a quieter machine, and of `timeseries/har` and `timeseries/japanesevowels`,
not used here. Unfitted: GPUs, where a small step is bound by launches and takes longer than this, and Muon's
matrix products. Evaluation and checkpoints are not in it.
"""

import glob
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_training.assemble import RowData, assemble
from mlx_training.config import RunConfig
from mlx_training.config_checks import GENERATED, TEXT
from mlx_training.config_model import LanguageConfig, PretrainedConfig, TimeSeriesConfig
from mlx_training.data.batch import Batch
from mlx_training.data.batching import cut
from mlx_training.data.collate import collate
from mlx_training.data.masking import num_chosen
from mlx_training.data.series import round_up
from mlx_training.data.text_data import vocabulary_size
from mlx_training.data.tokenizer import Tokenizer, expand
from mlx_training.diagnostics import machine
from mlx_training.diagnostics.flops import BatchShape, Flops, Shape, batch_shape, count_flops, lm_shape, spared
from mlx_training.diagnostics.plan_memory import FLOAT32, FrozenBytes, Memory, count_memory
from mlx_training.environment import free_memory, installed_backends, resolve_backend
from mlx_training.errors import BackendError
from mlx_training.llm_source import is_weight, safetensors_header, stays_packed, weight_files
from mlx_training.notes import notes
from mlx_training.pretrained import frozen_config, longest_text, pretrained_spec
from mlx_training.spec import PretrainedSpec, Spec, TimeSeriesSpec
from mlx_training.trainer import plan as plan_steps

EFFICIENCY = {"torch": 0.61, "mlx": 0.66}
MAX_ROWS = 2048  # rows of a large file that are tokenised to find its longest batch
TEXT_TOKENS = 64  # beside the patches, where neither data nor max_length say how long a row is


def plan(config: RunConfig) -> dict[str, Any]:
    """The plan of a configuration; what `plan --json` prints. Missing data is no error: steps are then "unknown".

    Bytes and operations are whole numbers, times seconds. `memory_bytes` and `flops_per_token` are those of the
    configured backend (auto: the one this machine would take) and of a place of the batch, padding included.

    Raises:
        ConfigError: the LM's directory or hub model is missing.
        CheckpointError: the LM's files are damaged.
        DataError: the data is there but cannot be read.
    """
    model = config.model
    if isinstance(model, TimeSeriesConfig | PretrainedConfig):
        spec: Spec = pretrained_spec(model)
    else:
        spec = model.spec(_vocabulary(model))
    llm_config = frozen_config(spec)
    lm = lm_shape(spec, llm_config)
    frozen = _frozen_tensors(spec, llm_config)
    steps, batch = _from_data(config, spec) if data_at_hand(config) else (config.training.max_steps, None)
    batch = batch or _from_limits(config, spec)

    batch = spared(batch, spec, config.performance)
    flops = count_flops(spec, lm, batch)
    accumulation = config.training.grad_accumulation_steps
    places = batch.rows * batch.tokens
    chosen = _chosen_backend(config)
    names = dict.fromkeys([chosen, *installed_backends()])
    memory = {name: _memory(config, spec, lm, batch, name, frozen) for name in names}
    return {
        "config": config.experiment.name,
        "family": model.family,
        "backend": chosen,
        "parameters": _parameters(spec, frozen),
        "flops_per_token": {
            "forward": round(flops.forward / places),
            "backward": round(flops.backward / places),
            "total": round(flops.total / places),
            "per_step": flops.total * accumulation,
        },
        "memory_bytes": memory[chosen].to_json(),
        "memory_bytes_by_backend": {name: found.to_json() for name, found in memory.items()},
        "steps": "unknown" if steps is None else steps,
        "tokens_per_step": places * accumulation,
        "batch_shape": batch.to_json(),
        "expected_seconds": {
            name: _seconds(config, spec, name, flops, memory[name], steps) for name in installed_backends()
        },
        "notes": [
            *notes(model, spec),
            *machine.why_slow(config.device, config.training.precision),
            *([_shared_out(memory["torch"])] if config.performance.shard and "torch" in memory else []),
        ],
    }


def bytes_needed(config: RunConfig, spec: Spec, batch: Batch, batch_size: int, backend: str) -> int:
    """Memory of a run beside the framework itself, on batches as configured; `batch` is one of another `batch_size`."""
    llm_config = frozen_config(spec)
    seen, factor = batch_shape(batch, _patch_size(spec)), config.training.batch_size / batch_size
    whole = replace(seen, rows=round(seen.rows * factor), series=round(seen.series * factor))
    whole = spared(whole, spec, config.performance)
    return _memory(config, spec, lm_shape(spec, llm_config), whole, backend, _frozen_tensors(spec, llm_config)).total


def show(result: Mapping[str, Any]) -> str:
    """The plan for people."""
    parameters, flops, batch = result["parameters"], result["flops_per_token"], result["batch_shape"]
    width = max(map(len, parameters["by_module"]), default=0)
    origin = "data" if batch["origin"] == "data" else "settings' limits: no data at hand"
    lines = [
        f"{result['config']} ({result['family']})",
        f"parameters: {parameters['trainable']:,} train, {parameters['frozen']:,} frozen",
        *(f"  {name:{width}}  {count:>15,}" for name, count in parameters["by_module"].items()),
        f"batch: {batch['rows']} rows x {batch['tokens']} places, {batch['labels']} labels a row, {batch['series']} "
        f"series of {batch['patches']} patches (from the {origin})",
        f"arithmetic: {flops['forward'] / 1e6:,.2f} MFLOP a place forward, {flops['backward'] / 1e6:,.2f} backward; "
        f"{flops['per_step'] / 1e9:,.1f} GFLOP a step",
    ]
    for name, memory in result["memory_bytes_by_backend"].items():
        parts = ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in memory.items() if part != "total")
        lines.append(f"memory, {name}: {memory['total'] / 1e6:,.0f} MB beside the framework itself ({parts})")
    steps = result["steps"]
    lines.append(f"steps: {steps if steps == 'unknown' else f'{steps:,}'}, {result['tokens_per_step']:,} places each")
    for name, seconds in result["expected_seconds"].items():
        if seconds is None:
            lines.append(f"time, {name}: cannot be measured here")
            continue
        total = "" if seconds["total"] is None else f", {_duration(seconds['total'])} in all (without evaluation)"
        lines.append(f"time, {name}: about {seconds['per_step']:.3g} s a step{total}")
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join(lines)


def data_at_hand(config: RunConfig) -> bool:
    """Whether the training data can be read here: it is generated, or every file the configuration names exists."""
    data = config.dataset
    if data.format in GENERATED:
        return True
    path = Path(data.path or "")
    files = data.splits.file if data.splits else None
    if files is None:
        places = [source.path for source in data.sources or ()] or [str(path)]
        return all(glob.glob(place, recursive=True) for place in places)
    folder = path if path.is_dir() else path.parent
    return all((folder / file).exists() for file in (files.train, files.validation, files.test) if file)


def _vocabulary(model: LanguageConfig) -> int:
    wanted = model.tokenizer
    if model.vocab_size is not None:  # then no tokenizer need be at hand
        return model.vocab_size
    if isinstance(wanted, str):
        return vocabulary_size(model, Tokenizer.load(wanted))
    if wanted.load is not None:
        return vocabulary_size(model, Tokenizer.load(wanted.load, wanted.special_tokens, wanted.pattern))
    assert wanted.train is not None, "the configuration checks this"
    return wanted.train + len(expand(wanted.special_tokens))


def _from_data(config: RunConfig, spec: Spec) -> tuple[int | None, BatchShape | None]:
    """Steps, and the shape of the largest batch that the rows can make."""
    steps = config.training.max_steps
    if config.dataset.format in TEXT:  # windows have one length; text is read only to count them
        return (steps if steps is not None else plan_steps(assemble(config))[1]), None
    assembly = assemble(config)
    steps = plan_steps(assembly)[1]  # refuses, as training does, a batch larger than the data
    data = assembly.data
    assert isinstance(data, RowData), "the configuration checks this"
    rows: Any = data.rows("train")
    size, by = config.training.batch_size, config.training.batch_by
    encoded = sorted((data.encode(rows[i]) for i in range(0, len(rows), max(1, len(rows) // MAX_ROWS))), key=len)
    runs = cut([*map(len, encoded)], size, by) if by == "tokens" else [slice(-size, None)]
    shapes = (batch_shape(collate(encoded[run]), _patch_size(spec)) for run in runs)
    return steps, max(shapes, key=lambda shape: shape.rows * shape.tokens)


def _from_limits(config: RunConfig, spec: Spec) -> BatchShape:
    """The longest batch that the settings allow; without dataset.max_length, all patches and a short text."""
    B = config.training.batch_size
    if config.dataset.format in TEXT:
        assert not isinstance(config.model, TimeSeriesConfig), "the configuration checks this"
        L = config.model.context_length
        labels = num_chosen(L, config.training.mask_rate) if config.training.objective == "masked" else L
        return BatchShape(B, L, labels, origin="data" if config.dataset.format in GENERATED else "limits")
    assert isinstance(spec, PretrainedSpec)
    labels, context = round_up(config.evaluation.max_new_tokens, 4), longest_text(spec)
    if not isinstance(spec, TimeSeriesSpec):
        L = round_up(config.dataset.max_length or context or TEXT_TOKENS, 4)
        return BatchShape(B, L, min(labels, L), origin="limits")
    encoder = spec.encoder
    num_series = max(encoder.max_series, 1)
    longest = config.dataset.max_length or min(
        context or math.inf, num_series * encoder.max_patches + TEXT_TOKENS + labels
    )
    L = round_up(int(longest), 4)
    patches = min(encoder.max_patches, L // num_series)
    return BatchShape(B, L, min(labels, L), B * num_series, max(patches // 4 * 4, 4), origin="limits")


def _patch_size(spec: Spec) -> int:
    return spec.encoder.patch_size if isinstance(spec, TimeSeriesSpec) else 1


def _frozen_tensors(spec: Spec, llm_config: Mapping[str, Any] | None) -> dict[str, tuple[int, int]]:
    """{name: (elements of the dense tensor, bytes in the file with scales and biases)} of the frozen weights."""
    if not isinstance(spec, PretrainedSpec):
        return {}
    if spec.llm.decoder:
        return {name: (param.size, param.size * FLOAT32) for name, param in spec.llm.decoder.params().items()}
    assert llm_config is not None
    headers: dict[str, Any] = {}
    for file in weight_files(spec.llm.directory):
        headers |= {name: entry for name, entry in safetensors_header(file)[0].items() if is_weight(name, llm_config)}
    quantization = llm_config.get("quantization") or {}
    found = {}
    for name, entry in headers.items():
        path, _, part = name.rpartition(".")
        packed = f"{path}.scales" in headers
        if packed and part in ("scales", "biases"):
            continue
        size, stored = math.prod(entry["shape"]), _num_bytes(entry)
        if packed and part == "weight":
            block = quantization.get(path)
            group_size = (block if isinstance(block, dict) else quantization)["group_size"]
            size = math.prod(headers[f"{path}.scales"]["shape"]) * group_size
            stored += 2 * _num_bytes(headers[f"{path}.scales"])
        found[name] = (size, stored)
    return found


def _num_bytes(entry: Mapping[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end - start)


def _parameters(spec: Spec, frozen: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Counts; by the two upper levels of the module path ("lm." and two more for the frozen LM)."""
    by_module: dict[str, int] = {}
    sizes = {name: param.size for name, param in spec.params().items()}
    for name, size in sizes.items():
        module = "lora" if ".lora_" in name else ".".join(name.split(".")[:-1][:2])
        by_module[module] = by_module.get(module, 0) + size
    for name, (size, _) in frozen.items():
        module = "lm." + ".".join(name.split(".")[:-1][:2])
        by_module[module] = by_module.get(module, 0) + size
    trainable, held = sum(sizes.values()), sum(size for size, _ in frozen.values())
    return {"trainable": trainable, "frozen": held, "total": trainable + held, "by_module": by_module}


def _memory(
    config: RunConfig, spec: Spec, lm: Shape, batch: BatchShape, backend: str, frozen: Mapping[str, tuple[int, int]]
) -> Memory:
    precision = config.training.precision
    width = 2 if precision == "bfloat16" else 4
    dense_bytes = sum(size for size, _ in frozen.values()) * width
    resident = isinstance(spec, PretrainedSpec) and stays_packed(spec.llm.weights, dense_bytes, free_memory())
    held, converted, expanded = 0, 0, 0
    for size, stored in frozen.values():
        dense = size * width
        stays = resident and stored < 1.5 * size  # of at most 8 bits, with scales and biases
        held += stored if stays else dense
        converted += stored if stored != dense and not stays else 0
        if stays and backend == "torch":  # the float copy and its integers, for each product
            expanded = max(expanded, size * 6)
    weights, recompute = FrozenBytes(held, converted, expanded), config.training.gradient_checkpointing
    return count_memory(spec, lm, batch, backend, precision, weights, config.optim, recompute=recompute)


def _chosen_backend(config: RunConfig) -> str:
    """The configured backend; one that is not installed can still be planned for."""
    try:
        return resolve_backend(config.backend)
    except BackendError:
        return "torch" if config.backend == "auto" else config.backend


def _seconds(
    config: RunConfig, spec: Spec, backend: str, flops: Flops, memory: Memory, steps: int | None
) -> dict[str, float | None] | None:
    """Seconds of a step and of all of them, or None where the framework cannot be measured."""
    if (rates := machine.measure(backend, config.device, config.training.precision)) is None:
        return None
    trained = FLOAT32 * spec.num_parameters
    traffic = 3 * (memory.activations + memory.logits) + 2 * (memory.weights - trained)
    seconds = flops.total / rates.flops_per_second + traffic / rates.bytes_per_second
    seconds *= config.training.grad_accumulation_steps
    seconds += (3 * trained + 2 * memory.optimizer) / rates.bytes_per_second
    seconds /= EFFICIENCY[backend]
    return {"per_step": seconds, "total": None if steps is None else seconds * steps}


def _shared_out(memory: Memory) -> str:
    held = memory.weights + memory.gradients + memory.optimizer
    return (
        "performance.shard: memory and time are those of one process alone; of N each holds 1/N of the "
        f"{held / 1e6:,.0f} MB of weights, gradients and optimiser state, takes 1/N of the rows, and has one layer "
        "whole at a time"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
