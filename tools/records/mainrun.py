"""Hacker News titles, three epochs each: the recipe of record (configs/language/mainrun.yaml), smaller batches, Muon.

There are 16,000 titles here, so that the recipe's batch of 128 windows makes six steps an epoch. The kinds of attention
are therefore compared at a batch of 16 with its other settings, and so is Muon. All figures are of the same held-out
tenth of the titles. loss: nats a token, every token once. mainrun_compat: the source project's own figure, which
leaves out the last batch (coverage says what is left; at 128 there is no full one) and counts five characters for
each <eos>.
"""

from typing import Any

from tools.records.lab import Lab, table

EPOCHS = 3
SPARSE = {"fixed": {"block_size": 16, "local_context": 64, "num_verts": 4, "vert_size": 1}}
SMALL = {"batch_size": 16}
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "causal_batch_128": ("mainrun", {}, {}),
    "causal": ("mainrun", {}, SMALL),
    "local": ("mainrun", {"mixers": ["local"], "window": 64}, SMALL),
    "fixed": ("mainrun", {"mixers": ["fixed"], **SPARSE}, SMALL),
    "causal_muon": ("mainrun_muon", {}, SMALL),
}


def make(lab: Lab) -> list[str]:
    """Train, evaluate, draw."""
    rows, curves = [], {}
    for name, (recipe, decoder, training) in RUNS.items():
        run = lab.train(
            name,
            {
                "extends": f"language/{recipe}",
                "model": {"decoder": decoder},
                "dataset": {"path": lab.data("hackernews_titles/titles.txt")},
                "training": {"num_epochs": EPOCHS, **training},
                "checkpoint": {"keep": 1},
            },
        )
        scores = lab.evaluate(run, "--split", "validation")
        steps, losses = lab.curve(run, "eval/loss")
        curves[name] = ([EPOCHS * step / steps[-1] for step in steps], losses)
        figures = [scores[key] for key in ("loss", "bits_per_byte", "accuracy", "mainrun_compat", "mainrun_coverage")]
        rows.append((name, int(steps[-1]), *figures))
    lab.draw(curves, "epochs", "validation loss (nats a token)")
    head = ("run", "steps", "loss", "bits/byte", "accuracy", "mainrun_compat", "coverage")
    return table(head, rows)
