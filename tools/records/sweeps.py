"""Corpus size, training budget and overfitting: a decoder of 0.5 million parameters on TinyStories.

corpus: the same 300 steps on the first so many tokens. budget: all of the text, runs of so many steps, each with its
own cosine. overfit: 24 sequences of 64 tokens, 400 steps; the training loss falls below 0.3 while that of the test
rises. All validation losses are of the same held-out text, in nats a token; the tokenizer is the same (512, of all of
the training text).
"""

from typing import Any

from tools.records.lab import Lab, merged, table

CONTEXT, BATCH = 64, 16
CORPUS = (2_000, 8_000, 32_000, 128_000, None)
BUDGET = (50, 100, 200, 400)
SEQUENCES = 24


def config(lab: Lab, steps: int, tokens: int | None = None, **training: Any) -> dict[str, Any]:
    """One run; `tokens` caps the training text."""
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_layers": 2, "num_heads": 4, "context_length": CONTEXT}
    return {
        "model": {"family": "decoder", "tokenizer": {"train": 512}, "decoder": sizes},
        "dataset": {
            "format": "text",
            "sources": [{"path": lab.data("tinystories/train.txt"), "max_tokens": tokens}],
            "splits": {"fraction": {"validation": 0.05}, "unit": "character"},
        },
        "training": {
            "max_steps": steps,
            "batch_size": BATCH,
            "learning_rate": 3e-3,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "warmup_fraction": 0.05,
            **training,
        },
        "evaluation": {"every_steps": 50},
        "checkpoint": {"every_steps": 50, "keep": 1},
        "logging": {"every_steps": 10},
    }


def make(lab: Lab) -> list[str]:
    """Train all, then one table and one picture a sweep."""
    whole = lab.train("corpus_all", config(lab, 300))
    shared = {"model": {"tokenizer": {"train": None, "load": str(whole / "tokenizer")}}}
    lines = []

    losses: dict[str, tuple[float, float]] = {}
    for tokens in CORPUS:
        run = whole if tokens is None else lab.train(f"corpus_{tokens}", merged(config(lab, 300, tokens), shared))
        losses[str(tokens or "all")] = ends(lab, run)
    sizes = [*filter(None, CORPUS), 300_000]
    curves = {name: (sizes, [pair[i] for pair in losses.values()]) for i, name in enumerate(("training", "validation"))}
    lab.draw(curves, "tokens of the corpus (the last: all)", "loss after 300 steps", "corpus", xscale="log")
    lines += table(("corpus, tokens", "training loss", "validation loss"), [(k, *v) for k, v in losses.items()])

    budget = {steps: ends(lab, lab.train(f"budget_{steps}", merged(config(lab, steps), shared))) for steps in BUDGET}
    spent = [steps * BATCH * CONTEXT for steps in BUDGET]
    lab.draw(
        {"validation": (spent, [last for _, last in budget.values()])},
        *("tokens trained on", "validation loss", "budget"),
        xscale="log",
    )
    lines += ["", *table(("budget, steps", "training loss", "validation loss"), [(k, *v) for k, v in budget.items()])]

    few = config(lab, 400, SEQUENCES * CONTEXT + 1, batch_size=SEQUENCES, schedule="constant", weight_decay=0.0)
    overfit = lab.train("overfit", merged(few, shared))
    training, validation = lab.curve(overfit), lab.curve(overfit, "eval/loss")
    lab.draw({"training": training, "validation": validation}, "steps", "loss", "overfit")
    best = min(range(len(validation[1])), key=validation[1].__getitem__)
    below = next((step for step, loss in zip(*training, strict=True) if loss < 0.3), None)
    return [
        *lines,
        "",
        f"overfit on {SEQUENCES} sequences: training loss {training[1][-1]:.4f}, below 0.3 from step {below} on; "
        f"validation loss {validation[1][best]:.4f} at step {validation[0][best]}, {validation[1][-1]:.4f} at the end",
    ]


def ends(lab: Lab, run: Any) -> tuple[float, float]:
    """The last training loss (mean of the last five lines) and the last validation loss."""
    last = lab.curve(run)[1][-5:]
    return sum(last) / len(last), lab.curve(run, "eval/loss")[1][-1]
