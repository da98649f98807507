"""Generated questions: deterministic, balanced, answerable from the series and from nothing else."""

from collections import Counter

import numpy as np
import pytest

from mlx_training.data.questions import MAX_LENGTH, MIN_LENGTH, QUESTION_TYPES, QuestionDataset
from mlx_training.data.rows import Row
from mlx_training.errors import ConfigError

TYPES = [kind.name for kind in QUESTION_TYPES]


@pytest.fixture(scope="module")
def train() -> list[Row]:
    return list(QuestionDataset(1337, "train", 4000))


@pytest.fixture(scope="module")
def test() -> list[Row]:
    return list(QuestionDataset(1337, "test", 1000))


def chance(rows: list[Row]) -> float:
    """Accuracy of the best constant answer per type."""
    best = [Counter(row.answer for row in rows if row.type == name).most_common(1)[0][1] for name in TYPES]
    return sum(best) / len(rows)


def same(a: Row, b: Row) -> bool:
    text = all(getattr(a, name) == getattr(b, name) for name in vars(a) if name != "series")
    return text and np.array_equal(a.series[0], b.series[0])


def test_a_row_depends_on_seed_split_and_index_alone() -> None:
    rows = QuestionDataset(3, "train", 200)
    backwards = [rows[i] for i in reversed(range(200))][::-1]
    assert all(same(a, b) for a, b in zip(rows, backwards, strict=True))
    assert all(same(a, b) for a, b in zip(rows, QuestionDataset(3, "train", 1000)[:200], strict=True))
    assert same(rows[-1], rows[199])
    for other in (QuestionDataset(4, "train", 200), QuestionDataset(3, "validation", 200)):
        assert not any(np.array_equal(a.series[0], b.series[0]) for a, b in zip(rows, other, strict=True))
    with pytest.raises(IndexError):
        rows[200]


def test_rows_are_complete_and_vary(train: list[Row]) -> None:
    for row in train[:500]:
        assert row.answer in row.options and 3 <= len(row.options) <= 4
        assert ", ".join(row.options) + "." in row.pre_prompt
        assert all(option.isalpha() for option in row.options)
        assert row.series[0].dtype == np.float32 and np.isfinite(row.series[0]).all()
        assert MIN_LENGTH <= row.series[0].size <= MAX_LENGTH
    assert len({row.id for row in train}) == len(train)
    assert len({row.series[0].size for row in train}) == MAX_LENGTH - MIN_LENGTH + 1
    assert len({(row.pre_prompt, row.series_text, row.post_prompt) for row in train}) > 1000
    places = Counter(row.options.index(row.answer) for row in train if len(row.options) == 3)
    assert max(places.values()) < 0.37 * sum(places.values())  # the place in the list tells nothing


def test_answers_are_balanced(test: list[Row]) -> None:
    assert Counter(row.type for row in test[:60]) == dict.fromkeys(TYPES, 12)
    for kind in QUESTION_TYPES:
        answers = Counter(row.answer for row in test[:60] if row.type == kind.name)
        assert answers == dict.fromkeys(kind.options, 12 // len(kind.options))
    assert chance(test) <= 0.35


def test_text_and_statistics_do_not_tell_the_answer(train: list[Row], test: list[Row]) -> None:
    pytest.importorskip("sklearn", reason="the leak test needs scikit-learn (extra `dev`)")
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler

    def features(row: Row) -> dict[str, float]:
        mean, std = float(row.series[0].mean()), float(row.series[0].std())
        numbers = {"mean": mean, "asinh mean": np.arcsinh(mean), "std": std, "log std": np.log(std)}
        words = f"{row.pre_prompt} {row.series_text[0]} {row.post_prompt}".split()
        places = {f"{word} {i}": 1.0 for i, word in enumerate(row.options)}
        return numbers | dict.fromkeys(words, 1.0) | places | {"ratio": mean / std, "length": row.series[0].size}

    hits = 0.0
    for name in TYPES:  # one model per type is the stronger attack
        fit, held_out = ([row for row in rows if row.type == name] for rows in (train, test))
        model = make_pipeline(DictVectorizer(), MaxAbsScaler(), LogisticRegression(C=0.1, max_iter=500))
        model.fit([features(row) for row in fit], [row.answer for row in fit])
        hits += model.score([features(row) for row in held_out], [row.answer for row in held_out]) * len(held_out)
    assert hits / len(test) <= chance(test) + 0.10


def _rule(name: str, z: np.ndarray) -> str:
    """A hand-written answer from a standardised series: shows that the series holds it."""
    time = np.linspace(-1, 1, z.size)
    if name == "trend":
        slope = np.polyfit(time, z, 1)[0]
        return "flat" if abs(slope) < 0.6 else "rising" if slope > 0 else "falling"
    if name == "period":
        power = np.abs(np.fft.rfft(z, 1024))[8:] ** 2
        period = 1024 / (8 + int(power.argmax()))
        return "short" if period < 10 else "medium" if period < 23 else "long"
    if name == "anomaly":
        size = np.abs(z - np.median(z))
        place = int(size.argmax()) / z.size
        if size.max() < 5.5 * np.median(size):  # 3.7 robust standard deviations
            return "nowhere"
        return "beginning" if place < 1 / 3 else "middle" if place < 2 / 3 else "end"
    cuts = range(z.size // 4, 3 * z.size // 4)
    if name == "shift":
        jump = max((z[k:].mean() - z[:k].mean() for k in cuts), key=abs)
        return "none" if abs(jump) < 1 else "up" if jump > 0 else "down"
    ratio = max((np.log(z[k:].std() / z[:k].std()) for k in cuts), key=abs)
    return "steady" if abs(ratio) < 0.75 else "growing" if ratio > 0 else "shrinking"


@pytest.mark.parametrize("name", TYPES)
def test_the_series_holds_the_answer(test: list[Row], name: str) -> None:
    rows = [row for row in test if row.type == name]
    values = [row.series[0].astype(np.float64) for row in rows]
    hits = [_rule(name, (x - x.mean()) / x.std()) == row.answer for x, row in zip(values, rows, strict=True)]
    assert np.mean(hits) >= 0.95


def test_unknown_split_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'dev'.*train, validation, test"):
        QuestionDataset(1, "dev", 10)
    with pytest.raises(ConfigError, match="num_samples >= 1, got 1 and 0"):
        QuestionDataset(1, "test", 0)
