"""Presets: the sizes of record, and a first loss near that of a uniform guess."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from mlx_training.config_checks import PRESETS
from mlx_training.config_model import DecoderConfig, KgramConfig, RecurrentConfig, SSMConfig, TimeSeriesConfig
from mlx_training.data.batch import Batch
from mlx_training.objectives.lm import lm
from mlx_training.spec import DecoderSpec
from tests.parity.cases import realise
from tests.unit.test_golden import PRESET_CASES, VOCABULARY, preset_spec

SIZES = {"mainrun": (16_000, 7_717_504), "modern-llm-253m": (50_257, 252_925_952)}


def preset(name: str) -> DecoderConfig:
    return DecoderConfig.model_validate({"family": "decoder", **PRESETS["decoder"][name]})


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters(name: str) -> None:
    vocab_size, expected = SIZES[name]
    assert preset(name).spec(vocab_size).num_parameters == expected


def test_mamba_130m_has_the_published_size() -> None:
    config = SSMConfig.model_validate({"family": "ssm", **PRESETS["ssm"]["mamba-130m"]})
    assert config.spec(50_280).num_parameters == 129_135_360


def test_every_preset_has_a_name_and_every_name_a_preset() -> None:
    for family in (DecoderConfig, KgramConfig, RecurrentConfig, SSMConfig, TimeSeriesConfig):
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


VOCAB_SIZE = 512


def first_loss(spec: Any) -> float:
    """Mean nats of the fresh model on random tokens, in PyTorch."""
    pytest.importorskip("torch")
    backend, model = realise("torch", spec)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (4, 33)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((4, 32), np.float32), np.full(4, 32, np.int32))
    return backend.score(model, lm, batch)["loss"] / 128


@pytest.mark.parametrize("case", PRESET_CASES)
def test_first_loss_is_that_of_a_guess(case: str) -> None:
    """Within 3 % of ln V, at the preset's widths; two layers and a small vocabulary, to be quick.

    Mamba's tied head begins with a liking for the token that it reads, which drowns in a vocabulary of real size only.
    """
    vocab_size = VOCABULARY if "mamba" in case else VOCAB_SIZE
    spec: Any = preset_spec(*PRESET_CASES[case], vocab_size)
    spec = replace(spec, num_layers=min(spec.num_layers, 2))
    assert first_loss(spec) == pytest.approx(np.log(vocab_size), rel=0.03)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_first_loss_of_a_recurrent_model_with_a_tied_head(cell: str) -> None:
    shape = {"cell": cell, "hidden_size": 1024, "tie_word_embeddings": True}
    config = RecurrentConfig.model_validate({"family": "recurrent", "recurrent": shape})
    assert first_loss(config.spec(VOCAB_SIZE)) == pytest.approx(np.log(VOCAB_SIZE), rel=0.03)
