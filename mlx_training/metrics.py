"""Scores of generated answers, and of predicted tokens."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.data.rows import Row, normalise

MAINRUN_EOS = 5  # characters of a literal "<eos>"


def answer_metrics(rows: Sequence[Row], predictions: Sequence[str]) -> dict[str, Any]:
    """Exact match, macro-F1 over the gold answers, invalid answers, and what a constant would score.

    An answer is invalid when it is none of the row's options (or, without options, empty): it is wrong, and counted.
    `chance` is the best constant answer for each question type. `by_type` appears when there are several types.
    """
    gold = [normalise(row.answer) for row in rows]
    given = [normalise(text) for text in predictions]
    right = [a == b for a, b in zip(gold, given, strict=True)]
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    scores: dict[str, list[bool]] = defaultdict(list)
    for row, answer, ok in zip(rows, gold, right, strict=True):
        answers[row.type][answer] += 1
        scores[row.type].append(ok)
    metrics: dict[str, Any] = {
        "accuracy": sum(right) / len(rows),
        "macro_f1": macro_f1(gold, given),
        "invalid": sum(not _is_valid(row, text) for row, text in zip(rows, given, strict=True)),
        "rows": len(rows),
        "chance": sum(counts.most_common(1)[0][1] for counts in answers.values()) / len(rows),
    }
    if len(scores) > 1:
        metrics["by_type"] = {name: sum(ok) / len(ok) for name, ok in sorted(scores.items())}
    return metrics


def macro_f1(gold: Sequence[str], given: Sequence[str]) -> float:
    """Mean over the gold classes of 2 tp / (2 tp + fp + fn)."""
    support, predicted = Counter(gold), Counter(given)
    hits = Counter(a for a, b in zip(gold, given, strict=True) if a == b)
    return sum(2 * hits[name] / (support[name] + predicted[name]) for name in support) / len(support)


def _is_valid(row: Row, text: str) -> bool:
    return text in map(normalise, row.options) if row.options else bool(text)


class TokenTally:
    """Sums over predicted tokens: by their place in a window, and by row.

    `nats` (negative log-likelihood), `tokens` and `hits` (the target was the most probable token) are float64 (P,).
    """

    def __init__(self) -> None:
        self.by_place = np.zeros((3, 0))
        self.rows: dict[int, tuple[float, int]] = {}  # row -> nats, tokens

    def add(self, batch: Batch, scores: Mapping[str, np.ndarray]) -> None:
        """Count what `Backend.score_tokens` says of a batch."""
        counts_BK = batch.mask > 0
        places = np.arange(counts_BK.shape[1])[None] if batch.positions is None else batch.positions
        places = np.broadcast_to(places, counts_BK.shape)[counts_BK]
        nats_BK = np.where(counts_BK, -scores["logprobs"].astype(np.float64), 0)
        self.rows |= zip(batch.rows, zip(nats_BK.sum(1).tolist(), counts_BK.sum(1).tolist(), strict=True), strict=True)
        weights = (nats_BK[counts_BK], np.ones(places.size), scores["hits"][counts_BK])
        before = self.by_place.shape[1]
        found = np.stack([np.bincount(places, w, before).astype(np.float64) for w in weights])
        self.by_place = np.pad(self.by_place, ((0, 0), (0, found.shape[1] - before))) + found

    @property
    def loss_by_place(self) -> np.ndarray:
        """Mean nats of each place, NaN where none was predicted."""
        nats, tokens, _ = self.by_place
        return np.divide(nats, tokens, out=np.full(nats.shape, np.nan), where=tokens > 0)


def token_metrics(tally: TokenTally, num_bytes: int, num_characters: int) -> dict[str, Any]:
    """Mean nats and accuracy of the predicted tokens, and what they cost by byte and character of the text they spell.

    Every predicted token counts, EOS included, which spells nothing; null by byte or character of an empty text.
    """
    nats, tokens, hits = tally.by_place.sum(1)
    loss, bits = nats / tokens, nats / math.log(2)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits / num_bytes if num_bytes else None,
        "bits_per_character": bits / num_characters if num_characters else None,
        "tokens": int(tokens),
        "accuracy": hits / tokens,
    }


def mainrun_metrics(
    tally: TokenTally, num_characters: int, num_eos: int, length: int, batch_size: int
) -> dict[str, Any]:
    """The validation figure of "mainrun": nats of full batches of full windows, by character of the *whole* text.

    Every EOS counts as the five characters of "<eos>". What the last batch leaves out lowers the figure, so that
    larger batches look better: `mainrun_coverage` is the share of the tokens that it is about. (Its windows drift by
    one token a batch against ours.)
    """
    full = [row for row in sorted(tally.rows) if tally.rows[row][1] == length]
    counted = [tally.rows[row] for row in full[: len(full) // batch_size * batch_size]]
    total = tally.by_place[1].sum()
    return {
        "mainrun_compat": sum(nats for nats, _ in counted) / (num_characters + MAINRUN_EOS * num_eos),
        "mainrun_coverage": sum(tokens for _, tokens in counted) / total,
    }
