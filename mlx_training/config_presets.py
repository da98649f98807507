"""Sizes of models by name: family -> preset -> the keys of its `model` section."""

from typing import Any

# OpenTSLM-SP's sizes (StanfordBDHG/OpenTSLM): 2,110,976 + 264,448 parameters in front of Llama-3.2-1B.
OPENTSLM_SP = {
    "layout": "opentslm",
    "encoder": {
        "patch_size": 4,
        "hidden_size": 128,
        "num_layers": 6,
        "num_heads": 8,
        "ffn_size": 1024,
        "max_patches": 1024,
        "max_series": 0,
        "pos_init_std": 1.0,
        "dropout": 0.0,
        "numeric_scale": False,
    },
    "projector": {"norm_output": False, "dropout": 0.0},
}
GPT = {"norm": "layernorm", "activation": "gelu", "positions": "learned", "attention_bias": True, "mlp_bias": True}


def _decoder(hidden_size: int, num_layers: int, num_heads: int, **keys: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads}
    return {"decoder": {"intermediate_size": 4 * hidden_size, **sizes, **keys}}


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "timeseries": {"opentslm-sp": OPENTSLM_SP},
    "decoder": {
        # Hacker News titles, bottleneck attention of 64: 7,717,504 parameters with a vocabulary of 16,000
        "mainrun": _decoder(
            256, 6, 8, intermediate_dim=64, context_length=256, dropout=0.1, position_init_std=0.0, **GPT
        ),
        # 252,925,952 parameters with GPT-2's vocabulary of 50,257
        "modern-llm-253m": _decoder(1024, 12, 16, context_length=1024, mlp_bias=True),
        "lm-max-12gb": _decoder(768, 12, 12, context_length=1024, mlp_bias=True),
        "mingpt": _decoder(384, 6, 6, context_length=256, dropout=0.1, tie_word_embeddings=False, **GPT),
        "gpt2-small-8": _decoder(768, 12, 8, context_length=512, **GPT),
        "llama3-lite": _decoder(
            *(1024, 16, 8),
            num_kv_heads=2,
            intermediate_size=8192,
            context_length=512,
            tie_word_embeddings=False,
            mixers=["local"],
            window=256,
        ),
        "gpt-oss-small": _decoder(512, 8, 8, context_length=512, dropout=0.05, tie_word_embeddings=False),
    },
    "recurrent": {
        "lstm-1024": {"recurrent": {"hidden_size": 1024, "num_layers": 1, "context_length": 256}},
    },
    "kgram": {
        "kgram-onehot": {"kgram": {"form": "onehot", "k": 3, "hidden_size": 256, "context_length": 256}},
        "kgram-embedding": {"kgram": {"form": "embedding", "k": 3, "hidden_size": 1024, "context_length": 256}},
        "kgram-conv": {"kgram": {"form": "convolution", "k": 3, "hidden_size": 1024, "context_length": 256}},
    },
    "ssm": {
        # 129,135,360 parameters with the published vocabulary of 50,280
        "mamba-130m": {"ssm": {"hidden_size": 768, "num_layers": 24, "context_length": 2048}},
        # Flash STU's layout: spectral filters and sliding-window attention take turns, a SwiGLU after each
        "stu-small": {
            "ssm": {
                "hidden_size": 512,
                "num_layers": 12,
                "mixers": ["stu", "local"],
                "num_heads": 8,
                "window": 256,
                "intermediate_size": 2048,
                "context_length": 1024,
            }
        },
    },
}
