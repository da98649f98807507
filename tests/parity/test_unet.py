"""U-Net widths: what enters each layer, the sizes of the plan, and lists that are refused."""

from pathlib import Path

import numpy as np
import pytest

from mlx_training.config import load_config
from mlx_training.diagnostics.flops import lm_shape
from mlx_training.errors import ConfigError
from mlx_training.objectives.lm import lm
from mlx_training.spec import DecoderSpec
from tests.e2e.tiny import decoder_config
from tests.parity.cases import batches, realise, specs


def test_skips_go_across(backend_name: str) -> None:
    """Into the last layer goes the one before it, made as wide again, and what the first one gave."""
    spec = specs(Path())["decoder-unet"]
    (batch,) = batches(spec, 1)
    backend, model = realise(backend_name, spec)
    seen = backend.activations(model, lm, batch)
    resize = backend.export(model)["model.layers.2.resize.weight"]
    np.testing.assert_allclose(seen["model.layers.2.resize"], seen["model.layers.1"] @ resize.T, atol=1e-6)
    entering = seen["model.layers.2.resize"] + seen["model.layers.0"]
    normed = entering / np.sqrt(np.square(entering).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(seen["model.layers.2.input_layernorm"], normed, atol=1e-5)


def test_which_layers_are_across() -> None:
    def across(*widths: int) -> list[int | None]:
        spec = DecoderSpec(8, hidden_size=widths[0], num_layers=len(widths), widths=widths)
        return [spec.skip_from(i) for i in range(len(widths))]

    assert across(32, 16, 8, 16, 32) == [None, None, None, 1, 0]
    assert across(32, 16, 16, 32) == [None, None, None, 0], "neighbours are joined by the residual stream already"
    assert DecoderSpec(8).skip_from(2) is None


def test_sizes_follow_the_width() -> None:
    spec = load_config("language/unet").model.spec(100)
    assert isinstance(spec, DecoderSpec)
    matrices = {n: p.size for n, p in spec.params().items() if len(p.shape) == 2 and "embed" not in n}
    assert lm_shape(spec).weights == sum(matrices.values())
    frequencies = spec.rope_frequencies()
    for layer, width in enumerate(spec.widths):
        one = spec.of_layer(layer)
        assert (one.hidden_size, one.intermediate_size, one.head_dim) == (width, 4 * width, width // 8)
        alone = DecoderSpec(8, head_dim=width // 8).rope_frequencies()
        np.testing.assert_array_equal(frequencies[spec.rope_slice(layer)], alone)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["widths=[16, 8, 16]"], r"widths: given \[16, 8, 16\]; that is 3 layers, but num_layers is 1"),
        (["widths=[16, 8, 12]", "num_layers=3"], r"must mirror the way down: \[16, 8, 16\]"),
        (["widths=[16, 8, 8, 12]", "num_layers=4"], r"must mirror the way down: \[16, 8, 8, 16\]"),
        (["widths=[24, 8, 24]", "num_layers=3"], r"end with hidden_size 16: \[16, 8, 16\], or give hidden_size=24"),
        (["widths=[16, 7, 16]", "num_layers=3"], r"multiple of 4, twice 2 heads .*: \[16, 8, 16\]"),
        (["widths=[16, 7, 16]", "num_layers=3", "positions=none"], r"multiple of 2, the heads: \[16, 8, 16\]"),
        (["widths=[16, 8, 16]", "num_layers=3", "head_dim=4"], "head_dim: given beside widths"),
        (["widths=[16, 8, 16]", "num_layers=3", "intermediate_dim=8"], "intermediate_dim: given beside widths"),
        (["widths=[16]"], "widths"),
        (["widths=[16, 0, 16]", "num_layers=3"], "widths"),
    ],
)
def test_impossible_lists(tmp_path: Path, overrides: list[str], says: str) -> None:
    (tmp_path / "config.yaml").write_text(decoder_config(tmp_path / "run"))
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        load_config(tmp_path / "config.yaml", [f"model.decoder.{key}" for key in overrides])
