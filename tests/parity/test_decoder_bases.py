"""Adapters on decoders of this project: the same on both backends, merged as adapted, and the decoder as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_training.adapters import describe_adapter, split_adapter
from mlx_training.backend import Runtime, get
from mlx_training.errors import ConfigError
from mlx_training.merge import merge_decoder
from mlx_training.objectives.lm import lm
from mlx_training.pretrained import find_linears
from mlx_training.spec import ProjectorSpec, TimeSeriesSpec
from tests.parity.cases import ENCODER, batches, realise, relative, specs
from tests.parity.decoder_bases import BASES

pytestmark = pytest.mark.usefixtures("both_backends")
CASES = ("pretrained-lora-gpt", "pretrained-dora-gpt", "pretrained-lora-sparse", "pretrained-dora-sparse")


def logits(backend: Any, model: Any, batch: Any) -> np.ndarray:
    model.eval()
    values = model.logits(backend.to_device(batch))
    return np.array(values.detach().numpy() if backend.name == "torch" else values)


@pytest.mark.parametrize("case", ["pretrained-dora-gpt", "pretrained-lora-sparse"])
def test_gradients_agree(case: str, directory: Path) -> None:
    """Of the two that have no trajectory."""
    spec = specs(directory)[case]
    (batch,) = batches(spec, 1)
    a, b = (backend.gradients(model, lm, batch) for backend, model in (realise(n, spec) for n in ("mlx", "torch")))
    worst = {name: relative(a[name], b[name]) for name in b}
    assert max(worst.values()) <= 1e-5 and min(np.abs(g).max() for g in b.values()) > 0, worst


@pytest.mark.parametrize("case", CASES)
def test_merged_equals_adapted_and_fresh_ones_change_nothing(case: str, backend_name: str, directory: Path) -> None:
    spec = specs(directory)[case]
    (batch,) = batches(spec, 1)
    backend, model = realise(backend_name, spec)
    adapted, frozen = logits(backend, model, batch), backend.frozen_hash(model)
    _, adapter = split_adapter(backend.export(model), {"adapter": describe_adapter(spec)})
    assert adapter is not None
    decoder = backend.build(spec.llm.decoder)
    backend.load(decoder, merge_decoder(spec.llm.directory, adapter))
    np.testing.assert_allclose(logits(backend, decoder, batch), adapted, rtol=0, atol=2e-5)
    backend.load(decoder, load_file(spec.llm.directory / "model.safetensors"))
    plain = logits(backend, decoder, batch)
    assert np.abs(plain - adapted).max() > 0.02
    fresh = backend.build(replace(spec, adapter=None))
    np.testing.assert_array_equal(logits(backend, fresh, batch), plain)
    assert backend.frozen_hash(fresh) == frozen
    backend.load(model, {n: 0 * a if ".lora_B." in n else a for n, a in backend.export(model).items()})
    np.testing.assert_allclose(logits(backend, model, batch), plain, rtol=0, atol=2e-5)


def test_bfloat16_is_the_decoder_s_own(backend_name: str, directory: Path) -> None:
    """Frozen weights kept in bfloat16 compute what float32 weights cast for each product do, to the bit."""
    spec = specs(directory)["pretrained-dora-gpt"]
    (batch,) = batches(spec, 1)
    backend = get(backend_name, Runtime(device="cpu", precision="bfloat16"))
    frozen, decoder = backend.build(replace(spec, adapter=None)), backend.build(spec.llm.decoder)
    backend.load(decoder, load_file(spec.llm.directory / "model.safetensors"))
    assert backend.score(frozen, lm, batch) == backend.score(decoder, lm, batch)
    adapted = backend.build(spec)
    assert backend.score(adapted, lm, batch)["loss"] == pytest.approx(
        backend.score(decoder, lm, batch)["loss"], rel=0.2
    )
    assert {p.shape for n, p in backend.parameters(adapted).items() if p.trainable} == {
        p.shape for p in spec.params().values()
    }


def test_a_time_series_model_reads_through_a_decoder(directory: Path) -> None:
    """With its head trained and its levers off: they are of the libraries' layers."""
    llm = specs(directory)["pretrained-lora-gpt"].llm
    llm = replace(llm, decoder=replace(llm.decoder, positions="rope"), directory=without_positions(llm.directory))
    spec = TimeSeriesSpec(llm, ENCODER, ProjectorSpec(norm_output=True), train_lm_head=True)
    batch = replace(batches(spec, 1)[0], prefix=1)
    found = [(backend, model) for backend, model in (realise(name, spec) for name in ("mlx", "torch"))]
    assert all(model.past(batch) is None for _, model in found)
    a, b = (backend.gradients(model, lm, batch) for backend, model in found)
    worst = {name: relative(a[name], b[name]) for name in b if name not in spec.zero_gradients()}
    assert max(worst.values()) <= 1e-5, worst
    assert all(gradient.any() for gradient in b.values())


def without_positions(checkpoint: Path) -> Path:
    from safetensors.numpy import save_file

    folder = checkpoint.with_name("gpt-rope")
    folder.mkdir()
    arrays = load_file(checkpoint / "model.safetensors")
    save_file({n: a for n, a in arrays.items() if "embed_positions" not in n}, folder / "model.safetensors")
    return folder


def test_linears_of_a_decoder() -> None:
    gpt, sparse = (find_linears(Path("runs/lm"), ["q_proj", "layers.1.self_attn.o_proj"], BASES[n]) for n in BASES)
    assert gpt[0] == ("model.layers.0.self_attn.q_proj", 32, 32) and len(gpt) == len(sparse) == 3
    with pytest.raises(ConfigError, match="'gate_proj' names no Linear of runs/lm; there are: down_proj, k_proj, lm_h"):
        find_linears(Path("runs/lm"), ["gate_proj"], BASES["gpt"])
    stacks = "'up_proj' names no Linear of runs/lm but the stacked weights of its experts, .*; there are: k_proj, .*"
    with pytest.raises(ConfigError, match=stacks):
        find_linears(Path("runs/lm"), ["up_proj"], BASES["sparse"])
    with pytest.raises(ConfigError, match="'embed_positions' names no Linear"):
        find_linears(Path("runs/lm"), ["embed_positions"], BASES["gpt"])
