"""The configurations of the other records on both backends, ten short steps each: how far the two losses part.

Adagrad's first update moves every parameter by a whole learning rate (7e-3 for the titles), whatever its gradient:
there the rounding of gradients near zero shows, and the loss rises before it falls.
"""

from typing import Any

from tools.records import families, mainrun
from tools.records.lab import Lab, merged, table

STEPS = 10
SHORT: dict[str, Any] = {
    "training": {"max_steps": STEPS, "batch_size": 4, "num_epochs": None},
    "evaluation": {"every_steps": STEPS, "max_rows": 4},
    "checkpoint": {"every_steps": STEPS, "keep": 1},
    "logging": {"every_steps": 1},
}


def make(lab: Lab) -> list[str]:
    """Train each twice and compare."""
    configs = {name: families.config(lab, name) for name in families.MODELS}
    for name, (recipe, decoder, _) in mainrun.RUNS.items():
        known = {"extends": f"language/{recipe}", "model": {"decoder": {**decoder, "dropout": 0.0}}}
        configs[f"mainrun_{name}"] = {**known, "dataset": {"path": lab.data("hackernews_titles/titles.txt")}}
    rows = []
    for name, config in configs.items():
        short = merged(config, {**SHORT, "model": {"tokenizer": {"train": 512}}})
        losses = {b: lab.curve(lab.train(f"{name}_{b}", short, b))[1] for b in ("torch", "mlx")}
        gap = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
        rows.append((name, losses["torch"][0], losses["torch"][-1], losses["mlx"][-1], f"{gap:.1e}"))
    return table(("run", "first loss", "last, torch", "last, MLX", "largest difference"), rows)
