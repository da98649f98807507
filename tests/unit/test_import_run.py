"""The `model` section of a run that is made of a model: it describes every decoder."""

from pathlib import Path

import pytest

from mlx_training.config import to_yaml
from mlx_training.config_model import DecoderConfig
from mlx_training.import_run import _config
from mlx_training.spec import DecoderSpec
from tests.parity.cases import MASKED, specs

DECODERS = {name: spec for name, spec in specs(Path()).items() if isinstance(spec, DecoderSpec) and name not in MASKED}


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_has_a_section(name: str, tmp_path: Path) -> None:
    config = _config(DECODERS[name], "somewhere", tmp_path)
    assert isinstance(config.model, DecoderConfig)
    assert config.model.spec(DECODERS[name].vocab_size) == DECODERS[name]
    assert to_yaml(config)
