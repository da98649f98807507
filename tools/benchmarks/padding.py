"""The share of places that are padding, and the shapes that are compiled: our batches and random order, one epoch."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from mlx_training.data.batching import BatchBy, Batches
from mlx_training.data.collate import collate
from mlx_training.data.importers import load_rows
from mlx_training.data.prompt import Encoded, PromptEncoder
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.llm_source import resolve_llm
from tools.benchmarks import material
from tools.benchmarks.listing import Listing

if TYPE_CHECKING:
    from tools.benchmarks.tables import Bench

BATCH = 4


def padding(bench: "Bench") -> list[Listing]:
    """TimeSeriesExam, HAR and ragged text with the embedded LM's tokenizer."""
    if bench.data is None:
        return [Listing("padding", ["not measured: no data sets; give their folder with --data"])]
    tokenizer = Tokenizer.load(resolve_llm("builtin/tiny-llama-4bit"))
    series = PromptEncoder(tokenizer, 4)
    question = {"question": "Which activity is this?", "channel_names": ["x", "y", "z"]}
    text = PromptEncoder(Tokenizer.load(bench.llm()), 0)  # it writes BOS, which a row of nothing but text needs
    works: dict[str, tuple[PromptEncoder, Sequence[Any]]] = {
        "TimeSeriesExam": (series, load_rows(bench.data / "timeseriesexam" / "qa_dataset.json", "timeseriesexam")),
        "HAR": (series, load_rows(bench.data / "har_uci" / "har_total_acc_train.npz", "npz", **question)[:1000]),
        "ragged text, 20-700 tokens": (
            text,
            [material.text_row(t) for t in material.texts(str(bench.data / "wikitext2" / "valid.txt"), 800, 1)[0]],
        ),
    }
    found = []
    for name, (encoder, rows) in works.items():
        encoded = [encoder.encode(row) for row in rows]
        numbers: dict[str, float] = {}
        for by in get_args(BatchBy):
            batches = Batches(encoded, lambda item: item, BATCH, 0, collate, batch_by=by)
            made = [batches.batch(i) for i in range(batches.num_batches)]
            numbers[by] = share((b.lengths, b.tokens.shape) for b in made)
            numbers[f"shapes by {by}"] = len({(b.tokens.shape, b.targets.shape) for b in made})
        order = np.random.default_rng(0).permutation(len(encoded))
        drawn = ([encoded[i] for i in order[start : start + BATCH]] for start in range(0, len(order), BATCH))
        numbers["random"] = share(exact(items) for items in drawn)
        lengths = [len(item) for item in encoded]
        said = [f"{len(rows)} rows of {min(lengths)} to {max(lengths)} places; random order {numbers['random']:.1%}"]
        for by in get_args(BatchBy):
            said.append(f"batch_by {by}: {numbers[by]:.1%}, {numbers[f'shapes by {by}']} shapes")
        found.append(Listing(f"padding, {name} (aim: <= 5 %)", said, numbers))
        print("\n".join(found[-1].lines()), flush=True)
    return found


def exact(items: Sequence[Encoded]) -> tuple[np.ndarray, tuple[int, int]]:
    """Lengths and shape of a batch that is padded to its longest row, and no further."""
    lengths = np.array([len(item) for item in items])
    return lengths, (len(items), int(lengths.max()))


def share(batches: Iterable[tuple[np.ndarray, tuple[int, int]]]) -> float:
    """Places that hold nothing, of all."""
    real = total = 0
    for lengths, (rows, places) in batches:
        real, total = real + int(lengths.sum()), total + rows * places
    return 1 - real / total
