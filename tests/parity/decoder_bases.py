"""Decoders of this project as frozen language models, in shapes that the libraries do not have."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlx_training.init import initialise
from mlx_training.pretrained import find_linears
from mlx_training.spec import AdapterSpec, DecoderSpec, ExpertsSpec, FrozenLM, PretrainedSpec

VOCAB = 96
GPT: dict[str, Any] = {
    "norm": "layernorm",
    "activation": "gelu",
    "positions": "learned",
    "attention_bias": True,
    "mlp_bias": True,
}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 8,
    "context_length": 24,
    "init_std": 0.1,
}
BASES = {
    "gpt": DecoderSpec(VOCAB, tie_word_embeddings=False, **GPT, **SMALL),
    "sparse": DecoderSpec(
        VOCAB,
        mixers=("local", "sparsek"),
        window=4,
        num_selected=2,
        num_sinks=2,
        num_kv_heads=2,
        experts=ExpertsSpec(4, 2),
        **SMALL,
    ),
}


def on_decoder(name: str, folder: Path, adapter: AdapterSpec, *targets: str) -> PretrainedSpec:
    """Adapters on a random decoder, biases included, whose weights are written below `folder`."""
    decoder, checkpoint = BASES[name], folder / name
    weights = checkpoint / "model.safetensors"
    if not weights.is_file():
        checkpoint.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(3)
        arrays = initialise(decoder, 3)
        save_file({n: a + (0.05 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in arrays.items()}, weights)
    linears = find_linears(checkpoint, targets, decoder)
    llm = FrozenLM(checkpoint, decoder.hidden_size, VOCAB, decoder=decoder)
    return PretrainedSpec(llm, adapter=AdapterSpec(linears, adapter.rank, adapter.alpha, adapter.dropout, adapter.dora))


def adapters_on_decoders(directory: Path) -> dict[str, PretrainedSpec]:
    """LoRA and DoRA on each; none where `directory` holds no model: nothing is written there."""
    if not (directory / "config.json").is_file():
        return {}
    lora, dora = AdapterSpec((), rank=4, alpha=8.0), AdapterSpec((), rank=4, alpha=16.0, dora=True)
    return {
        "pretrained-lora-gpt": on_decoder("gpt", directory, lora, "q_proj", "o_proj", "down_proj", "lm_head"),
        "pretrained-dora-gpt": on_decoder("gpt", directory, dora, "v_proj", "up_proj"),
        "pretrained-lora-sparse": on_decoder("sparse", directory, lora, "k_proj", "score_proj", "router"),
        "pretrained-dora-sparse": on_decoder("sparse", directory, dora, "q_proj", "v_proj", "o_proj"),
    }
