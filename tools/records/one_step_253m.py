"""One optimiser step of configs/language/modern_llm_253m.yaml at its real shape on a CPU: 1 x 1,024 tokens, float32.

252,925,952 parameters; AdamW keeps two more of each, so weights, gradients and state alone are 4.0 GB. With gradient
checkpointing, as the configuration has it.
"""

from tools.records.lab import Lab, table


def make(lab: Lab) -> list[str]:
    """One step, and what `plan` said before."""
    config = {
        "extends": "language/modern_llm_253m",
        "model": {"tokenizer": lab.data("tokenizer_gpt2")},
        "dataset": {"path": lab.data("wikitext2/valid.txt"), "splits": {"fraction": {"validation": 0.01}}},
        "training": {
            "max_steps": 1,
            "warmup_steps": 0,
            "batch_size": 1,
            "grad_accumulation_steps": 1,
            "precision": "float32",
        },
        "evaluation": {"every_steps": 1, "max_rows": 1},
        "checkpoint": {"every_steps": 1, "keep": 1},
    }
    run = lab.train("torch", config)
    plan = lab.command("plan", lab.folder / "torch.yaml")
    measured = {
        metric: lab.curve(run, metric)[1][0] for metric in ("loss", "grad_norm", "seconds_per_step", "memory_gb")
    }
    return [f"parameters: {plan['parameters']['total']:,}", *table(("", "measured"), list(measured.items()))]
