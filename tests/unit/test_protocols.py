"""Protocols of perplexity: which tokens are predicted, from what, and how their text is counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_training.data.token_cache import encode_documents
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import DataError, UserError
from mlx_training.metrics import TokenTally, mainrun_metrics, token_metrics
from mlx_training.protocols import Protocol, Window, collate_windows, documents_of, sizes_of, sliding, windows_of


@given(st.integers(2, 60), st.integers(1, 12), st.data())
def test_sliding_predicts_every_token_once_with_its_context(size: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    tokens, predicted = np.arange(size), []
    for window in sliding(tokens, context, stride):
        assert len(window) <= context + 1
        for place in range(window.first, len(window) - 1):
            target = int(window.tokens[place + 1])
            predicted.append(target)
            assert place + 1 >= min(target, context - stride + 1)  # tokens that it sees
        np.testing.assert_array_equal(np.diff(window.tokens), 1)
    assert predicted == list(range(1, size))


def test_windows_share_one_token(tiny_tokenizer: Tokenizer) -> None:
    windows = windows_of(Protocol().filled(4, None), [np.arange(10)], [], tiny_tokenizer)
    assert [window.tokens.tolist() for window in windows] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9]]
    with pytest.raises(DataError, match="a text of 1 tokens has nothing to predict"):
        windows_of(Protocol().filled(4, None), [np.arange(1)], [], tiny_tokenizer)


def test_parts_do_not_see_each_other(tiny_tokenizer: Tokenizer) -> None:
    parts = [np.arange(6), np.arange(10, 11), np.arange(20, 23)]
    windows = windows_of(Protocol().filled(4, None), parts, [], tiny_tokenizer)
    assert [window.tokens.tolist() for window in windows] == [[0, 1, 2, 3, 4], [4, 5], [20, 21, 22]]
    slid = windows_of(Protocol("sliding", stride=2).filled(4, None), parts, [], tiny_tokenizer)
    assert [(window.tokens.tolist(), window.first) for window in slid] == [
        ([0, 1, 2, 3, 4], 0),
        ([1, 2, 3, 4, 5], 3),
        ([20, 21, 22], 0),
    ]


def test_lines(tiny_tokenizer: Tokenizer) -> None:
    """The first that are not blank, each alone and cut, without BOS; one of a single token has nothing to predict."""
    documents = ["\n \nthe trend of the series\n\nx", "it has mean 0.1\nand std"]
    windows = windows_of(
        Protocol("lines", max_lines=3, max_tokens=4).filled(9, None), [np.arange(0)], documents, tiny_tokenizer
    )
    expected = [tiny_tokenizer.encode(line)[:4] for line in ("the trend of the series", "it has mean 0.1")]
    assert [window.tokens.tolist() for window in windows] == expected and len(expected[0]) == 4
    with pytest.raises(DataError, match="none of 1 lines has the 2 tokens"):
        windows_of(Protocol("lines").filled(9, None), [np.arange(0)], ["x\n\n"], tiny_tokenizer)


def test_a_batch_has_labels_where_tokens_count() -> None:
    batch = collate_windows([Window(np.arange(10, 15), 2), Window(np.arange(20, 23))], [7, 3])
    assert batch.tokens.tolist() == [[10, 11, 12, 13], [20, 21, 0, 0]] and batch.rows == (7, 3)
    assert batch.targets.tolist() == [[13, 14], [21, 22]] and batch.positions.tolist() == [[2, 3], [0, 1]]
    assert batch.mask.tolist() == [[1, 1], [1, 1]] and batch.lengths.tolist() == [4, 2]


def test_documents_and_sizes(tiny_tokenizer: Tokenizer) -> None:
    """Bytes and characters of the literal documents; what parts them spells nothing."""
    documents = ["the trend é", "日本 up", "down"]
    stream = encode_documents(documents, tiny_tokenizer)
    assert documents_of(stream, tiny_tokenizer) == documents
    assert sizes_of([stream], tiny_tokenizer) == (sum(len(d.encode()) for d in documents), sum(map(len, documents)))


def test_metrics_of_tokens() -> None:
    """Against the definitions, with labels at positions and a mask."""
    tally = TokenTally()
    windows = [Window(np.arange(5)), Window(np.arange(5), 2), Window(np.arange(3)), Window(np.arange(5))]
    rng = np.random.default_rng(0)
    expected, hits = {}, 0
    for rows in ([3, 1], [0, 2]):
        batch = collate_windows([windows[row] for row in rows], rows)
        scores = {"logprobs": -rng.random(batch.mask.shape, np.float32), "hits": rng.random(batch.mask.shape) < 0.5}
        tally.add(batch, scores)
        for b, row in enumerate(rows):
            count = len(windows[row]) - 1 - windows[row].first
            expected[row] = -scores["logprobs"][b, :count].astype(float)
            hits += scores["hits"][b, :count].sum()
    nats = sum(x.sum() for x in expected.values())
    metrics = token_metrics(tally, 30, 20)
    assert metrics["tokens"] == 12 and metrics["accuracy"] == pytest.approx(hits / 12)
    assert metrics["loss"] == pytest.approx(nats / 12) and metrics["perplexity"] == pytest.approx(np.exp(nats / 12))
    assert metrics["bits_per_byte"] == pytest.approx(nats / np.log(2) / 30)
    assert metrics["bits_per_character"] == pytest.approx(nats / np.log(2) / 20)
    third = np.mean([expected[0][2], expected[1][0], expected[3][2]])
    assert tally.loss_by_place[2] == pytest.approx(third) and tally.by_place[1].tolist() == [3, 3, 3, 3]
    assert token_metrics(tally, 0, 0)["bits_per_byte"] is None

    mainrun = mainrun_metrics(tally, 20, 3, length=4, batch_size=2)  # rows 0 and 3 are whole, in one full batch
    assert mainrun["mainrun_compat"] == pytest.approx((expected[0].sum() + expected[3].sum()) / 35)
    assert mainrun["mainrun_coverage"] == pytest.approx(8 / 12)
    assert mainrun_metrics(tally, 20, 3, length=4, batch_size=3)["mainrun_compat"] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "lines", "stride": 4}, "--stride: the protocol lines does not read it; it belongs to sliding"),
        ({"max_lines": 4}, "--max-lines: the protocol windows does not read it"),
        ({"name": "lines", "max_tokens": 1}, "--max-tokens: given 1; expected 2 or more"),
        ({"name": "sliding", "stride": 17}, "--stride 17: it would skip tokens; give at most the context, 16"),
        ({"name": "position", "context_length": 20}, "--context-length: given 20; this model has positions for 18"),
        ({"name": "lines", "max_tokens": 512}, "--max-tokens: given 512; this model has positions for 18"),
    ],
)
def test_wrong_values(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Protocol(**values).filled(16, 18)
