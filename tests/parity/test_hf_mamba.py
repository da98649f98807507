"""Mamba and Mamba-2 in Hugging Face's format, both ways, against transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_training.data.batch import Batch
from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.hf_mamba import read_mamba
from mlx_training.init import initialise
from mlx_training.spec import SSMSpec
from tests.parity.cases import VOCAB, realise, specs

pytestmark = pytest.mark.usefixtures("both_backends")
CASES = ("ssm-mamba", "ssm-mamba2")
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (2, 19)).astype(np.int32)


def published(kind: str, **changes: Any) -> Any:
    """A tiny random model of transformers, std 0.1."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    if kind == "mamba":
        model: Any = MambaForCausalLM(MambaConfig(**sizes | changes))
    else:
        heads = {"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
        model = Mamba2ForCausalLM(Mamba2Config(**sizes | heads | changes))
    for name, parameter in model.named_parameters():
        if "A_log" not in name and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits_of(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def our_logits(backend_name: str, spec: SSMSpec, arrays: dict[str, np.ndarray]) -> np.ndarray:
    backend, model = realise(backend_name, spec)
    backend.load(model, arrays)
    labels = np.zeros(TOKENS.shape, np.int32)
    batch = Batch(TOKENS, labels, labels.astype(np.float32), np.full(2, TOKENS.shape[1], np.int32))
    return np.asarray(model.logits(backend.to_device(batch)).tolist())


@pytest.mark.parametrize("changes", [{}, {"expand": 1, "num_heads": 2, "tie_word_embeddings": False}])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_what_transformers_saves_is_read(kind: str, changes: dict[str, Any], backend_name: str, tmp_path: Path) -> None:
    if kind == "mamba":
        changes = {key: value for key, value in changes.items() if key != "num_heads"}
    model = published(kind, **changes)
    model.save_pretrained(tmp_path)
    spec, arrays = read_mamba(tmp_path)
    expected = logits_of(model)
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(our_logits(backend_name, spec, arrays), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_is_read_by_transformers(case: str, directory: Path, backend_name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    spec = specs(directory)[case]
    assert isinstance(spec, SSMSpec)
    arrays = initialise(spec, 0)
    arrays |= {n: a + 0.1 * np.random.default_rng(1).standard_normal(a.shape).astype("f") for n, a in arrays.items()}
    (tmp_path / "config.json").write_text(json.dumps(spec.hf_config(bos_token_id=1, eos_token_id=2)))
    save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    np.testing.assert_allclose(our_logits(backend_name, spec, arrays), expected, rtol=0, atol=1e-4)
    again, read = read_mamba(tmp_path)
    assert (again.mixers, again.params()) == (spec.mixers, spec.params())
    assert all((read[name] == arrays[name]).all() for name in arrays)


def test_what_a_spec_cannot_express_is_refused(tmp_path: Path) -> None:
    published("mamba").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key, value, message in (
        ("use_bias", True, "use_bias True; the family ssm has False only"),
        ("hidden_act", "gelu", "hidden_act 'gelu'"),
        ("model_type", "falcon_mamba", "reads mamba and mamba2"),
    ):
        path.write_text(json.dumps(config | {key: value}))
        with pytest.raises(ConfigError, match=message):
            read_mamba(tmp_path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="model_type None"):
        read_mamba(tmp_path)
    path.write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match="no configuration of a Mamba"):
        read_mamba(tmp_path)
    path.write_text(json.dumps(config | {"state_size": 5}))
    with pytest.raises(CheckpointError, match="A_log"):
        read_mamba(tmp_path)
