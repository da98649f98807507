"""Attention sinks (four learned keys and values a layer) against none: trained on 128 tokens, then 384 at once.

The loss in nats a token by place in a window of 384 tokens of held-out text. New tokens of a text of 384: the share of
its 4-grams that did not stand in it before, in each third of it (1: never repeats itself), mean of eight texts.
"""

from itertools import pairwise
from typing import Any

from tools.records import families
from tools.records.lab import Lab, merged, table

CONTEXT, LENGTH, TEXTS = families.CONTEXT, 3 * families.CONTEXT, 8
RUNS: dict[str, dict[str, Any]] = {
    "causal": {},
    "causal, sinks": {"num_sinks": 4},
    "local": {"mixers": ["local"], "window": 64},
    "local, sinks": {"mixers": ["local"], "window": 64, "num_sinks": 4},
}
PROMPT = "One day, a little girl"


def make(lab: Lab) -> list[str]:
    """Train, read three times the training length, generate as much."""
    by_place, fresh, curves, examples = {}, {}, {}, []
    for name, decoder in RUNS.items():
        model = {"model": {"decoder": decoder}}
        run = lab.train(name.replace(", ", "_"), merged(families.config(lab, "llama"), model))
        wide = ("--protocol", "position", "--context-length", LENGTH)
        scores = lab.evaluate(run, "--split", "validation", *map(str, wide))["by_position"]
        by_place[name] = list(scores.values())
        curves[name] = ([float(place.split("-")[0]) for place in scores], by_place[name])
        drawn = ("--temperature", "0.8", "--top-p", "0.95", "--samples", TEXTS, "--max-new-tokens", LENGTH)
        texts = [
            sample["text"] for sample in lab.command("generate", run, "--prompt", PROMPT, *map(str, drawn))["samples"]
        ]
        fresh[name] = [sum(thirds) / TEXTS for thirds in zip(*map(novelty, texts), strict=True)]
        examples += ["", f"{name}, the last 200 characters of a text of {LENGTH} tokens:", repr(texts[0][-200:])]
    edges = [0, CONTEXT, 2 * CONTEXT, LENGTH]
    thirds = [f"{a}-{b - 1}" for a, b in pairwise(edges)]
    lab.draw(curves, "place in the window (trained on 128)", "loss (nats a token)")
    rows = []
    for name, losses in by_place.items():
        cuts = [round(edge * len(losses) / LENGTH) for edge in edges]
        means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(cuts)]
        rows.append((name, *means, *fresh[name]))
    head = ("run", *(f"loss {third}" for third in thirds), *(f"new 4-grams {third}" for third in ("1/3", "2/3", "3/3")))
    return [*table(head, rows), *examples]


def novelty(text: str) -> list[float]:
    """In each third of a text's words: the share of 4-grams that are new."""
    words = text.split()
    seen: set[tuple[str, ...]] = set()
    new = []
    for gram in zip(*(words[i:] for i in range(4)), strict=False):
        new.append(gram not in seen)
        seen.add(gram)
    third = max(1, len(new) // 3)
    return [sum(part) / max(1, len(part)) for part in (new[:third], new[third : 2 * third], new[2 * third :])]
