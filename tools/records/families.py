"""Seven families at about a million parameters, a million tokens each of TinyStories and Shakespeare, the same recipe.

Loss in nats a token and bits a byte on the same held-out text; tokens a CPU second of training alone, on one thread,
the median of three interleaved measurements (the difference of a run of 3 steps and one of 13).
"""

import statistics
from typing import Any

from tools.records.lab import Lab, merged, table

CONTEXT, BATCH, STEPS, VOCABULARY = 128, 16, 500, 1024
DECODER = {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "tie_word_embeddings": False}
GPT = {"norm": "layernorm", "activation": "gelu", "positions": "learned", "attention_bias": True, "mlp_bias": True}
KGRAM = {"k": 3, "num_layers": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("recurrent", {"cell": "lstm", "embed_size": 256, "hidden_size": 256}),
    "kgram-onehot": ("kgram", {**KGRAM, "form": "onehot", "hidden_size": 256}),
    "kgram-embedding": ("kgram", {**KGRAM, "form": "embedding", "embed_size": 128, "hidden_size": 640}),
    "kgram-conv": ("kgram", {**KGRAM, "form": "convolution", "embed_size": 256, "hidden_size": 612}),
    "mingpt": ("decoder", {**DECODER, **GPT, "intermediate_size": 512}),
    "llama": ("decoder", {**DECODER, "intermediate_size": 344}),
    "mamba2": ("ssm", {"mixers": ["mamba2"], "hidden_size": 128, "num_layers": 9}),
}


def config(lab: Lab, model: str) -> dict[str, Any]:
    """The configuration of one model."""
    family, sizes = MODELS[model]
    return {
        "model": {
            "family": family,
            "tokenizer": {"train": VOCABULARY},
            family: {**sizes, "context_length": CONTEXT},
        },
        "dataset": {
            "format": "text",
            "sources": [{"path": lab.data("tinystories/train.txt")}, {"path": lab.data("tinyshakespeare/input.txt")}],
            "splits": {"fraction": {"validation": 0.05}, "unit": "character"},
        },
        "training": {
            "max_steps": STEPS,
            "batch_size": BATCH,
            "learning_rate": 3e-3,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "warmup_fraction": 0.05,
        },
        "evaluation": {"every_steps": 100, "batch_size": 32},
        "checkpoint": {"every_steps": 100, "keep": 1},
    }


def tokens_per_cpu_second(lab: Lab, model: str) -> float:
    """Of training alone."""
    seconds = [
        lab.cpu_seconds(
            merged(
                config(lab, model),
                {
                    "training": {"max_steps": steps, "schedule": "constant", "warmup_fraction": 0.0},
                    "evaluation": {"every_steps": steps, "max_rows": 1},
                    "checkpoint": {"every_steps": steps},
                },
            )
        )
        for steps in (3, 13)
    ]
    return 10 * BATCH * CONTEXT / (seconds[1] - seconds[0])


def make(lab: Lab) -> list[str]:
    """Train, evaluate, measure, draw."""
    speeds: dict[str, list[float]] = {model: [] for model in MODELS}
    scores, curves, sizes = {}, {}, {}
    for model in MODELS:
        run = lab.train(model, config(lab, model))
        scores[model] = lab.evaluate(run, "--split", "validation")
        curves[model] = lab.curve(run, "eval/loss", BATCH * CONTEXT)
        sizes[model] = lab.command("plan", lab.folder / f"{model}.yaml")["parameters"]["total"]
    for _ in range(3):
        for model in MODELS:
            speeds[model].append(tokens_per_cpu_second(lab, model))
    lab.draw(curves, "tokens", "validation loss (nats a token)", xscale="log")
    rows = [
        (
            model,
            sizes[model],
            *(scores[model][key] for key in ("loss", "bits_per_byte", "accuracy")),
            round(statistics.median(speeds[model])),
            f"{min(speeds[model]):.0f}-{max(speeds[model]):.0f}",
        )
        for model in sorted(MODELS, key=lambda name: scores[name]["loss"])
    ]
    return table(("model", "parameters", "loss", "bits/byte", "accuracy", "tokens/s", "of three"), rows)
