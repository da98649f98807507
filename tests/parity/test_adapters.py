"""Adapters: PEFT and mlx-lm compute the same from the files, merging changes nothing, the frozen part stays frozen."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.adapters import Adapter, describe_adapter, read_adapter, split_adapter, write_mlx_lm, write_peft
from mlx_training.backend import Arrays, Optim, Runtime, get
from mlx_training.data.batch import Batch
from mlx_training.errors import ConfigError
from mlx_training.init import initialise
from mlx_training.llm_source import describe_llm
from mlx_training.merge import merge_and_quantize, merge_directory
from mlx_training.objectives.lm import lm
from mlx_training.pretrained import find_linears
from mlx_training.spec import AdapterSpec, FrozenLM, PretrainedSpec
from tests.parity.cases import VOCAB, batches
from tests.parity.tiny_checkpoints import save_tiny, save_tiny_quantized

pytestmark = pytest.mark.usefixtures("both_backends")
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Qwen 2 (its projections have biases, its head is untied), dense, and packed to 4 bits."""
    packed = save_tiny_quantized("qwen2", tmp_path_factory.mktemp("lm") / "qwen2-4bit")
    return {"dense": packed.with_name("qwen2-4bit-float"), "packed": packed}


def spec_on(base: Path, *, dora: bool = False, dropout: float = 0.0, weights: str = "dequantized") -> PretrainedSpec:
    adapter = AdapterSpec(find_linears(base, TARGETS), rank=3, alpha=5.0, dropout=dropout, dora=dora)
    return PretrainedSpec(FrozenLM(base, 64, VOCAB, describe_llm(base).sha256, weights), adapter=adapter)


def realised(name: str, spec: PretrainedSpec, precision: Any = "float32") -> tuple[Any, Any, Arrays]:
    """Backend, model, and its adapters, every one of them away from what changes nothing."""
    backend = get(name, Runtime(device="cpu", precision=precision))
    model = backend.build(spec)
    arrays = backend.export(model) | initialise(spec, 0)
    rng = np.random.default_rng(0)
    for key in arrays:
        if ".lora_A" not in key:
            arrays[key] = arrays[key] + (0.1 * rng.standard_normal(arrays[key].shape)).astype(np.float32)
    backend.load(model, arrays)
    return backend, model, arrays


def logits(backend: Any, model: Any, batch: Batch) -> np.ndarray:
    model.eval()
    values = model.logits(backend.to_device(batch))
    return np.array(values.detach().numpy() if backend.name == "torch" else values)


def adapter_of(spec: PretrainedSpec, arrays: Arrays) -> Adapter:
    _, adapter = split_adapter(arrays, {"adapter": describe_adapter(spec), "llm_sha256": spec.llm.sha256})
    assert adapter is not None
    return adapter


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_computes_the_same_from_our_files(dora: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (it is no dependency)")
    import torch
    from transformers import AutoModelForCausalLM

    spec = spec_on(bases["dense"], dora=dora)
    backend, model, arrays = realised("torch", spec)
    (batch,) = batches(spec, 1)
    write_peft(tmp_path, adapter_of(spec, arrays), "tiny")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["dense"]), tmp_path)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(batch.tokens).long()).logits.numpy()
    ours = logits(backend, model, batch)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    with torch.no_grad(), theirs.disable_adapter():
        assert np.abs(theirs(torch.from_numpy(batch.tokens).long()).logits.numpy() - ours).max() > 0.1
    theirs.save_pretrained(tmp_path / "again")
    read = read_adapter(tmp_path / "again")
    assert read.arrays.keys() == arrays.keys() and (read.rank, read.alpha, read.dora) == (3, 5.0, dora)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read.arrays[name], array)


@pytest.mark.parametrize(("base", "dora"), [("dense", False), ("packed", False), ("dense", True)])
def test_mlx_lm_computes_the_same_from_our_files(base: str, dora: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    spec = spec_on(bases[base], dora=dora, weights="resident")
    backend, model, arrays = realised("mlx", spec)
    (batch,) = batches(spec, 1)
    write_mlx_lm(tmp_path, adapter_of(spec, arrays), 3)
    theirs = load_adapters(load_model(bases[base])[0], str(tmp_path))
    theirs.eval()
    np.testing.assert_allclose(
        logits(backend, model, batch), np.array(theirs(mx.array(batch.tokens))), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_both_formats_read_back_what_was_written(dora: bool, bases: dict[str, Path], tmp_path: Path) -> None:
    spec = spec_on(bases["packed"], dora=dora)
    adapter = adapter_of(spec, realised("torch", spec)[2])
    for form in ("peft", "mlx-lm"):
        (tmp_path / form).mkdir()
    write_peft(tmp_path / "peft", adapter, "tiny")
    write_mlx_lm(tmp_path / "mlx-lm", adapter, 3)
    for form in ("peft", "mlx-lm"):
        read = read_adapter(tmp_path / form)
        assert replace(read, arrays={}) == replace(adapter, arrays={}) and read.arrays.keys() == adapter.arrays.keys()
        for name, array in adapter.arrays.items():
            np.testing.assert_array_equal(read.arrays[name], array)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", ["dense", "packed"])
def test_merged_equals_adapted(
    base: str, dora: bool, bases: dict[str, Path], backend_name: str, tmp_path: Path
) -> None:
    spec = spec_on(bases[base], dora=dora, weights="resident")
    backend, model, arrays = realised(backend_name, spec)
    (batch,) = batches(spec, 1)
    merge_directory(bases[base], adapter_of(spec, arrays), tmp_path)
    merged = backend.build(PretrainedSpec(FrozenLM(tmp_path, 64, VOCAB)))
    expected = logits(backend, model, batch)
    np.testing.assert_allclose(logits(backend, merged, batch), expected, rtol=0, atol=2e-5)
    bare = backend.build(PretrainedSpec(FrozenLM(bases[base], 64, VOCAB)))
    assert np.abs(logits(backend, bare, batch) - expected).max() > 0.1


def test_merged_and_packed_again_says_what_packing_changed(bases: dict[str, Path], tmp_path: Path) -> None:
    spec = spec_on(bases["packed"])
    said = merge_and_quantize(bases["packed"], adapter_of(spec, realised("torch", spec)[2]), tmp_path, 8, 32)
    change, rounding = (float(part) for part in re.findall(r"([\d.]+)%", said))
    assert change > 10 and 0 < rounding < 1
    assert describe_llm(tmp_path).quantization and not (tmp_path / "float").exists()
    spec_on(tmp_path)  # a base like any other


def test_sharded_bases_merge(bases: dict[str, Path], tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path / "sharded", max_shard_size="200KB")
    spec = spec_on(tmp_path / "sharded")
    backend, model, arrays = realised("torch", spec)
    (batch,) = batches(spec, 1)
    (tmp_path / "merged").mkdir()
    merge_directory(tmp_path / "sharded", adapter_of(spec, arrays), tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    merged = backend.build(PretrainedSpec(FrozenLM(tmp_path / "merged", 64, VOCAB)))
    np.testing.assert_allclose(logits(backend, merged, batch), logits(backend, model, batch), rtol=0, atol=2e-5)


def test_the_frozen_part_has_one_hash_with_and_without_adapters(bases: dict[str, Path], backend_name: str) -> None:
    for weights in ("dequantized", "resident"):
        spec = spec_on(bases["packed"], dora=True, weights=weights)
        backend, model, _ = realised(backend_name, spec)
        assert backend.frozen_hash(model) == backend.frozen_hash(backend.build(replace(spec, adapter=None)))


@pytest.mark.usefixtures("uncompiled")
def test_dropout_is_the_adapters_and_for_training_only(bases: dict[str, Path], backend_name: str) -> None:
    """Two steps at rate 0 with other seeds see other losses; evaluation has none of it."""
    losses = []
    for dropout in (0.0, 0.5):
        spec = spec_on(bases["dense"], dropout=dropout)
        backend, model, _ = realised(backend_name, spec)
        (batch,) = batches(spec, 1)
        seen = [
            float(backend.make_step(model, lm, Optim(), seed=seed)([batch], step=1, lr={"lora": 0.0})["loss"])
            for seed in (0, 1)
        ]
        assert (seen[0] != seen[1]) == (dropout > 0)
        losses.append(backend.score(model, lm, batch)["loss"])
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("uncompiled")
def test_bfloat16_keeps_float32_adapters(bases: dict[str, Path], backend_name: str) -> None:
    spec = spec_on(bases["packed"], dora=True, weights="resident")
    backend, model, arrays = realised(backend_name, spec, "bfloat16")
    (batch,) = batches(spec, 1)
    exact = realised(backend_name, spec)
    assert backend.score(model, lm, batch)["loss"] == pytest.approx(
        exact[0].score(exact[1], lm, batch)["loss"], rel=0.02
    )
    step = backend.make_step(model, lm, Optim(), seed=0)
    step([batch], step=1, lr={"lora": 1e-6})
    moved = [np.abs(after - arrays[name]).max() for name, after in backend.export(model).items()]
    assert all(0 < change < 1e-5 for change in moved), "bfloat16 would round such a step away"


def test_a_session_decodes_with_adapters(bases: dict[str, Path], backend_name: str) -> None:
    spec = spec_on(bases["dense"])
    backend, model, _ = realised(backend_name, spec)
    (batch,) = batches(spec, 1)
    expected = logits(backend, model, batch)
    session = backend.session(model)
    lengths = np.full(len(batch.tokens), 5, np.int32)
    prompt = replace(batch, tokens=batch.tokens[:, :5], lengths=lengths)
    np.testing.assert_allclose(session.prefill(prompt), expected[:, 4], rtol=0, atol=1e-5)
    np.testing.assert_allclose(session.extend(batch.tokens[:, 5]), expected[:, 5], rtol=0, atol=1e-5)


def test_linears_by_the_end_of_their_path(bases: dict[str, Path]) -> None:
    dense, packed = (find_linears(bases[name], ["layers.1.mlp.down_proj", "lm_head"]) for name in ("dense", "packed"))
    assert dense == packed == (("lm_head", 96, 64), ("model.layers.1.mlp.down_proj", 64, 96))
    with pytest.raises(ConfigError, match="'qproj' names no Linear of .*; there are: down_proj, gate_proj, .*, v_proj"):
        find_linears(bases["dense"], ["q_proj", "qproj"])
