"""Presets: the sizes of record, and a first loss near that of a uniform guess."""

from typing import Any, get_args

import pytest

from mlx_training.config_checks import PRESETS
from mlx_training.config_model import DecoderConfig, TimeSeriesConfig
from mlx_training.spec import DecoderSpec

SIZES = {"mainrun": (16_000, 7_717_504), "modern-llm-253m": (50_257, 252_925_952)}


def preset(name: str) -> DecoderConfig:
    return DecoderConfig.model_validate({"family": "decoder", **PRESETS["decoder"][name]})


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters(name: str) -> None:
    vocab_size, expected = SIZES[name]
    assert preset(name).spec(vocab_size).num_parameters == expected


def test_every_preset_has_a_name_and_every_name_a_preset() -> None:
    for family in (DecoderConfig, TimeSeriesConfig):
        annotation: Any = family.model_fields["preset"].annotation
        (named, _) = get_args(annotation)
        assert set(get_args(named)) == set(PRESETS[get_args(family.model_fields["family"].annotation)[0]])


def test_gpt_parts() -> None:
    spec = preset("mainrun").spec(16_000)
    assert spec.head_dim == 8 and spec.max_length == 256
    table = spec.params()
    assert table["model.embed_positions.weight"].scale == 0
    assert table["model.layers.0.self_attn.q_proj.weight"].shape == (64, 256)
    assert "model.layers.0.mlp.gate_proj.weight" not in table


def test_alibi_slopes() -> None:
    assert DecoderSpec(8, num_heads=4).alibi_slopes().tolist() == [0.25, 0.0625, 0.015625, 0.00390625]
    six = DecoderSpec(8, num_heads=6).alibi_slopes()
    assert six.tolist() == pytest.approx([0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125])
