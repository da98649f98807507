"""One spelling of a language model's `config.json`, as both backends read it: mlx-lm's classes and our own in PyTorch.

mlx-lm and transformers, which wrote it, differ in the keys they read (transformers 5 writes `rope_parameters`, most of
mlx-lm knows only `rope_theta` and `rope_scaling` and would silently use plain RoPE), in their defaults for absent keys,
and in the settings they implement. Here every difference is either written out or refused.
"""

from dataclasses import dataclass
from typing import Any

from mlx_training.errors import ConfigError

REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# What values must be, where they are given: transformers and mlx-lm check late, differently or not at all.
SIZES = (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
NUMBERS = ("rms_norm_eps", "rope_theta", "rope_local_base_freq")
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
MAPPINGS = ("rope_parameters", "rope_scaling", "quantization", "quantization_config")
CODE = ("auto_map", "model_file")  # Python files beside the weights, for transformers and for mlx-lm
ROPE_KEYS = {  # rope_type -> the numbers it needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Family:
    """`defaults`: transformers' values for absent keys. `fixed`: the only value that both backends implement."""

    defaults: dict[str, Any]
    fixed: dict[str, Any]


_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False}
_QWEN = {"max_position_embeddings": 32768}
FAMILIES = {
    "llama": Family(
        _COMMON | {"attention_bias": False, "mlp_bias": False},
        {"hidden_act": "silu", "sliding_window": None},
    ),
    "mistral": Family(
        _COMMON, {"hidden_act": "silu", "sliding_window": None, "attention_bias": False, "mlp_bias": False}
    ),
    "qwen2": Family(_COMMON | _QWEN, {"hidden_act": "silu", "use_sliding_window": False}),
    "qwen3": Family(
        _COMMON | _QWEN | {"head_dim": 128},
        {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    ),
    "gemma3_text": Family(
        _COMMON
        | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "tie_word_embeddings": True, "head_dim": 256}
        | {"sliding_window": 4096, "query_pre_attn_scalar": 256, "max_position_embeddings": 131072},
        {"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "attention_bias": False}
        | {"use_bidirectional_attention": False},
    ),
}


def normalize_llm_config(config: dict[str, Any], source: str) -> dict[str, Any]:
    """A copy of `config` with legacy RoPE keys and no default left implicit.

    Raises:
        ConfigError: an unknown `model_type`, a missing key, or a setting the backends would not compute alike.
    """
    config = dict(config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{source}: model_type {model_type!r} is not supported; tested on both backends: {', '.join(FAMILIES)}"
        )
    if code := [key for key in CODE if config.get(key)]:
        raise ConfigError(
            f"{source}: {', '.join(code)} asks for Python code that comes with the model; such code is never run here. "
            f"If the weights are those of a plain {model_type}, remove the key"
        )
    family = FAMILIES[model_type]
    if missing := [key for key in REQUIRED if key not in config]:
        raise ConfigError(f"{source} lacks {', '.join(missing)}; expected a complete {model_type} configuration")
    _check_values(config, source)
    for key, value in family.fixed.items():
        if config.setdefault(key, value) != value:
            raise ConfigError(f"{source}: {key} = {config[key]!r}; only {value!r} is equal on both backends")

    _normalize_rope(config, source)
    for key, value in family.defaults.items():
        config.setdefault(key, value)
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    if model_type == "qwen2" and config["head_dim"] != config["hidden_size"] // heads:
        raise ConfigError(f"{source}: head_dim = {config['head_dim']}; for qwen2 it must be hidden_size / heads")
    _normalize_layer_types(config, source)
    _check_quantization(config, source)
    return config


def _check_values(config: dict[str, Any], source: str) -> None:
    """ConfigError for a value of the wrong kind, as a damaged or hand-made file has."""

    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31

    def is_id(value: Any) -> bool:
        return value is None or (isinstance(value, int) and not isinstance(value, bool))

    kinds = (
        (SIZES, is_size, "a positive whole number below 2^31"),
        (NUMBERS, _is_positive, "a positive number"),
        (SWITCHES, lambda value: isinstance(value, bool), "true or false"),
        (MAPPINGS, lambda value: isinstance(value, dict), "a mapping"),
        (("layer_types",), lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v), "a list of texts"),
        (("sliding_window_pattern", "_sliding_window_pattern"), is_size, "a positive whole number"),
        (("bos_token_id",), is_id, "an id"),
        (("eos_token_id",), lambda v: all(map(is_id, v)) if isinstance(v, list) else is_id(v), "an id or several"),
    )
    for keys, is_right, expected in kinds:
        for key in keys:
            is_absent = config.get(key) is None and key not in REQUIRED
            if not is_absent and not is_right(config[key]):
                raise ConfigError(f"{source}: {key} = {config[key]!r}; expected {expected}")
    for key in (*SIZES, *NUMBERS, *SWITCHES):
        if key in config and config[key] is None:
            del config[key]  # as if it were not there
    for key in NUMBERS:
        if key in config:
            config[key] = float(config[key])
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ConfigError(
            f"{source}: hidden_size = {config['hidden_size']} is no multiple of num_attention_heads = "
            f"{config['num_attention_heads']}; transformers refuses it"
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


def _normalize_rope(config: dict[str, Any], source: str) -> None:
    """`rope_parameters` (flat, or one mapping per attention type) -> `rope_theta`, `rope_scaling`."""
    parameters = config.pop("rope_parameters", None) or {}
    if not all(isinstance(parameters.get(kind) or {}, dict) for kind in ("sliding_attention", "full_attention")):
        raise ConfigError(f"{source}: rope_parameters = {parameters!r}; expected a mapping for each kind of attention")
    local = parameters.get("sliding_attention")
    if local:
        if not _is_positive(local.get("rope_theta")):
            raise ConfigError(f"{source}: rope_parameters of sliding_attention lack a positive rope_theta")
        config.setdefault("rope_local_base_freq", local["rope_theta"])
        if local.get("rope_type", "default") != "default":
            raise ConfigError(f"{source}: scaled RoPE in sliding layers is not supported; given {local}")
    parameters = dict(parameters.get("full_attention") or parameters)
    if "rope_theta" in parameters:
        if not _is_positive(theta := parameters.pop("rope_theta")):
            raise ConfigError(f"{source}: rope_theta = {theta!r}; expected a positive number")
        config.setdefault("rope_theta", theta)

    scaling = dict(config.get("rope_scaling") or parameters)
    rope_type = scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type", "default")
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS:
        raise ConfigError(f"{source}: RoPE type {rope_type!r} is not supported; tested: {', '.join(ROPE_KEYS)}")
    if missing := [key for key in ROPE_KEYS[rope_type] if not _is_positive(scaling.get(key))]:
        raise ConfigError(f"{source}: RoPE scaling {rope_type!r} lacks a positive {' and '.join(missing)}")
    if (scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError(f"{source}: partial_rotary_factor must be 1.0")
    config["rope_scaling"] = None if rope_type == "default" else scaling


def _normalize_layer_types(config: dict[str, Any], source: str) -> None:
    """mlx-lm's Gemma knows `sliding_window_pattern` (every n-th layer is global), transformers `layer_types`."""
    num_layers = config["num_hidden_layers"]
    if config["model_type"] != "gemma3_text":
        given = config.pop("layer_types", None) or ["full_attention"]
        if set(given) != {"full_attention"}:
            raise ConfigError(f"{source}: sliding_attention layers are supported for gemma3_text only")
        config["sliding_window"] = None  # Qwen writes a window that it does not use
        return
    given = config.get("layer_types")
    pattern = given.index("full_attention") + 1 if given and "full_attention" in given else None
    pattern = pattern or config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    layer_types = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(num_layers)]
    if pattern > num_layers or (given and given != layer_types):
        raise ConfigError(f"{source}: layer_types must repeat n sliding layers and a full one; given {given}")
    config |= {"sliding_window_pattern": pattern, "layer_types": layer_types}


def _check_quantization(config: dict[str, Any], source: str) -> None:
    """MLX's affine `quantization` block, the same for all layers or with entries per layer, is all that is read."""
    other = config.pop("quantization_config", None) or {}
    quantization = config.get("quantization")
    if quantization is None:
        if "quant_method" in other:
            raise ConfigError(
                f"{source}: weights quantised by {other['quant_method']!r} are not read; "
                "use the original checkpoint or one in MLX's affine format"
            )
        config["quantization"] = quantization = other or None
    if quantization is None:
        return
    blocks = [quantization, *(value for value in quantization.values() if isinstance(value, dict))]
    if modes := [mode for block in blocks if (mode := block.get("mode", "affine")) != "affine"]:
        raise ConfigError(f"{source}: quantisation mode {', '.join(map(repr, modes))}; only 'affine' is supported")
    for block in blocks:
        if missing := [key for key in ("group_size", "bits") if type(block.get(key)) is not int]:
            raise ConfigError(f"{source}: a quantization block lacks {' and '.join(missing)}; expected whole numbers")
