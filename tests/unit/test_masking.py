"""Masked language modelling: which tokens are hidden, how, and that nothing is lost."""

from dataclasses import replace

import numpy as np
import pytest

from mlx_training.data.masking import MaskedDocuments, MaskedWindows, Masking
from mlx_training.data.text import TextBatches
from mlx_training.data.token_cache import TokenStream
from mlx_training.data.tokenizer import train_bpe
from mlx_training.diagnostics.label_checks import _Wrong
from mlx_training.errors import DataError

BOS, EOS, MASK, VOCAB = 0, 1, 2, 50
MASKING = Masking(MASK, (MASK, BOS, EOS), VOCAB, 0.15, context_length=40)


def text(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, size).astype(np.uint16)


def test_shares_are_those_of_bert() -> None:
    row = replace(MASKING, context_length=4000).row(text(4000), np.random.default_rng(1))
    hidden, original = row.tokens[row.places], row.targets
    assert row.places.size == 600 and np.unique(row.places).size == 600
    np.testing.assert_array_equal(original, text(4000)[row.places])
    untouched = np.delete(np.arange(4000), row.places)
    np.testing.assert_array_equal(row.tokens[untouched], text(4000)[untouched])
    assert 0.76 < (hidden == MASK).mean() < 0.84
    assert 0.07 < (hidden == original).mean() < 0.14
    other = hidden[(hidden != MASK) & (hidden != original)]
    assert 0.06 < other.size / 600 < 0.14 and other.min() > EOS


def test_special_tokens_are_neither_chosen_nor_drawn() -> None:
    row = replace(MASKING, rate=0.9).row(np.array([BOS, 9, 9, EOS, BOS, 9, EOS]), np.random.default_rng(0))
    assert row.places.tolist() == [1, 2, 5] and row.targets.tolist() == [9, 9, 9]
    alone = MASKING.row(np.array([BOS, EOS]), np.random.default_rng(0))
    assert alone.places.size == 1, "there is always something to tell"


def test_chosen_anew_each_epoch_by_the_seed() -> None:
    windows = MaskedWindows(text(400), MASKING)

    def seen(seed: int, epoch: int) -> list[int]:
        return TextBatches(windows, 2, seed, MASKING.row).item(3, epoch).places.tolist()

    assert seen(7, 0) == seen(7, 0) and seen(7, 0) != seen(7, 1) and seen(7, 0) != seen(8, 0)
    fixed = [MASKING.fixed(windows[3], 3).places.tolist() for _ in range(2)]
    assert fixed[0] == fixed[1] != MASKING.fixed(windows[3], 4).places.tolist()


@pytest.mark.parametrize("size", [40, 41, 399])
def test_windows_hold_every_token_once(size: int) -> None:
    windows = MaskedWindows(text(size), MASKING)
    np.testing.assert_array_equal(np.concatenate([*windows]), text(size))
    rows = [MASKING.fixed(window, index) for index, window in enumerate(windows)]
    batch = windows.collate(rows, range(len(rows)))
    assert batch.tokens.shape == (len(rows), 40) and batch.targets.shape == (len(rows), 6)
    assert batch.segments is None and batch.lengths.sum() == size
    told = batch.mask > 0
    shown = batch.tokens.copy()
    np.put_along_axis(shown, np.where(told, batch.positions, 39), np.where(told, batch.targets, shown[:, 39:]), 1)
    np.testing.assert_array_equal(shown[np.arange(40) < batch.lengths[:, None]], text(size))


def test_documents_stay_apart_and_lose_their_eos_alone() -> None:
    documents = [np.append(text(size, size), EOS) for size in (12, 5, 20, 90)]
    starts = np.cumsum([0, *[document.size for document in documents[:-1]]])
    stream = TokenStream(np.concatenate(documents).astype(np.uint16), starts, 0, 0)
    packed = MaskedDocuments(stream, MASKING, seed=0)
    rows = [MASKING.fixed(row, index) for index, row in enumerate(packed)]
    batch = packed.collate(rows, range(len(rows)))
    assert batch.lengths.sum() == sum(document.size - 1 for document in documents)
    pads = np.arange(40) >= batch.lengths[:, None]
    for segments, row, pad in zip(batch.segments, rows, pads, strict=True):
        assert segments[: len(row)].tolist() == row.segments.tolist()
        assert (segments[pad] == row.segments[-1] + 1).all()


def test_a_tokenizer_without_a_mask_token(tmp_path) -> None:
    texts = ["some text"] * 9
    with pytest.raises(DataError, match=r"no token <mask>; add it with model.tokenizer.special_tokens=\["):
        Masking.of(train_bpe(texts, 262, tmp_path / "plain"), 0.15, 8)
    tokenizer = train_bpe(texts, 262, tmp_path / "mask", ["<mask>"])
    assert Masking.of(tokenizer, 0.15, 8).mask_id == tokenizer.vocab_size - 1


def test_a_short_row_may_show_its_only_label() -> None:
    """A tenth of the hidden tokens stay as they were: rows are judged together."""
    hidden, shown, places = np.full(20, 9), np.arange(10, 30), np.arange(20)
    together = _Wrong()
    together.visible(shown, places[:1], shown[:1], row=0)
    together.visible(hidden, places, shown, row=1)
    together.judge_visible()
    assert not together.rows
    alone = _Wrong()
    alone.visible(shown, places, shown, row=3)
    alone.judge_visible()
    assert alone.rows == {"labels_visible": [3]}
