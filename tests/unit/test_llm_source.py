"""Where an LM comes from, and what its files say: no framework is needed, and no typing error starts a download."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_training import llm_source
from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.llm_config import normalize_llm_config
from mlx_training.llm_source import describe_llm, match_weights, read_llm_config, resolve_llm, weight_files

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
GEMMA = LLAMA | {"model_type": "gemma3_text", "num_hidden_layers": 12}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def _save(path: Path, array: np.ndarray) -> None:
    save_file({"a": array}, path)


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "models" / "tiny-llama"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(LLAMA))
    _save(directory / "model.safetensors", np.zeros(3, np.float32))
    return directory


@pytest.fixture
def no_hub(monkeypatch):
    def fail(llm_id, revision):
        raise AssertionError(f"{llm_id!r} was looked up on the hub")

    monkeypatch.setattr(llm_source, "_download", fail)


def test_directories_are_found(model, monkeypatch, no_hub):
    assert resolve_llm(str(model)) == model
    monkeypatch.chdir(model.parent.parent)
    assert resolve_llm("models/tiny-llama") == Path("models/tiny-llama")  # spelled like a hub id


@pytest.mark.parametrize("wrong", ["models/tiny-lama", "./models/tiny-lama", "{here}/models/tiny-lama"])
def test_mistyped_paths_are_never_looked_up(model, monkeypatch, no_hub, wrong):
    monkeypatch.chdir(model.parent.parent)
    with pytest.raises(ConfigError, match="no directory .*did you mean .*models/tiny-llama"):
        resolve_llm(wrong.format(here=model.parent.parent))


@pytest.mark.parametrize("wrong", ["tiny-llama", "~/nowhere/lm", "a/b/c", "/nowhere/lm", "../lm"])
def test_what_is_no_hub_id_is_never_looked_up(no_hub, wrong):
    with pytest.raises(ConfigError, match="no directory"):
        resolve_llm(wrong)


def test_other_resolve_errors(model, no_hub):
    with pytest.raises(ConfigError, match="no builtin model"):
        resolve_llm("builtin/tiny-lama-4bit")
    with pytest.raises(ConfigError, match="is a file"):
        resolve_llm(str(model / "config.json"))


def test_hub_failure_says_that_no_directory_was_found(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise OSError("offline mode is enabled\nlong details")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match="no local directory 'org/name'.*offline mode is enabled") as caught:
        resolve_llm("org/name", revision="abc")
    assert "long details" not in str(caught.value)


def test_describe(model):
    info = describe_llm(model)
    assert (info.model_type, info.hidden_size, info.vocab_size, info.num_layers) == ("llama", 64, 96, 2)
    assert (info.tie, info.quantization, info.hashed) == (False, None, "full")
    _save(model / "model.safetensors", np.ones(3, np.float32))
    assert describe_llm(model).sha256 != info.sha256


def test_large_weights_are_hashed_by_samples(model, monkeypatch):
    monkeypatch.setattr(llm_source, "FULL_HASH_LIMIT", 1000)
    weights = np.zeros(2_000_000, np.float32)
    _save(model / "model.safetensors", weights)
    before = describe_llm(model)
    assert before.hashed == "sampled"
    weights[1_000_000:] = 1  # a fine-tuned copy has the same header and size
    _save(model / "model.safetensors", weights)
    assert describe_llm(model).sha256 != before.sha256


def test_missing_files(model, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_llm_config(tmp_path / "nothing")
    (model / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_llm_config(model)
    (model / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config.json"):
        read_llm_config(model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no model\*.safetensors"):
        weight_files(model)
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(model / "pytorch_model.bin", model / "model-1-of-2.safetensors")
    with pytest.raises(CheckpointError, match="lacks model-2-of-2.safetensors"):
        weight_files(model)


def test_damaged_weights(model):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"has {len(whole) - 1} bytes where its header announces {len(whole)}"):
        describe_llm(model)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", whole[:20]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is not a safetensors file"):
            describe_llm(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; tested on both backends: llama"),
        (LLAMA | {"hidden_act": "relu"}, "hidden_act = 'relu'; only 'silu'"),
        ({"model_type": "llama", "hidden_size": 64}, "lacks intermediate_size, num_hidden_layers"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4}}, "RoPE type 'yarn'"),
        (LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "'llama3' lacks a positive factor"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA | {"layer_types": ["sliding_attention"] * 2}, "for gemma3_text only"),
        (LLAMA | {"model_type": "mistral", "sliding_window": 4096}, "sliding_window = 4096; only None"),
        (LLAMA | {"quantization_config": {"quant_method": "awq"}}, "quantised by 'awq'"),
        (LLAMA | {"quantization": {"bits": 4, "lm_head": {"mode": "nvfp4"}}}, "mode 'nvfp4'"),
        (GEMMA | {"layer_types": ["full_attention", *["sliding_attention"] * 11]}, "layer_types must repeat"),
        (GEMMA | {"num_hidden_layers": 4}, "layer_types must repeat"),
    ],
)
def test_what_the_backends_would_not_compute_alike_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        normalize_llm_config(config, "config.json")


def test_rope_parameters_become_the_keys_that_mlx_lm_reads():
    config = normalize_llm_config(
        LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3}, "config.json"
    )
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "llama3"} | LLAMA3
    assert "rope_parameters" not in config
    plain = normalize_llm_config(LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}}, "")
    assert (plain["rope_theta"], plain["rope_scaling"]) == (7e3, None)
    gemma = normalize_llm_config(
        GEMMA
        | {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 4}
        | {"rope_parameters": {"full_attention": {"rope_theta": 9e5}, "sliding_attention": {"rope_theta": 8e3}}},
        "",
    )
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"], gemma["sliding_window_pattern"]) == (9e5, 8e3, 3)


def test_absent_keys_mean_what_transformers_means():
    """mlx-lm's own defaults differ: tied heads for Llama, a RoPE base of 1e6 for Qwen2, a window of 512 for Gemma."""
    configuration = pytest.importorskip("transformers").AutoConfig
    for model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text"):
        given = GEMMA | {"model_type": model_type, "num_key_value_heads": 2, "sliding_window": None}
        if model_type == "gemma3_text":
            del given["sliding_window"]
        ours = normalize_llm_config(given, "")
        theirs = configuration.for_model(**given)
        for key in ("rms_norm_eps", "tie_word_embeddings", "sliding_window"):
            assert ours[key] == getattr(theirs, key), (model_type, key)
        rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
        assert ours["rope_theta"] == rope["rope_theta"], model_type
        assert ours["head_dim"] == getattr(theirs, "head_dim", 16), model_type
        for key in ("query_pre_attn_scalar", "layer_types"):
            if model_type == "gemma3_text":
                assert ours[key] == getattr(theirs, key)


@pytest.mark.parametrize("content", ["[1]", '"x"', "1", "[" * 100_000, "9" * 10_000])
def test_a_configuration_that_is_no_object(model, content):
    (model / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        read_llm_config(model)


@pytest.mark.parametrize(
    "header",
    ["[]", "1", "[" * 100_000, '{"a": 1}', '{"a": {"dtype": "F32", "shape": [3], "data_offsets": []}}']
    + ['{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]}}', '{"a": {"dtype": 1, "shape": [3]}}']
    + ['{"a": {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]}}'],
)
def test_a_header_that_describes_no_arrays(model, header):
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(12)
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a safetensors file|has a header that is not valid"):
        weight_files(model)


@pytest.mark.parametrize(
    "change",
    [
        {"quantization": {"group_size": 32, "bits": 4, "mode": ["affine"]}},
        {"rope_scaling": {"rope_type": ["llama3"]}},
        {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
        {"rope_parameters": {"rope_theta": "x"}},
        {"rope_parameters": {"sliding_attention": 3}},
        {"rope_parameters": {"sliding_attention": {"rope_type": "default"}}},
        {"layer_types": [["full_attention"]]},
        {"layer_types": 3},
        {"quantization": {"bits": 4}},
        {"quantization": {"bits": 4, "group_size": "64"}},
        {"quantization": {"bits": 4, "group_size": 64, "model.layers.0": {"bits": 8}}},
        {"head_dim": 2**32},
        {"rope_theta": 1e400},
    ],
)
def test_values_of_another_kind(change):
    with pytest.raises(ConfigError):
        normalize_llm_config(LLAMA | change, "config.json")


def test_packed_layers_are_read_off_the_shapes():
    expected = {"a.weight": (8, 128), "b.weight": (8, 64), "c.bias": (8,)}
    stored = {"a.weight": (8, 16), "a.scales": (8, 2), "a.biases": (8, 2), "b.weight": (8, 64), "c.bias": (8,)}
    assert match_weights(expected, stored, Path()) == {"a": (64, 4)}
    stored |= {"b.weight": (8, 12), "b.scales": (8, 2), "b.biases": (8, 2)}
    assert match_weights(expected, stored, Path()) == {"a": (64, 4), "b": (32, 6)}
    with pytest.raises(CheckpointError, match=r"2 unused: a.biases, a.scales.*a.weight is \(8, 17\)"):
        match_weights(expected, stored | {"a.weight": (8, 17)}, Path("dir"))
