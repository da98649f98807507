"""Affine quantisation: NumPy writes and PyTorch reads the bits that MLX would."""

import numpy as np
import pytest

from mlx_training.errors import ConfigError
from mlx_training.quantize import quantize, quantize_directory
from tests.parity import lm_driver
from tests.parity.tiny_checkpoints import save_tiny

LAYOUTS = [(group_size, bits) for group_size in (32, 64, 128) for bits in (2, 3, 4, 5, 6, 8)]


def _matrix() -> np.ndarray:
    """Rows of very different sizes, and the edge cases: zero, constant, one-sided."""
    w = np.random.default_rng(0).normal(size=(12, 256)) * np.logspace(-9, 3, 12)[:, None]
    w[2], w[3], w[4], w[5] = 0, 2.5, np.abs(w[4]), -np.abs(w[5])
    return w.astype(np.float32)


@pytest.mark.parametrize(("group_size", "bits"), LAYOUTS)
def test_numpy_and_torch_equal_mlx(both_backends, group_size, bits):
    import mlx.core as mx
    import torch

    parts = quantize(_matrix(), group_size, bits)
    for ours, theirs in zip(parts, mx.quantize(mx.array(_matrix()), group_size, bits), strict=True):
        np.testing.assert_array_equal(ours, np.array(theirs))
    expected = np.array(mx.dequantize(*map(mx.array, parts), group_size, bits))
    for backend in ("mlx", "torch"):
        packed = mx.array(parts[0]) if backend == "mlx" else torch.from_numpy(parts[0].view(np.int32))
        arrays = [packed, *(lm_driver.to_array(backend, part) for part in parts[1:])]
        actual = lm_driver.module(backend, "quant").dequantize(*arrays, group_size, bits)
        np.testing.assert_array_equal(np.asarray(actual), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_scales_are_expanded_in_float32(both_backends, dtype):
    import mlx.core as mx
    import torch

    packed, scales, biases = quantize(_matrix()[3:], 64, 4)
    mlx = lm_driver.module("mlx", "quant").dequantize(
        mx.array(packed), *(mx.array(a).astype(getattr(mx, dtype)) for a in (scales, biases)), 64, 4
    )
    halves = (torch.from_numpy(a).to(getattr(torch, dtype)) for a in (scales, biases))
    ours = lm_driver.module("torch", "quant").dequantize(torch.from_numpy(packed.view(np.int32)), *halves, 64, 4)
    np.testing.assert_array_equal(np.array(mlx), ours.numpy())


def test_vectors_of_mlx(shared_data, backends):
    """`mlx_quantize`: arrays that MLX 0.32.4 wrote; dequantised bit for bit, and packed again bit for bit."""
    if "torch" not in backends:
        pytest.skip("backend torch is not installed")
    import torch

    from torch_backend.quant import dequantize

    vectors = np.load(shared_data / "mlx_quantize" / "affine_g64.npz")
    cases = [name.removesuffix("/q") for name in vectors if name.endswith("/q")]
    assert len(cases) == 12
    for case in cases:
        bits = int(case[-1])
        stored = [vectors[f"{case}/{part}"] for part in ("q", "scales", "biases")]
        arrays = [torch.from_numpy(stored[0].view(np.int32)), *map(torch.from_numpy, stored[1:])]
        np.testing.assert_array_equal(dequantize(*arrays, 64, bits).numpy(), vectors[f"{case}/deq"])
        for ours, theirs in zip(quantize(vectors[case.split("/")[0] + "/w"], 64, bits), stored, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_directory_equals_mlx_lm(both_backends, tmp_path):
    """The same tensors as mlx-lm's own conversion, and mlx-lm reads the directory with the right RoPE."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model

    source, target = save_tiny("llama", tmp_path / "float"), tmp_path / "4bit"
    (source / "tokenizer.json").write_text("{}")
    quantize_directory(source, target, bits=4, group_size=32)
    assert (target / "tokenizer.json").is_file()
    ours, _ = load_model(target)
    original, config = load_model(source)
    theirs, _ = quantize_model(original, config, 32, 4)
    theirs = dict(tree_flatten(theirs.parameters()))
    for name, array in tree_flatten(ours.parameters()):
        np.testing.assert_array_equal(np.array(array), np.array(theirs[name]))
    tokens = np.arange(3, 35)[None]
    expected = lm_driver.logits("torch", lm_driver.load("torch", target), tokens)
    np.testing.assert_allclose(np.array(ours(mx.array(tokens))), expected, rtol=0, atol=1e-5)


def test_bfloat16_directory(both_backends, tmp_path):
    """Types are kept: scales and biases of a bfloat16 checkpoint are bfloat16, rounded as MLX rounds."""
    import mlx.core as mx

    source, target = save_tiny("llama", tmp_path / "float"), tmp_path / "4bit"
    floats = {name: array.astype(mx.bfloat16) for name, array in mx.load(str(source / "model.safetensors")).items()}
    mx.save_safetensors(str(source / "model.safetensors"), floats)
    quantize_directory(source, target)
    ours = mx.load(str(target / "model.safetensors"))
    name = "model.layers.0.mlp.gate_proj"
    expected = mx.quantize(floats[f"{name}.weight"], 64, 4)
    for part, array in zip(("weight", "scales", "biases"), expected, strict=True):
        assert ours[f"{name}.{part}"].dtype == array.dtype
        assert mx.array_equal(ours[f"{name}.{part}"], array)


def test_quantize_errors(both_backends, tmp_path):
    with pytest.raises(ConfigError, match="bits are one of"):
        quantize(np.zeros((2, 64), np.float32), 64, 7)
    with pytest.raises(ConfigError, match="last axis a multiple"):
        quantize(np.zeros((2, 48), np.float32), 32, 4)
    source = save_tiny("llama", tmp_path / "float")
    quantize_directory(source, tmp_path / "once")
    with pytest.raises(ConfigError, match="quantised already"):
        quantize_directory(tmp_path / "once", tmp_path / "twice")
