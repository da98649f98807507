"""Tiny random language models in Hugging Face and MLX formats, made on the spot.

Weights are N(0, 0.1): at the usual 0.02 attention is so flat that a wrong RoPE hardly shows.
"""

from pathlib import Path

from mlx_training.quantize import quantize_directory

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}
FAMILIES = {
    "llama": {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "mistral": {"head_dim": 16, "tie_word_embeddings": False, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "full_attention": LINEAR_ROPE,
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
}


def save_tiny(model_type: str, directory: Path, *, max_shard_size: str = "1GB", **changes: object) -> Path:
    """Writes a random model as transformers itself writes it (`rope_parameters`, sharded if asked)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(SIZES | FAMILIES[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            is_norm = name.endswith("norm.weight") and not model_type.startswith("gemma")  # Gemma stores norm - 1
            parameter.copy_(1 + noise if is_norm else noise)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def save_tiny_quantized(model_type: str, directory: Path, bits: int = 4, group_size: int = 32) -> Path:
    """The same model, quantised as MLX does; the float original is beside it."""
    source = save_tiny(model_type, directory.with_name(directory.name + "-float"))
    quantize_directory(source, directory, bits, group_size)
    return directory
