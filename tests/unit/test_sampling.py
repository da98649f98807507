"""Sampling: against Hugging Face's own processors, against plain loops, and as a distribution."""

import itertools
import math

import numpy as np
import pytest

from mlx_training.errors import UserError
from mlx_training.sampling import Sampling, choose, filtered, softmax

SETTINGS = [
    Sampling(temperature, top_k, top_p, min_p, penalty)
    for temperature, top_k, top_p, min_p, penalty in itertools.product(
        (0.7, 1.0, 1.6), (None, 1, 7), (None, 0.3, 0.9), (None, 0.2), (1.0, 1.3)
    )
]


def logits(rows: int = 3, vocabulary: int = 40, seed: int = 0) -> np.ndarray:
    return (2 * np.random.default_rng(seed).standard_normal((rows, vocabulary))).astype(np.float32)


TEXTS = [[0, 5, 5, 9], [39, 1, 2, 3], [7, 7, 7, 8]]


def test_equals_hugging_face() -> None:
    """The same processors in the order in which `generate` of transformers builds them."""
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    for setting in SETTINGS:
        chain = [processors.RepetitionPenaltyLogitsProcessor(setting.repetition_penalty)]
        chain.append(processors.TemperatureLogitsWarper(setting.temperature))
        if setting.top_k is not None:
            chain.append(processors.TopKLogitsWarper(setting.top_k))
        if setting.top_p is not None:
            chain.append(processors.TopPLogitsWarper(setting.top_p))
        if setting.min_p is not None:
            chain.append(processors.MinPLogitsWarper(setting.min_p))
        expected = torch.from_numpy(logits())
        for process in chain:
            expected = process(torch.tensor(TEXTS), expected)
        np.testing.assert_allclose(
            filtered(logits(), setting, TEXTS), expected.numpy(), rtol=1e-5, err_msg=str(setting)
        )


def test_equals_plain_loops() -> None:
    for setting in SETTINGS:
        for x, text, actual in zip(logits(), TEXTS, filtered(logits(), setting, TEXTS), strict=True):
            np.testing.assert_allclose(actual, plain(x.tolist(), setting, text), rtol=1e-9, err_msg=str(setting))


def plain(x: list[float], setting: Sampling, text: list[int]) -> list[float]:
    for token in set(text):
        x[token] *= setting.repetition_penalty if x[token] < 0 else 1 / setting.repetition_penalty
    x = [value / setting.temperature for value in x]

    def keep(tokens: list[int]) -> list[float]:
        return [value if token in tokens else -math.inf for token, value in enumerate(x)]

    def ranked() -> list[tuple[float, int]]:
        total = sum(math.exp(value) for value in x)
        return sorted(((math.exp(value) / total, token) for token, value in enumerate(x)), reverse=True)

    if setting.top_k is not None:
        x = keep([token for _, token in ranked()[: setting.top_k]])
    if setting.top_p is not None:
        kept, together = [], 0.0
        for p, token in ranked():
            if together < setting.top_p:
                kept.append(token)
            together += p
        x = keep(kept)
    if setting.min_p is not None:
        most = ranked()[0][0]
        x = keep([token for p, token in ranked() if p >= setting.min_p * most])
    return x


@pytest.mark.parametrize("setting", [Sampling(1.0), Sampling(0.5, top_p=0.9), Sampling(1.0, top_k=3)])
def test_draws_follow_the_distribution(setting: Sampling) -> None:
    """20,000 draws; every token within five standard deviations, and none that was filtered out."""
    n, x = 20_000, logits(1, 8)
    drawn = choose(np.repeat(x, n, 0), setting, range(n), [0] * n, [[]] * n)
    p = softmax(filtered(x, setting, [[]]))[0]
    found = np.bincount(drawn, minlength=8) / n
    assert (np.abs(found - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()
    assert p.max() < 0.95


def test_a_draw_is_a_function_of_seed_row_and_position() -> None:
    setting, x, rows = Sampling(1.0, seed=3), logits(6, 500), [4, 0, 9, 2, 7, 1]
    together = choose(x, setting, rows, [5] * 6, [[]] * 6)
    for i, row in enumerate(rows):
        assert choose(x[i : i + 1], setting, [row], [5], [[]]) == together[i]
    others = [
        choose(x, Sampling(1.0, seed=4), rows, [5] * 6, [[]] * 6),
        choose(x, setting, rows, [6] * 6, [[]] * 6),
        choose(x, setting, [row + 10 for row in rows], [5] * 6, [[]] * 6),
    ]
    assert all((other != together).sum() >= 3 for other in others)


def test_greedy() -> None:
    """The most probable token, whatever the seed; a penalty can change which one that is."""
    x = logits()
    for seed in (0, 1):
        np.testing.assert_array_equal(choose(x, Sampling(seed=seed), [0, 1, 2], [0] * 3, TEXTS), x.argmax(-1))
    best = x.argmax(-1)
    penalised = choose(x, Sampling(repetition_penalty=100), [0, 1, 2], [0] * 3, best[:, None].tolist())
    assert (penalised != best).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature: given -1.0; expected 0"),
        ({"temperature": math.nan}, "temperature: given nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: given 0; expected 1 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: given 0.0; expected above 0 and at most 1"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p: given 1.5; expected from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: given 0.0"),
        ({"seed": -1}, "seed: given -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: given 0"),
        ({"stop": ("a", "")}, "stop: given"),
        ({"top_k": 3, "min_p": 0.1}, "top_k, min_p: temperature 0 always takes the most probable token"),
    ],
)
def test_values_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**values)
