"""Write a random Llama of a given shape, directly in MLX's quantised format, with a tokenizer.

    python tools/make_llama.py llama-3.2-1b ../llama-1b [--bits 4] [--group-size 64] [--seed 0]

Stands in for a pretrained model where only size matters: the real shapes, weights of the usual spread (std 0.02), text
that means nothing. Packed words are drawn as they are stored and written layer by layer: seconds, not minutes.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlx_training.data.corpus import corpus_documents
from mlx_training.data.tokenizer import train_bpe
from mlx_training.errors import ConfigError, UserError
from mlx_training.llm_source import BITS, GROUP_SIZES

WEIGHT_STD = 0.02
TOKENIZER_SIZE = 2048  # the rows of the embedding beyond it are never looked up; the head still computes them
LLAMA_3_2_1B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}
PRESETS = {"llama-3.2-1b": LLAMA_3_2_1B}
Arrays = dict[str, np.ndarray]


def make_llama(shape: Mapping[str, Any], directory: Path, *, bits: int = 4, group_size: int = 64, seed: int = 0) -> int:
    """Write config.json, one safetensors file a layer and a tokenizer. Returns the bytes of the weights.

    `shape`: a Hugging Face Llama configuration, tied, every matrix a multiple of `group_size` wide.
    Raises ConfigError when the quantisation does not fit, or when the directory holds a model already.
    """
    widths = {shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"] * shape["head_dim"]}
    if bits not in BITS or group_size not in GROUP_SIZES or any(width % group_size for width in widths):
        raise ConfigError(
            f"cannot quantise rows of {sorted(widths)} with bits {bits} and group size {group_size}; "
            f"bits are one of {BITS}, group sizes one of {GROUP_SIZES}, and each row a multiple of it"
        )
    if not shape["tie_word_embeddings"]:
        raise ConfigError("tie_word_embeddings must be true: no head of its own is written")
    if (directory / "config.json").exists():
        raise ConfigError(f"{directory} holds a model already; give a directory that does not exist yet")
    documents = corpus_documents(seed, "train", 1000)
    tokenizer = train_bpe(documents, min(TOKENIZER_SIZE, shape["vocab_size"]), directory)

    rng = np.random.Generator(np.random.SFC64(seed))
    num_files = shape["num_hidden_layers"] + 1
    weight_map: dict[str, str] = {}
    size = 0
    for index in range(num_files):
        arrays = _layer(shape, index, rng, bits, group_size) if index else _ends(shape, rng, bits, group_size)
        name = f"model-{index + 1:05d}-of-{num_files:05d}.safetensors"
        save_file(arrays, directory / name, {"format": "mlx"})
        weight_map |= dict.fromkeys(arrays, name)
        size += sum(array.nbytes for array in arrays.values())
    index_file = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index_file)
    config = {**shape, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    _write_json(directory / "config.json", config | {"quantization": {"group_size": group_size, "bits": bits}})
    return size


def _ends(shape: Mapping[str, Any], rng: np.random.Generator, bits: int, group_size: int) -> Arrays:
    """The embedding, which is also the head, and the final norm."""
    hidden = shape["hidden_size"]
    embedding = _packed("model.embed_tokens", shape["vocab_size"], hidden, rng, bits, group_size)
    return embedding | {"model.norm.weight": np.ones(hidden, np.float16)}


def _layer(shape: Mapping[str, Any], number: int, rng: np.random.Generator, bits: int, group_size: int) -> Arrays:
    """Transformer layer `number`, counted from 1."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    query = shape["num_attention_heads"] * shape["head_dim"]
    key = shape["num_key_value_heads"] * shape["head_dim"]
    matrices = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layer = f"model.layers.{number - 1}"
    arrays: Arrays = {}
    for name, (out_size, in_size) in matrices.items():
        arrays |= _packed(f"{layer}.{name}", out_size, in_size, rng, bits, group_size)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        arrays[f"{layer}.{norm}.weight"] = np.ones(hidden, np.float16)
    return arrays


def _packed(name: str, out_size: int, in_size: int, rng: np.random.Generator, bits: int, group_size: int) -> Arrays:
    """Uniform random words, and scales and biases that give them mean zero and std 0.02, varied from group to group."""
    words = rng.integers(0, 2**32, (out_size, in_size * bits // 32), np.uint32)
    std = ((4**bits - 1) / 12) ** 0.5  # of the numbers 0 .. 2^bits - 1
    scales = WEIGHT_STD / std * rng.uniform(0.8, 1.2, (out_size, in_size // group_size)).astype(np.float32)
    biases = -scales * (2**bits - 1) / 2
    return {
        f"{name}.weight": words,
        f"{name}.scales": scales.astype(np.float16),
        f"{name}.biases": biases.astype(np.float16),
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        shape = PRESETS[given.preset]
        size = make_llama(shape, given.directory, bits=given.bits, group_size=given.group_size, seed=given.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{given.directory}: {given.preset}, {given.bits} bits, {size / 1e9:.2f} GB of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
