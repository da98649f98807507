"""Frozen LMs: the same logits and gradients from the same files on both backends, and clear errors."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_training.errors import CheckpointError, ConfigError
from tests.parity import lm_driver
from tests.parity.tiny_checkpoints import FAMILIES, LINEAR_ROPE, LLAMA3_ROPE, save_tiny, save_tiny_quantized

pytestmark = pytest.mark.usefixtures("both_backends")
TOKENS = np.random.default_rng(0).integers(3, 96, (2, 24))
CASES = ("plain", "4-bit", "4-bit resident", "8-bit", "8-bit resident")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{(model_type, "plain" | "4-bit" | "8-bit"): directory}, made on demand."""
    root, made = tmp_path_factory.mktemp("tiny"), {}

    def get(model_type: str, kind: str) -> Path:
        if (model_type, kind) not in made:
            directory = root / f"{model_type}-{kind}"
            made[model_type, kind] = (
                save_tiny(model_type, directory)
                if kind == "plain"
                else save_tiny_quantized(model_type, directory, bits=int(kind[0]))
            )
        return made[model_type, kind]

    return get


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_backends_agree(checkpoints, model_type, case):
    kind, *resident = case.split()
    options = {"weights": "resident" if resident else "dequantized"}
    lms = {b: lm_driver.load(b, checkpoints(model_type, kind), **options) for b in ("mlx", "torch")}
    logits = {b: lm_driver.logits(b, lm, TOKENS) for b, lm in lms.items()}
    assert logits["mlx"].dtype == logits["torch"].dtype == np.float32
    assert np.abs(logits["mlx"]).max() > 1  # the tiny model is not degenerate
    np.testing.assert_allclose(logits["mlx"], logits["torch"], rtol=0, atol=1e-5)

    gradients = {b: lm_driver.embedding_gradient(b, lm, TOKENS) for b, lm in lms.items()}
    difference = np.linalg.norm(gradients["mlx"] - gradients["torch"]) / np.linalg.norm(gradients["torch"])
    assert difference <= 1e-5

    hashes, heads = [], []
    for backend, lm in lms.items():
        hashes.append(lm_driver.module(backend, "frozen").frozen_hash(lm))
        heads.append(lm_driver.module(backend, "frozen").head_weight(lm))
    assert hashes[0] == hashes[1]
    np.testing.assert_array_equal(*heads)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_equals_transformers_eager(checkpoints, backend_name, model_type):
    """Against the library's own loading and its eager attention, at a length well beyond Gemma's window.

    The files carry `rope_parameters` only, which mlx-lm's Llama would read as plain RoPE.
    """
    directory = checkpoints(model_type, "plain")
    tokens = np.random.default_rng(2).integers(3, 96, (1, 64))
    actual = lm_driver.logits(backend_name, lm_driver.load(backend_name, directory), tokens)
    np.testing.assert_allclose(actual, eager_logits(directory, tokens), rtol=0, atol=1e-5)


def eager_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """Of transformers' own loading and eager attention."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        return reference(torch.from_numpy(tokens)).logits.numpy()


VARIANTS = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "rope_parameters": LINEAR_ROPE},
    "mistral": {"head_dim": 24, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen2": {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1},
    "qwen3": {"rope_parameters": LINEAR_ROPE, "rms_norm_eps": 1e-3},
    "gemma3_text": {"rms_norm_eps": 1e-3, "num_key_value_heads": 1, "final_logit_softcapping": None},
}


@pytest.mark.parametrize("model_type", VARIANTS)
def test_other_settings_equal_transformers_eager(model_type, backend_name, tmp_path):
    """What the usual checkpoint of a family leaves out: biases, other scalings of RoPE, head sizes, eps."""
    directory = save_tiny(model_type, tmp_path / "lm", **VARIANTS[model_type])
    tokens = np.random.default_rng(4).integers(3, 96, (2, 48))
    actual = lm_driver.logits(backend_name, lm_driver.load(backend_name, directory), tokens)
    np.testing.assert_allclose(actual, eager_logits(directory, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("qwen2", "attention_bias", True),
        ("qwen2", "mlp_bias", True),
        ("gemma3_text", "mlp_bias", True),
        ("llama", "query_pre_attn_scalar", 64),
    ],
)
def test_keys_of_other_families_say_nothing(checkpoints, backend_name, model_type, key, value, tmp_path):
    directory = checkpoints(model_type, "plain")
    shutil.copytree(directory, tmp_path / "lm")
    config = json.loads((directory / "config.json").read_text())
    (tmp_path / "lm/config.json").write_text(json.dumps(config | {key: value}))
    with_key, without = (lm_driver.load(backend_name, path) for path in (tmp_path / "lm", directory))
    np.testing.assert_array_equal(*(lm_driver.logits(backend_name, lm, TOKENS) for lm in (with_key, without)))


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias"])
def test_biases_that_only_one_library_reads_are_refused(checkpoints, backend_name, key, tmp_path):
    """mlx-lm runs Mistral as a Llama, whose biases it would look for."""
    shutil.copytree(checkpoints("mistral", "plain"), tmp_path / "lm")
    config = json.loads((tmp_path / "lm/config.json").read_text())
    (tmp_path / "lm/config.json").write_text(json.dumps(config | {key: True}))
    with pytest.raises(ConfigError, match=f"{key} = True; only False is equal on both backends"):
        lm_driver.load(backend_name, tmp_path / "lm")


def test_long_contexts_agree(checkpoints):
    """RoPE frequencies that differ in the last place would show here (7e-5 with mlx.nn.RoPE)."""
    tokens = np.random.default_rng(3).integers(3, 96, (1, 2048))
    directory = checkpoints("gemma3_text", "plain")
    results = [lm_driver.logits(b, lm_driver.load(b, directory), tokens) for b in ("mlx", "torch")]
    np.testing.assert_allclose(*results, rtol=0, atol=2e-5)


def test_embeddings_are_on_one_scale(checkpoints):
    """Gemma multiplies by sqrt(H), exactly once, outside the body."""
    directory = checkpoints("gemma3_text", "plain")
    mlx, torch = (lm_driver.load(b, directory) for b in ("mlx", "torch"))
    x = np.array(mlx.embed(lm_driver.to_array("mlx", TOKENS)))
    np.testing.assert_array_equal(x, torch.embed(lm_driver.to_array("torch", TOKENS)).numpy())
    np.testing.assert_allclose(x, np.array(mlx.model.embed_tokens.weight)[TOKENS] * 8, rtol=1e-6)


@pytest.mark.parametrize("case", ("plain", "4-bit", "4-bit resident"))
def test_bfloat16(checkpoints, case):
    import mlx.core as mx
    import torch

    kind, *resident = case.split()
    options = {"precision": "bfloat16", "weights": "resident" if resident else "dequantized"}
    lms = {b: lm_driver.load(b, checkpoints("llama", kind), **options) for b in ("mlx", "torch")}
    assert lms["mlx"].embed(mx.array(TOKENS)).dtype == mx.bfloat16
    assert lms["torch"].embed(torch.from_numpy(TOKENS)).dtype == torch.bfloat16
    logits = {b: lm_driver.logits(b, lm, TOKENS) for b, lm in lms.items()}
    exact = lm_driver.logits("torch", lm_driver.load("torch", checkpoints("llama", kind)), TOKENS)
    for values in logits.values():
        assert values.dtype == np.float32
        assert np.abs(values - exact).mean() < 0.02 * np.abs(exact).max()


def test_nothing_is_trainable(checkpoints):
    from mlx.utils import tree_flatten

    for options in ({}, {"weights": "resident"}):
        mlx = lm_driver.load("mlx", checkpoints("llama", "4-bit"), **options)
        assert not tree_flatten(mlx.trainable_parameters())
        torch = lm_driver.load("torch", checkpoints("llama", "4-bit"), **options)
        assert not any(p.requires_grad for p in torch.parameters())
        assert not torch.train().training
    names = [name for name, _ in torch.named_parameters()]
    assert names and all("norm" in name for name in names)  # packed weights are buffers


def test_resident_gradients_are_those_of_dequantized_weights(checkpoints, backend_name):
    directory = checkpoints("qwen2", "4-bit")
    dense, packed = (lm_driver.load(backend_name, directory, weights=w) for w in ("dequantized", "resident"))
    for ask in (lm_driver.logits, lm_driver.embedding_gradient):
        given, expected = ask(backend_name, packed, TOKENS), ask(backend_name, dense, TOKENS)
        if backend_name == "torch":  # which expands a matrix for each product
            np.testing.assert_array_equal(given, expected)
        else:
            assert np.linalg.norm(given - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(("kind", "share"), [("4-bit", 1.9), ("4-bit", 2.1), ("plain", 1.9)])
def test_auto_expands_weights_that_take_half_of_the_free_memory(
    checkpoints, backend_name, kind, share, monkeypatch, capsys
):
    directory = checkpoints("llama", kind)
    dense = 4 * sum(p.numel() for p in lm_driver.load("torch", checkpoints("llama", "plain")).parameters())
    monkeypatch.setattr("mlx_training.environment.free_memory", lambda: int(share * dense))
    lm = lm_driver.load(backend_name, directory, weights="auto")
    stays = kind == "4-bit" and share < 2
    assert hasattr(lm.model.layers[0].mlp.up_proj, "scales") == stays
    assert ("stay packed" in capsys.readouterr().err) == stays


def test_sharded_checkpoint(backend_name, tmp_path):
    whole = save_tiny("llama", tmp_path / "whole")
    shards = save_tiny("llama", tmp_path / "shards", max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    pair = [lm_driver.logits(backend_name, lm_driver.load(backend_name, d), TOKENS) for d in (whole, shards)]
    np.testing.assert_array_equal(*pair)


def test_mixed_precision_written_by_mlx_lm(tmp_path):
    """Widths per layer as `mlx_lm.convert` writes them, and mlx-lm's own logits as the reference."""
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    source, target = save_tiny("qwen3", tmp_path / "float"), tmp_path / "mixed"
    model, config = load_model(source)

    def predicate(path, _):
        if path.endswith("down_proj"):
            return {"bits": 6, "group_size": 32}
        return "v_proj" not in path  # these stay dense

    model, config = quantize_model(model, config, 64, 4, quant_predicate=predicate)
    save_model(target, model)
    save_config(config, target / "config.json")
    expected = np.array(model(mx.array(TOKENS)))
    for backend in ("mlx", "torch"):
        for weights in ("dequantized", "resident"):
            lm = lm_driver.load(backend, target, weights=weights)
            np.testing.assert_allclose(lm_driver.logits(backend, lm, TOKENS), expected, rtol=0, atol=2e-5)


def _edit_weights(directory: Path, edit) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(NORM), f"1 missing: {NORM}"),
        (lambda w: w.update({"model.extra.weight": w[NORM]}), "1 unused: model.extra.weight"),
        (lambda w: w.update({NORM: w[NORM][:5].copy()}), rf"{NORM} is \(5,\), config.json says \(64,\)"),
        (lambda w: w.update({"norm.weight": w.pop("model.norm.weight")}), "missing: model.norm.weight.*unused: norm"),
    ],
)
def test_weights_must_match(backend_name, tmp_path, edit, message):
    directory = save_tiny("llama", tmp_path / "lm")
    _edit_weights(directory, edit)
    with pytest.raises(CheckpointError, match=message):
        lm_driver.load(backend_name, directory)


def test_packed_weights_must_be_complete(backend_name, tmp_path):
    directory = save_tiny_quantized("llama", tmp_path / "lm")
    _edit_weights(directory, lambda w: w.pop("model.layers.0.mlp.up_proj.biases"))
    with pytest.raises(CheckpointError, match=r"unused: model.layers.0.mlp.up_proj.scales.*is \(96, 8\)"):
        lm_driver.load(backend_name, directory)


def test_needless_tensors_are_ignored(backend_name, tmp_path):
    """Old exports store RoPE tables, some store a tied head."""
    directory = save_tiny("llama", tmp_path / "lm")
    expected = lm_driver.logits(backend_name, lm_driver.load(backend_name, directory), TOKENS)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
        "lm_head.weight": np.zeros((96, 64), np.float32),
    }
    _edit_weights(directory, lambda w: w.update(extra))
    actual = lm_driver.logits(backend_name, lm_driver.load(backend_name, directory), TOKENS)
    np.testing.assert_array_equal(actual, expected)


def test_other_quantisation_is_refused(backend_name, tmp_path):
    directory = save_tiny_quantized("llama", tmp_path / "lm")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization"]["mode"] = "mxfp4"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="mode 'mxfp4'; only 'affine'"):
        lm_driver.load(backend_name, directory)


def test_a_model_of_mlx_lm_comes_alone(checkpoints):
    """Importing all of mlx-lm takes seconds and sets RLIMIT_NOFILE to (2048, 4096) for the whole process."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = (
        "import resource, sys\n"
        "from mlx_training.mlx_backend.frozen import load_pretrained\n"
        f"load_pretrained({str(checkpoints('llama', 'plain'))!r})\n"
        f"assert resource.getrlimit(resource.RLIMIT_NOFILE) == {limit}\n"
        "assert not {'mlx_lm', 'transformers', 'torch'} & set(sys.modules)\n"
        "from mlx_lm.utils import load\n"  # all of it, for whoever wants it
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_torch_needs_neither_transformers_nor_a_compiler(checkpoints):
    """Each takes seconds to import, of the five between a command and its first step."""
    code = (
        "import sys\n"
        "from torch_backend.frozen import load_pretrained\n"
        f"load_pretrained({str(checkpoints('llama', 'plain'))!r})\n"
        "assert not {'transformers', 'torch._dynamo', 'sympy', 'scipy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
