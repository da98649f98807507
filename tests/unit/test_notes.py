"""What is allowed and hardly meant is said; what is meant is not."""

import re
from pathlib import Path
from typing import Any

import pytest

from mlx_training.config_model import DecoderConfig
from mlx_training.notes import notes
from mlx_training.spec import AdapterSpec, FrozenLM, PretrainedSpec


def of_decoder(tokenizer_size: int | None = None, **shape: Any) -> list[str]:
    model = DecoderConfig.model_validate({"family": "decoder", "decoder": {"context_length": 64} | shape})
    return notes(model, model.spec(640), tokenizer_size)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (
            {"mixers": ["local"], "window": 64},
            "model.decoder.window 64: not below context_length 64, so that in training",
        ),
        ({"mixers": ["causal", "strided"], "stride": 65}, "sees its own token alone"),
        ({"mixers": ["fixed"]}, "model.decoder.fixed.local_context 64: .* causal"),
    ],
)
def test_patterns_that_do_not_fit_into_a_window(shape: dict[str, Any], expected: str) -> None:
    (note,) = of_decoder(**shape)
    assert re.search(expected, note), note


def test_patterns_that_fit() -> None:
    fixed = {"local_context": 32}
    assert not of_decoder(mixers=["local", "strided", "fixed"], window=63, stride=8, fixed=fixed)
    assert not of_decoder(window=256), "causal layers read no window"


def test_a_rank_above_a_side_of_the_matrix(tmp_path: Path) -> None:
    model: Any = DecoderConfig.model_validate({"family": "decoder"})
    linears = (("layers.0.q_proj", 32, 32), ("layers.0.k_proj", 8, 32))
    for rank, number in ((8, 0), (9, 1), (33, 2)):
        found = notes(model, PretrainedSpec(FrozenLM(tmp_path, 32, 96), adapter=AdapterSpec(linears, rank)))
        assert [f"model.lora.rank {rank}: {number} of 2 matrices" in note for note in found] == [True] * bool(number)
        assert all("layers.0.k_proj 8;" in note for note in found)


def test_a_tokenizer_smaller_than_asked_for() -> None:
    assert of_decoder(640) == of_decoder(700) == []
    assert of_decoder(639) == ["model.tokenizer.train 640: the training text has merges for 639 ids only"]
