"""GPT-2 in Hugging Face's format, both ways: its configuration and arrays as those of a decoder."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.checkpoint import check_shapes
from mlx_training.errors import ConfigError
from mlx_training.llm_source import weight_files
from mlx_training.quantize import read_tensors, to_float32
from mlx_training.spec import DecoderSpec

Arrays = dict[str, np.ndarray]

HEAD = "lm_head.weight"
MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # stored by old versions of transformers; they are no parameters
ACTIVATIONS = {  # theirs -> ours; of those that are alike the first is written
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "quick_gelu": "gelu_quick",
    "relu2": "relu2",
}
FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
PARTS: dict[str, Any] = {  # what every GPT-2 has, in the words of a spec
    "norm": "layernorm",
    "positions": "learned",
    "attention_bias": True,
    "mlp_bias": True,
}
FREE = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("context_length", "norm_eps", "activation", "tie_word_embeddings"),
    *("dropout", "init", "init_std", "position_init_std"),
}


def read_gpt2(directory: Path, config: Mapping[str, Any]) -> tuple[DecoderSpec, Arrays]:
    """The spec and float32 parameters of a directory with this `config.json`.

    Raises ConfigError for a setting that the family decoder cannot express, CheckpointError for other arrays.
    """
    spec = gpt2_spec(config, source=str(directory / "config.json"))
    given: Arrays = {}
    for file in weight_files(directory):
        for name, (kind, array) in read_tensors(file).items():
            short = name.removeprefix("transformer.")
            if not MASKS.fullmatch(short) and not (short == HEAD and spec.tie_word_embeddings):
                given[short] = to_float32(kind, array)
    return spec, from_gpt2(given, spec, directory)


def gpt2_spec(config: Mapping[str, Any], *, source: str) -> DecoderSpec:
    """The spec of a `config.json` of model type gpt2. Dropout is not read: it belongs to training."""
    for key, allowed in FIXED.items():
        if (value := config.get(key, allowed)) != allowed:
            raise ConfigError(f"{source}: {key} = {value!r}; the family decoder has {allowed} only")
    activation = config.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConfigError(f"{source}: activation_function = {activation!r}; the family decoder has {known} only")
    sizes = {key: config.get(key, default) for key, default in SIZES.items()}
    width, heads = sizes["n_embd"], sizes["n_head"]
    sizes["n_inner"] = 4 * width if config.get("n_inner") is None else config["n_inner"]
    for key, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ConfigError(f"{source}: {key} = {size!r}; expected a positive whole number")
    if width % heads:
        raise ConfigError(f"{source}: n_embd = {width} is no multiple of n_head = {heads}; transformers refuses it")
    eps, tied = config.get("layer_norm_epsilon", 1e-5), config.get("tie_word_embeddings", True)
    if not isinstance(eps, float) or eps <= 0:
        raise ConfigError(f"{source}: layer_norm_epsilon = {eps!r}; expected a positive number")
    if not isinstance(tied, bool):
        raise ConfigError(f"{source}: tie_word_embeddings = {tied!r}; expected true or false")
    shape: dict[str, Any] = {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": width,
        "intermediate_size": sizes["n_inner"],
        "num_layers": sizes["n_layer"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "context_length": sizes["n_positions"],
    }
    shape["activation"] = ACTIVATIONS[activation]
    return DecoderSpec(**shape, **PARTS, norm_eps=eps, tie_word_embeddings=tied)


def not_gpt2(spec: DecoderSpec) -> list[str]:
    """The parts that Hugging Face's GPT-2 does not have, as `key: value`."""
    found = []
    for field in fields(spec):
        value, default = getattr(spec, field.name), field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        if field.name not in FREE and value != PARTS.get(field.name, default):
            found.append(f"{field.name}: {value}")
    if spec.activation not in ACTIVATIONS.values():
        found.append(f"activation: {spec.activation}")
    if spec.num_kv_heads != spec.num_heads:
        found.append(f"num_kv_heads: {spec.num_kv_heads} for {spec.num_heads} heads")
    if spec.head_dim * spec.num_heads != spec.hidden_size:
        found.append(f"head_dim: {spec.head_dim} (other than hidden_size / num_heads)")
    return found


def gpt2_config(spec: DecoderSpec, *, bos_token_id: int | None, eos_token_id: int) -> dict[str, Any]:
    """`config.json` of the exported model."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": spec.vocab_size,
        "n_positions": spec.context_length,
        "n_ctx": spec.context_length,  # the same, for mlx-lm
        "n_embd": spec.hidden_size,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_inner": spec.intermediate_size,
        "activation_function": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == spec.activation),
        "layer_norm_epsilon": spec.norm_eps,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "embd_pdrop": spec.dropout,
        "resid_pdrop": spec.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": spec.init_std,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": "float32",
    }


def to_gpt2(arrays: Mapping[str, np.ndarray], spec: DecoderSpec) -> Arrays:
    """A decoder's parameters under GPT-2's names: q, k, v in one matrix, and matrices (in, out) as in Conv1D.

    As in the published files without "transformer." in front: transformers reads both, mlx-lm this alone.
    """
    found = {}
    for theirs, ours, is_conv in _pairs(spec):
        array = np.concatenate([arrays[name] for name in ours])
        found[theirs] = np.ascontiguousarray(array.T if is_conv else array)
    return found


def from_gpt2(arrays: Mapping[str, np.ndarray], spec: DecoderSpec, where: str | Path) -> Arrays:
    """The decoder's parameters; `arrays` are named without "transformer.". CheckpointError unless they all fit."""
    table = spec.params()
    expected: dict[str, tuple[int, ...]] = {}
    for theirs, ours, is_conv in _pairs(spec):
        shape = (len(ours) * table[ours[0]].shape[0], *table[ours[0]].shape[1:])
        expected[theirs] = shape[::-1] if is_conv else shape
    check_shapes(expected, {name: array.shape for name, array in arrays.items()}, where)
    found: Arrays = {}
    for theirs, ours, is_conv in _pairs(spec):
        array = arrays[theirs].T if is_conv else arrays[theirs]
        parts = np.split(array, len(ours))
        found |= {name: np.ascontiguousarray(part) for name, part in zip(ours, parts, strict=True)}
    return {name: found[name] for name in table}


def _pairs(spec: DecoderSpec) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(GPT-2's name, the decoder's names that stand in it one after another, whether it is a matrix of a Conv1D)."""
    yield "wte.weight", ("model.embed_tokens.weight",), False
    yield "wpe.weight", ("model.embed_positions.weight",), False
    for i in range(spec.num_layers):
        layer = f"model.layers.{i}"
        modules = {
            "ln_1": (f"{layer}.input_layernorm",),
            "attn.c_attn": tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv"),
            "attn.c_proj": (f"{layer}.self_attn.o_proj",),
            "ln_2": (f"{layer}.post_attention_layernorm",),
            "mlp.c_fc": (f"{layer}.mlp.up_proj",),
            "mlp.c_proj": (f"{layer}.mlp.down_proj",),
        }
        for theirs, ours in modules.items():
            for kind in ("weight", "bias"):
                is_conv = kind == "weight" and not theirs.startswith("ln")
                yield f"h.{i}.{theirs}.{kind}", tuple(f"{name}.{kind}" for name in ours), is_conv
    for kind in ("weight", "bias"):
        yield f"ln_f.{kind}", (f"model.norm.{kind}",), False
    if not spec.tie_word_embeddings:
        yield HEAD, (HEAD,), False
