"""The models of each backend against references that are neither: transformers, torch's own modules, NumPy.

What both realisations got wrong in the same way, `test_parity` would call agreement.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.data.batch import Batch
from mlx_training.init import initialise
from mlx_training.objectives.lm import lm
from mlx_training.spec import DecoderSpec, TimeSeriesSpec
from tests.parity import lm_driver
from tests.parity.cases import CASES, MASKED, batches, realise, relative, specs

pytestmark = pytest.mark.usefixtures("both_backends")
LLAMAS = ("decoder-gqa-rope-scaling", "decoder-untied")


@pytest.mark.parametrize("case", LLAMAS)
def test_decoder_equals_transformers(case: str, backend_name: str, directory: Path) -> None:
    """The exported configuration and weights are a Hugging Face Llama with the same logits and loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = specs(directory)[case]
    assert isinstance(spec, DecoderSpec)
    (batch,) = batches(spec, 1)
    backend, model = realise(backend_name, spec)
    # sharper attention than at the start of training, where a wrong RoPE hardly shows
    arrays = {name: array * (5 if spec.params()[name].decay else 0.7) for name, array in initialise(spec, 0).items()}
    backend.load(model, arrays)
    config = LlamaConfig(**spec.hf_config(bos_token_id=1, eos_token_id=2), attn_implementation="eager")
    reference = LlamaForCausalLM(config)
    tied = {"lm_head.weight": arrays["model.embed_tokens.weight"]} | arrays
    reference.load_state_dict({name: torch.from_numpy(array) for name, array in tied.items()})
    with torch.no_grad():
        expected = reference.eval()(torch.from_numpy(batch.tokens).long()).logits.numpy()
    assert np.abs(expected).max() > 1
    logits = all_logits(backend, model, batch)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("size", [1.0, 0.02])
def test_encoder_equals_torch_modules(size: float, backend_name: str, directory: Path) -> None:
    """Against Conv1d, nn.TransformerEncoderLayer and LayerNorm; at a small size every epsilon matters."""
    import torch
    import torch.nn.functional as F

    spec = specs(directory)["timeseries-ours"]
    assert isinstance(spec, TimeSeriesSpec)
    (batch,) = batches(spec, 1)
    backend, model = realise(backend_name, spec)
    rng = np.random.default_rng(4)
    noise = {name: 0.3 * rng.standard_normal(p.shape) for name, p in spec.params().items()}
    arrays = {n: (size * (a + noise[n])).astype(np.float32) for n, a in backend.export(model).items()}
    backend.load(model, arrays)
    device = backend.to_device(batch)
    h = model.encoder(device.series, device.scale, device.num_patches, device.series_place)
    actual = to_numpy(model.projector(h))

    e, p = spec.encoder, {name: torch.from_numpy(array) for name, array in arrays.items()}
    series, scale = torch.from_numpy(batch.series), torch.from_numpy(batch.scale)

    def affine(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    x = F.conv1d(series[:, None], p["encoder.patch_embed.weight"], stride=e.patch_size).transpose(1, 2)
    x = x + p["encoder.pos_embed"][:, : x.shape[1]]
    x = x + p["encoder.series_embed"][torch.from_numpy(batch.series_place).long()][:, None]
    x = x + affine("encoder.scale_out", F.gelu(affine("encoder.scale_in", scale)))[:, None]
    x = norm("encoder.input_norm", x)
    pads = torch.arange(x.shape[1]) >= torch.from_numpy(batch.num_patches)[:, None]
    assert pads.any()
    for i in range(e.num_layers):
        layer = torch.nn.TransformerEncoderLayer(
            e.hidden_size, e.num_heads, e.ffn_size, dropout=0.0, activation="gelu", batch_first=True
        )
        prefix = f"encoder.layers.{i}."
        layer.load_state_dict({n.removeprefix(prefix): a for n, a in p.items() if n.startswith(prefix)})
        x = layer(x, src_key_padding_mask=pads)
    y = F.gelu(affine("projector.linear", norm("projector.norm", x)))
    y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * p["projector.output_norm.weight"]
    assert relative(actual[~pads.numpy()], y.detach().numpy()[~pads.numpy()]) < 3e-6


def test_rms_norm_in_bfloat16() -> None:
    """Statistics in float32, cast, then times the weight, as Hugging Face does; the other order rounds differently."""
    import mlx.core as mx
    import torch

    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((64, 64)).astype(np.float32), rng.standard_normal(64).astype(np.float32)
    results = []
    for name, half in (("mlx", mx.bfloat16), ("torch", torch.bfloat16)):
        layer = lm_driver.module(name, "layers").RMSNorm(64, 1e-5)
        if name == "mlx":
            layer.weight = mx.array(weight)
            results.append(np.array(layer(mx.array(x).astype(half)).astype(mx.float32)))
        else:
            layer.weight = torch.nn.Parameter(torch.from_numpy(weight))
            results.append(layer(torch.from_numpy(x).to(half)).detach().float().numpy())

    def rounded(a: np.ndarray) -> np.ndarray:
        return torch.from_numpy(a).bfloat16().float().numpy()

    halved = rounded(x)
    normed = rounded(halved / np.sqrt(np.square(halved).mean(-1, keepdims=True) + np.float32(1e-5)))
    for actual in results:
        assert (actual != rounded(normed * rounded(weight))).mean() < 0.01


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_the_logits(case: str, backend_name: str, directory: Path) -> None:
    """-log softmax at the label places, in NumPy."""
    spec = specs(directory)[case]
    (batch,) = batches(spec, 1)
    backend, model = realise(backend_name, spec)
    logits = all_logits(backend, model, batch).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(len(batch.tokens))[:, None]
    positions = np.arange(batch.tokens.shape[1])[None] if batch.positions is None else batch.positions
    expected = -(logprobs[rows, positions, batch.targets] * batch.mask).sum()
    assert backend.score(model, lm, batch)["loss"] == pytest.approx(expected, rel=1e-5)
    tokens = backend.score_tokens(model, batch)
    np.testing.assert_allclose(tokens["logprobs"], logprobs[rows, positions, batch.targets], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(tokens["hits"], logits.argmax(-1)[rows, positions] == batch.targets)


@pytest.mark.parametrize("case", [case for case in CASES if case not in MASKED])
def test_sessions_of_whole_models(case: str, backend_name: str, directory: Path) -> None:
    """Prompts of different lengths, with their series, then known tokens one by one: the logits of one forward pass."""
    spec = specs(directory)[case]
    (batch,) = batches(spec, 1)
    lengths = np.array([9, 1, 14, 5]) if batch.positions is None else batch.positions[:, 0] + 1
    backend, model = realise(backend_name, spec)
    expected, rows = all_logits(backend, model, batch), np.arange(len(lengths))
    session = backend.session(model)
    actual = session.prefill(replace(batch, lengths=lengths.astype(np.int32)))
    for new in range(3):
        np.testing.assert_allclose(actual, expected[rows, lengths + new - 1], rtol=0, atol=2e-5)
        actual = session.extend(batch.tokens[rows, lengths + new])


def test_positions_count_from_each_rows_own_start(backend_name: str) -> None:
    """Rotary attention is relative and would hide an offset, until it costs precision or meets learned positions."""
    cache = lm_driver.module(backend_name, "layers").KVCache(1, [3, 0])
    assert cache.positions(5).tolist() == [[0, 0, 0, 0, 1], [0, 1, 2, 3, 4]]
    cache.length = 5
    assert cache.select([1, 0]).positions(1).tolist() == [[5], [2]]


def all_logits(backend: Any, model: Any, batch: Batch) -> np.ndarray:
    return to_numpy(model.logits(backend.to_device(batch)))


def to_numpy(array: Any) -> np.ndarray:
    return array.detach().numpy() if hasattr(array, "detach") else np.array(array)
