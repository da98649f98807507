"""GPT-2, Llama, Mistral and Qwen3 in Hugging Face's format, both ways, against transformers and plain NumPy."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.huggingface import read_huggingface, to_huggingface
from mlx_training.init import initialise
from mlx_training.quantize import quantize_directory
from mlx_training.spec import DecoderSpec, ExpertsSpec, RopeScaling, Spec
from tests.parity.cases import GPT, VOCAB
from tests.parity.test_hf_mamba import TOKENS, logits_of, our_logits

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "head_dim": 8}
ROPE = RopeScaling(8.0, 1.0, 4.0, original_context_length=16)
OURS = {
    "gpt2": DecoderSpec(VOCAB, **SIZES, **GPT | {"activation": "gelu_tanh"}, context_length=24, norm_eps=1e-3),
    "gpt2-untied": DecoderSpec(VOCAB, **SIZES, **GPT, context_length=24, tie_word_embeddings=False),
    "llama": DecoderSpec(VOCAB, **SIZES | {"num_kv_heads": 2, "head_dim": 4}, rope_scaling=ROPE, norm_eps=1e-3),
    "llama-biases": DecoderSpec(VOCAB, **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "mistral": DecoderSpec(VOCAB, **SIZES | {"num_kv_heads": 2}, mixers=("local", "local"), window=5),
    "qwen3": DecoderSpec(VOCAB, **SIZES | {"head_dim": 16}, qk_norm=True, rope_theta=1e6),
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-quick": ("GPT2", {**GPT2, "n_inner": 40, "activation_function": "quick_gelu", "tie_word_embeddings": False}),
    "llama": ("Llama", {**LLAMA, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "llama-scaled": (
        "Llama",
        {
            **LLAMA,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {**SCALED, "rope_theta": 5e3, "original_max_position_embeddings": 16},
        },
    ),
    "mistral": ("Mistral", {**LLAMA, "num_key_value_heads": 1, "sliding_window": 5}),
    "qwen3": ("Qwen3", {**LLAMA, "num_key_value_heads": 2, "head_dim": 16}),
}


def noisy(spec: Spec) -> dict[str, np.ndarray]:
    """Parameters with N(0, 0.1) added to what a run starts from; biases and norms too."""
    rng = np.random.default_rng(1)
    return {n: a + 0.1 * rng.standard_normal(a.shape).astype("f") for n, a in initialise(spec, 0).items()}


def save(directory: Path, spec: DecoderSpec, arrays: dict[str, np.ndarray]) -> None:
    config, written = to_huggingface(spec, arrays, bos_token_id=1, eos_token_id=2)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(written, directory / "model.safetensors", {"format": "pt"})


def published(case: str) -> Any:
    """A tiny random model of transformers: every parameter N(0, 0.1), those of norms around one."""
    import torch

    transformers = pytest.importorskip("transformers")
    name, changes = THEIRS[case]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")(
        getattr(transformers, f"{name}Config")(vocab_size=VOCAB, **changes)
    )
    for parameter in model.parameters():
        kept = parameter.detach() if parameter.ndim == 1 else 0.0
        parameter.data = kept + 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("case", THEIRS)
def test_what_transformers_saves_is_read(case: str, both_backends: list[str], tmp_path: Path) -> None:
    model = published(case)
    model.save_pretrained(tmp_path)
    spec, arrays = read_huggingface(tmp_path)
    expected = logits_of(model)
    assert np.abs(expected).max() > 0.3
    for name in both_backends:
        np.testing.assert_allclose(our_logits(name, spec, arrays), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", OURS)
def test_what_we_write_is_read_by_transformers(case: str, both_backends: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec, arrays = OURS[case], noisy(OURS[case])
    save(tmp_path, spec, arrays)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model).__name__.lower().startswith(case.partition("-")[0])
    expected = logits_of(model.eval())
    for name in both_backends:
        np.testing.assert_allclose(our_logits(name, spec, arrays), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", OURS)
def test_a_round_trip_changes_no_bit(case: str, tmp_path: Path) -> None:
    spec, arrays = OURS[case], noisy(OURS[case])
    save(tmp_path, spec, arrays)
    again, read = read_huggingface(tmp_path)
    assert isinstance(again, DecoderSpec)
    assert replace(again, mixers=spec.mixers) == spec and {*again.mixers} == {*spec.mixers}
    assert [*read] == [*arrays] and all(read[name].tobytes() == arrays[name].tobytes() for name in arrays)
    written = load_file(tmp_path / "model.safetensors")
    other = tmp_path / "again"
    other.mkdir()
    save(other, again, read)
    assert all((load_file(other / "model.safetensors")[name] == array).all() for name, array in written.items())


def test_gpt2_equals_plain_numpy(backend_name: str, tmp_path: Path) -> None:
    """GPT-2's forward pass as Radford et al. wrote it, on the arrays of the exported file, with GPT-2's names."""
    spec, arrays = OURS["gpt2"], noisy(OURS["gpt2"])
    save(tmp_path, spec, arrays)
    p = {name: array.astype(float) for name, array in load_file(tmp_path / "model.safetensors").items()}
    heads, eps = 4, 1e-3

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def conv1d(x: np.ndarray, name: str) -> np.ndarray:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    length = TOKENS.shape[1]
    x = p["wte.weight"][TOKENS] + p["wpe.weight"][:length]
    for i in range(2):
        h = f"h.{i}"
        qkv = np.split(conv1d(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn"), 3, axis=-1)
        q, k, v = (part.reshape(*part.shape[:2], heads, -1).swapaxes(1, 2) for part in qkv)
        scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + conv1d(mixed.swapaxes(1, 2).reshape(x.shape), f"{h}.attn.c_proj")
        inner = conv1d(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        x = x + conv1d(inner, f"{h}.mlp.c_proj")
    expected = norm(x, "ln_f") @ p["wte.weight"].T
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(our_logits(backend_name, spec, arrays), expected, rtol=0, atol=1e-4)


def test_names_and_buffers_of_published_gpt2_files(tmp_path: Path) -> None:
    """Those of 2019 hold every layer's mask."""
    spec, arrays = OURS["gpt2"], noisy(OURS["gpt2"])
    save(tmp_path, spec, arrays)
    old = load_file(tmp_path / "model.safetensors")
    old |= {"h.0.attn.bias": np.tri(24, dtype="f")[None, None], "h.1.attn.masked_bias": np.full((1,), -1e4, "f")}
    old["lm_head.weight"] = old["wte.weight"]
    save_file(old, tmp_path / "model.safetensors")
    assert all((read_huggingface(tmp_path)[1][name] == arrays[name]).all() for name in arrays)
    del old["h.1.mlp.c_fc.bias"]
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: h\.1\.mlp\.c_fc\.bias \(48,\)"):
        read_huggingface(tmp_path)


def test_mlx_lm_reads_what_we_write(both_backends: list[str], tmp_path: Path) -> None:
    """A GPT-2 of the published proportions, which mlx-lm takes for granted."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    spec = replace(OURS["gpt2"], intermediate_size=128)
    save(tmp_path, spec, noisy(spec))
    expected = np.asarray(load_model(tmp_path)[0](mx.array(TOKENS)).tolist())
    for name in both_backends:
        np.testing.assert_allclose(our_logits(name, spec, noisy(spec)), expected, rtol=0, atol=1e-4)


def test_packed_weights_are_expanded(tmp_path: Path) -> None:
    """A 4-bit Llama of MLX becomes one that trains."""
    save(tmp_path, OURS["llama"], noisy(OURS["llama"]))
    quantize_directory(tmp_path, tmp_path / "q8", 8, 32)
    spec, arrays = read_huggingface(tmp_path / "q8")
    assert spec == OURS["llama"]
    for name, array in noisy(OURS["llama"]).items():
        assert np.abs(arrays[name] - array).max() < 0.004, name


@pytest.mark.parametrize(
    ("case", "key", "value", "message"),
    [
        ("gpt2", "activation_function", "relu", "activation_function = 'relu'; the family decoder has gelu_new, "),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx = True; .* has False only"),
        ("gpt2", "scale_attn_weights", False, "scale_attn_weights = False; the family decoder has True only"),
        ("gpt2", "add_cross_attention", True, "add_cross_attention = True"),
        ("gpt2", "n_embd", "32", "n_embd = '32'; expected a positive whole number"),
        ("gpt2", "n_head", 5, "n_embd = 32 is no multiple of n_head = 5"),
        ("gpt2", "layer_norm_epsilon", None, "layer_norm_epsilon = None; expected a positive number"),
        ("gpt2", "model_type", "gpt_neox", "'gpt_neox' cannot be read as a trainable model; gpt2, llama, mistral, q"),
        ("gpt2", "model_type", ["gpt2"], "cannot be read as a trainable model"),
        ("llama", "hidden_act", "gelu", "hidden_act = 'gelu'; only 'silu'"),
        ("llama", "rope_scaling", {"rope_type": "linear", "factor": 2.0}, "'linear'; .* has default and llama3 only"),
        ("llama", "sliding_window", 5, "sliding_window = 5; only None"),
        ("mistral", "sliding_window", 2.5, "sliding_window = 2.5; expected a positive whole number or null"),
        ("qwen3", "attention_bias", True, "attention_bias = True; only False"),
    ],
)
def test_what_a_spec_cannot_express_is_refused(case: str, key: str, value: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path, OURS[case], noisy(OURS[case]))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=f"config.json: .*{message}"):
        read_huggingface(tmp_path)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file; expected a model directory"):
        read_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_huggingface(tmp_path)
    save(tmp_path, OURS["gpt2"], noisy(OURS["gpt2"]))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="model_type None"):
        read_huggingface(tmp_path)
    save(tmp_path, OURS["llama"], noisy(OURS["llama"]))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"unknown: model\.layers\.1\."):
        read_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2**30}))
    with pytest.raises(CheckpointError, match="holds 20 arrays, config.json speaks of 1073741824 layers"):
        read_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("gpt2", {"head_dim": 4}, r"GPT-2 has no head_dim: 4 \(other"),
        ("gpt2", {"num_kv_heads": 2}, "GPT-2 has no num_kv_heads: 2 for 4 heads"),
        ("gpt2", {"mixers": ("causal", "local")}, r"GPT-2 has no mixers: \('causal', 'local'\)"),
        ("gpt2", {"num_sinks": 2}, "GPT-2 has no num_sinks: 2"),
        ("gpt2", {"norm_position": "post"}, "GPT-2 has no norm_position: post"),
        ("gpt2", {"attention_bias": False}, "GPT-2 has no attention_bias: False"),
        ("gpt2", {"logit_softcap": 3.0}, "GPT-2 has no logit_softcap: 3.0"),
        ("gpt2", {"activation": "swiglu"}, "GPT-2 has no activation: swiglu"),
        ("llama", {"experts": ExpertsSpec()}, "Llama has no experts"),
        ("mistral", {"attention_bias": True}, "Mistral has no attention_bias: True"),
        ("qwen3", {"mlp_bias": True}, "Qwen3 has no mlp_bias: True"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_huggingface(replace(OURS[case], **changes), {}, bos_token_id=1, eos_token_id=2)
