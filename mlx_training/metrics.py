"""Scores of generated answers."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from mlx_training.data.rows import Row


def normalise(text: str) -> str:
    """What an exact match compares: case, runs of whitespace and a closing full stop do not count.

    Of a chain of thought, only what follows its last "Answer:" counts.
    """
    return " ".join(text.rpartition("Answer:")[2].split()).removesuffix(".").casefold()


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
