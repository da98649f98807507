"""Rebuild the embedded LM: pretrain configs/tiny_llama.yaml, quantise it to 4 bits, compare it with a trigram model.

    .venv/bin/python tools/build_tiny_llama.py [--backend torch] [key=value ...]

Writes mlx_training/builtin/tiny-llama-4bit and docs/tiny_llama.json. A finished run in runs/tiny_llama is used as it
is.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_training.assemble import TextData, assemble, open_backend
from mlx_training.config import RunConfig, load_config
from mlx_training.export import export_huggingface
from mlx_training.llm_source import BUILTIN, describe_llm
from mlx_training.objectives.lm import lm
from mlx_training.quantize import quantize_directory
from mlx_training.spec import EncoderSpec, FrozenLM, TimeSeriesSpec
from mlx_training.trainer import train

TARGET = BUILTIN / "tiny-llama-4bit"
REPORT = Path("docs/tiny_llama.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--backend", choices=("mlx", "torch"), default="torch")
    args = parser.parse_args()
    config = load_config("tiny_llama", [*args.overrides, f"backend={args.backend}"])
    result = train(config, resume="auto")
    run = Path(config.output_dir)
    with tempfile.TemporaryDirectory() as scratch:
        export_huggingface(run, Path(scratch) / "float")
        shutil.rmtree(TARGET, ignore_errors=True)
        quantize_directory(Path(scratch) / "float", TARGET, bits=4, group_size=64)
        nats = {"float32": held_out_nats(config, Path(scratch) / "float"), "4bit": held_out_nats(config, TARGET)}
    report: dict[str, Any] = {
        "steps": result["steps"],
        "seconds": result["seconds"],
        "held_out_nats_per_token": {**nats, "trigram": trigram_nats(config)},
        "bytes": sum(file.stat().st_size for file in TARGET.iterdir()),
    }
    REPORT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def held_out_nats(config: RunConfig, directory: Path) -> float:
    """Mean NLL of the test text under a frozen LM directory, as the library classes compute it."""
    data = text_data(config)
    backend = open_backend(config)
    model: Any = frozen(backend, directory)
    total = weight = 0.0
    for batch in data.eval_batches("test", 64, None):
        sums = backend.score(model, lm, batch)
        total, weight = total + sums["loss"], weight + sums["weight"]
    return total / weight


def frozen(backend: Any, directory: Path) -> Any:
    """The LM behind a time-series model that reads rows without series: the LM alone."""
    info = describe_llm(directory)
    llm = FrozenLM(directory, info.hidden_size, info.vocab_size)
    return backend.build(TimeSeriesSpec(llm, EncoderSpec(num_layers=1)))


def trigram_nats(config: RunConfig) -> float:
    """The trigram model trained on the training text and scored on the test text, same tokens."""
    data = text_data(config)
    model = Trigram(data.splits["train"].tokens.tolist(), data.tokenizer.vocab_size)
    return model.nats_per_token(data.splits["test"].tokens.tolist())


def text_data(config: RunConfig) -> TextData:
    """The run's text with the run's own tokenizer."""
    data = assemble(config, Path(config.output_dir)).data
    assert isinstance(data, TextData), config.model.family
    return data


class Trigram:
    """Interpolated Kneser-Ney trigrams (Chen & Goodman 1999): absolute discount, down to a uniform distribution."""

    def __init__(self, tokens: Sequence[int], vocab_size: int, discount: float = 0.75) -> None:
        self.vocab_size, self.discount = vocab_size, discount
        trigrams = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
        bigrams = Counter((b, c) for _, b, c in trigrams)  # number of different words before: continuation counts
        unigrams = Counter(c for _, c in bigrams)
        self.levels = [
            self._level(counts) for counts in (trigrams, bigrams, Counter({(c,): n for c, n in unigrams.items()}))
        ]

    def nats_per_token(self, tokens: Sequence[int]) -> float:
        """Mean negative log-likelihood of every token that has two before it."""
        windows = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
        return -sum(math.log(self._probability(window)) for window in windows) / len(windows)

    def _level(self, counts: Counter) -> tuple[Counter, Counter, Counter]:
        totals: Counter = Counter()
        kinds: Counter = Counter()
        for gram, count in counts.items():
            totals[gram[:-1]] += count
            kinds[gram[:-1]] += 1
        return counts, totals, kinds

    def _probability(self, gram: tuple[int, ...], level: int = 0) -> float:
        if level == len(self.levels):
            return 1 / self.vocab_size
        counts, totals, kinds = self.levels[level]
        below = self._probability(gram[1:], level + 1) if len(gram) > 1 else 1 / self.vocab_size
        total = totals[gram[:-1]]
        if not total:
            return below
        return (max(counts[gram] - self.discount, 0) + self.discount * kinds[gram[:-1]] * below) / total


if __name__ == "__main__":
    main()
