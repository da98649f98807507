"""A vocabulary of 32,102 (BPE of 32,002 with its specials, and a hundred sentinels) on issues, then on their patches.

The tokenizer is trained on the issues, the patches and every text there is: issues alone have too few merges. A
Mamba-2 reads the issues first; from there it learns the patches, left to right and with gaps to fill (fill in the
middle). Scores of the held-out twentieth of each, from every checkpoint.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_training.data.tokenizer import Tokenizer, train_bpe
from tools.records.lab import Curve, Lab, merged, table

BYTE_LEVEL, SENTINELS, VOCABULARY = (
    32_002,
    ["<extra_id_{0..96}>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"],
    32_102,
)
TEXTS = ("tinystories/train.txt", "tinyshakespeare/input.txt", "hackernews_titles/titles.txt", "wikitext2/valid.txt")
ISSUES = "issue_patch/issues.jsonl"


def texts(lab: Lab) -> Iterator[str]:
    """What the tokenizer is trained on."""
    for line in Path(lab.data(ISSUES)).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield from (row["problem_statement"], row["patch"])
    for file in TEXTS:
        yield Path(lab.data(file)).read_text(encoding="utf-8")


def config(lab: Lab, column: str, tokenizer: Path, **training: Any) -> dict[str, Any]:
    """One stage: a column of the issues."""
    return {
        "model": {
            "family": "ssm",
            "tokenizer": str(tokenizer),
            "vocab_size": VOCABULARY,
            "ssm": {"mixers": ["mamba2"], "hidden_size": 96, "num_layers": 3, "context_length": 128},
        },
        "dataset": {
            "format": "text",
            "path": lab.data(ISSUES),
            "options": {"text_column": column},
            "splits": {"fraction": {"validation": 0.05}},
        },
        "training": {
            "num_epochs": 2,
            "batch_size": 8,
            "learning_rate": 3e-3,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "warmup_fraction": 0.05,
            **training,
        },
        "evaluation": {"every_steps": 50},
        "checkpoint": {"every_steps": 50, "keep": 50},
    }


def make(lab: Lab) -> list[str]:
    """Tokenizer, three runs, curves, and the error of a vocabulary that is one too small."""
    folder = lab.folder / "tokenizer"
    known = (folder / "tokenizer.json").exists()
    tokenizer = Tokenizer.load(folder) if known else train_bpe(texts(lab), BYTE_LEVEL, folder, SENTINELS)
    stages = {"issues": config(lab, "problem_statement", folder)}
    begin = {"init_from": str(lab.folder / "issues")}
    stages["patches"] = config(lab, "patch", folder, **begin)
    stages["patches_fim"] = config(lab, "patch", folder, objective="fill_in_the_middle", **begin)
    rows = []
    curves: dict[str, dict[str, Curve]] = {metric: {} for metric in ("loss", "accuracy", "perplexity")}
    for name, stage in stages.items():
        run = lab.train(name, stage)
        scores = lab.evaluate(run, "--split", "validation", "--every-checkpoint")["checkpoints"]
        for metric, named in curves.items():
            named[name] = ([score["step"] for score in scores], [score[metric] for score in scores])
        last = scores[-1]
        rows.append((name, last["step"], *(last[key] for key in ("loss", "perplexity", "accuracy", "bits_per_byte"))))
    for metric, named in curves.items():
        lab.draw(named, "steps of the stage", metric, metric, **({"yscale": "log"} if metric == "perplexity" else {}))
    path = lab.folder / "one_too_small.yaml"
    lab.write(path, merged(stages["issues"], {"model": {"vocab_size": VOCABULARY - 1}, "output_dir": "runs/none"}))
    return [
        f"tokenizer: {tokenizer.vocab_size:,} ids",
        *table(("stage", "steps", "loss", "perplexity", "accuracy", "bits/byte"), rows),
        "",
        f"with model.vocab_size={VOCABULARY - 1}:",
        lab.refused("train", path),
    ]
