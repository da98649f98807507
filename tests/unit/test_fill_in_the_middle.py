"""Fill in the middle: nothing is lost, and only the order changes."""

import numpy as np
import pytest

from mlx_training.data.fill_in_the_middle import FillInTheMiddle
from mlx_training.data.packing import PackedDocuments
from mlx_training.data.text import TextBatches, TextWindows
from mlx_training.data.token_cache import TokenStream
from mlx_training.data.tokenizer import Tokenizer, train_bpe
from mlx_training.errors import DataError

BOS, EOS, PREFIX, MIDDLE, SUFFIX = range(5)
DOCUMENT = np.array([BOS, *range(10, 30), EOS], np.uint16)


def transform(rate: float = 1.0, spm_rate: float = 0.0, context: int = 64) -> FillInTheMiddle:
    return FillInTheMiddle(PREFIX, MIDDLE, SUFFIX, BOS, EOS, rate, spm_rate, context)


def between(tokens: list[int], start: int, stop: int | None) -> list[int]:
    first = tokens.index(start) + 1
    return tokens[first : tokens.index(stop) if stop is not None else len(tokens)]


@pytest.mark.parametrize("seed", range(20))
def test_prefix_suffix_middle(seed: int) -> None:
    tokens = transform().document(DOCUMENT, np.random.default_rng(seed)).tolist()
    assert tokens[:2] == [BOS, PREFIX] and tokens[-1] == EOS and len(tokens) == DOCUMENT.size + 3
    prefix, suffix = between(tokens, PREFIX, SUFFIX), between(tokens, SUFFIX, MIDDLE)
    middle = between(tokens, MIDDLE, EOS)
    assert prefix + middle + suffix == list(range(10, 30))


@pytest.mark.parametrize("seed", range(20))
def test_suffix_prefix_middle(seed: int) -> None:
    tokens = transform(spm_rate=1.0).document(DOCUMENT, np.random.default_rng(seed)).tolist()
    assert tokens[:3] == [BOS, PREFIX, SUFFIX] and tokens[-1] == EOS
    suffix, rest = between(tokens, SUFFIX, MIDDLE), between(tokens, MIDDLE, EOS)
    assert rest + suffix == list(range(10, 30))


def test_rates() -> None:
    rng = np.random.default_rng(0)
    turned = [transform(0.3, 0.25).document(DOCUMENT, rng) for _ in range(2000)]
    changed = [tokens.tolist() for tokens in turned if tokens is not DOCUMENT]
    assert 0.27 < len(changed) / 2000 < 0.33
    assert 0.2 < sum(tokens[2] == SUFFIX and tokens[1] == PREFIX for tokens in changed) / len(changed) < 0.35
    assert transform(0.0).document(DOCUMENT, rng) is DOCUMENT


def test_a_window_is_turned_around_document_by_document() -> None:
    stream = np.concatenate([DOCUMENT, DOCUMENT + np.uint16(30) * (DOCUMENT > 5)])
    windows = TextWindows(stream, context_length=43)
    (window,) = windows
    turned = transform(context=60).window(window, np.random.default_rng(0)).tolist()
    assert len(turned) == window.size + 6
    first, second = turned[:25], turned[25:]
    assert {t for t in first if t > 5} == set(range(10, 30)) and {t for t in second if t > 5} == set(range(40, 60))
    assert transform(context=43).window(window, np.random.default_rng(0)).tolist() == turned[:44], "cut at its end"


def test_batches_turn_rows_by_seed_epoch_and_row() -> None:
    stream = TokenStream(np.tile(DOCUMENT, 12), np.arange(12) * DOCUMENT.size, 0, 0)
    packed = PackedDocuments(stream, 60, seed=0, reserve=3)
    batches = TextBatches(packed, 2, seed=5, transform=transform(context=60).row)
    again = TextBatches(packed, 2, seed=5, transform=transform(context=60).row)
    n = batches.num_batches
    shown = [batches.batch(i) for i in range(2 * n)]
    assert [b.tokens.tolist() for b in shown] == [again.batch(i).tokens.tolist() for i in reversed(range(2 * n))][::-1]
    by_row = [
        {row: b.tokens[i].tolist() for b in shown[e * n : e * n + n] for i, row in enumerate(b.rows)} for e in (0, 1)
    ]
    assert by_row[0].keys() == by_row[1].keys() and all(by_row[0][row] != by_row[1][row] for row in by_row[0])
    assert max(b.lengths.max() for b in shown) <= 60
    counts = np.bincount(np.concatenate([b.targets[b.mask > 0] for b in shown]))
    assert counts[MIDDLE] == counts[EOS] == 24 and (counts[10:30] == 24).all()


def test_the_tokenizer_needs_sentinels(tmp_path, tiny_tokenizer: Tokenizer) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match='no tokens <fim_prefix>, .*model.tokenizer.special_tokens=."<fim_prefix>"'):
        FillInTheMiddle.of(tiny_tokenizer, 0.5, 0.5, 64)
    tokenizer = train_bpe(["a b"], 300, tmp_path, ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"])
    made = FillInTheMiddle.of(tokenizer, 0.5, 0.5, 64)
    assert (made.prefix, made.middle, made.suffix) == tuple(range(tokenizer.vocab_size - 3, tokenizer.vocab_size))
    with pytest.raises(DataError, match="a context of 3 tokens is too short"):
        FillInTheMiddle.of(tokenizer, 0.5, 0.5, 3)
