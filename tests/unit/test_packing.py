"""Packed documents: whole, alone, every token once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_training.data.packing import PackedDocuments, warn_of_cut
from mlx_training.data.text import TextBatches
from mlx_training.data.token_cache import TokenStream
from mlx_training.errors import DataError

EOS = 1


def stream_of(lengths: list[int]) -> TokenStream:
    """Documents of `lengths` tokens; no token but EOS, which ends each, comes twice."""
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    tokens = np.arange(10, 10 + sum(lengths), dtype=np.uint32)
    tokens[starts + np.array(lengths) - 1] = EOS
    return TokenStream(tokens, starts, 0, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(4, 20), st.integers(0, 3))
def test_every_token_once_and_no_target_of_another_document(lengths: list[int], context: int, seed: int) -> None:
    stream = stream_of(lengths)
    if max(lengths) < 2:
        with pytest.raises(DataError, match="nothing to predict"):
            PackedDocuments(stream, context, seed)
        return
    packed = PackedDocuments(stream, context, seed)
    batch = packed.collate([packed[i] for i in range(len(packed))], range(len(packed)))
    known = {int(a): int(b) for a, b in zip(stream.tokens[:-1], stream.tokens[1:]) if a != EOS}  # within documents
    supervised = batch.mask > 0
    pairs = dict(zip(batch.tokens[supervised].tolist(), batch.targets[supervised].tolist()))
    assert supervised.sum() == len(known) and pairs == known
    assert EOS not in pairs, "EOS predicts nothing"
    document_of = {
        int(t): d for d, start in enumerate(stream.starts) for t in stream.tokens[start : start + lengths[d]]
    }
    for b, length in enumerate(batch.lengths):
        assert supervised[b].tolist() == [place < length for place in range(context)]
        segments = batch.segments[b]
        assert (np.diff(segments) >= 0).all() and (np.diff(segments) <= 1).all() and segments[0] == 0
        assert length == context or (segments[length:] == segments[length - 1] + 1).all()
        for number in range(segments[length - 1] + 1):
            inside = batch.tokens[b, :length][segments[:length] == number].tolist()
            assert len({document_of[token] for token in inside}) == 1
            assert inside == list(range(inside[0], inside[0] + len(inside))), "in order"
    assert packed.efficiency == pytest.approx(supervised.mean())


def test_segments_number_documents_and_then_pads() -> None:
    packed = PackedDocuments(stream_of([5, 4, 3]), 12, seed=0)
    batch = packed.collate([packed[0]])
    assert batch.segments.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3]]
    assert batch.tokens.tolist() == [[10, 11, 12, 13, 15, 16, 17, 19, 20, 0, 0, 0]]
    assert batch.targets.tolist() == [[11, 12, 13, EOS, 16, 17, EOS, 20, EOS, 0, 0, 0]]


def test_short_documents_leave_no_gaps() -> None:
    rng = np.random.default_rng(0)
    packed = PackedDocuments(stream_of(rng.integers(5, 60, 2000).tolist()), 128, seed=0)
    assert packed.efficiency > 0.99
    assert isinstance(packed[0].documents[0], np.ndarray) and len(packed[0]) <= 128


def test_seed_and_reserve() -> None:
    stream = stream_of([6] * 40)
    rows = [PackedDocuments(stream, 20, seed)[0].tobytes() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert {len(row.documents) for row in PackedDocuments(stream, 20, 0)} == {4}
    assert {len(row.documents) for row in PackedDocuments(stream, 20, 0, reserve=3)} == {2}


def test_long_documents_are_cut_and_it_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    packed = PackedDocuments(stream_of([50, 5, 21]), 20, seed=0)
    assert (packed.num_cut, packed.longest) == (1, 49)
    warn_of_cut("stories, train", packed)
    warn_of_cut("short", PackedDocuments(stream_of([5]), 20, seed=0))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("note: stories, train: 1 documents are longer than the context")


def test_packed_rows_are_a_dataset_for_batches() -> None:
    packed = PackedDocuments(stream_of([7, 9, 12, 5] * 20), 32, seed=0)
    batches = TextBatches(packed, 3, seed=0)
    seen = [t for i in range(batches.num_batches) for b in [batches.batch(i)] for t in b.tokens[b.mask > 0].tolist()]
    assert len(seen) == len(set(seen)) == 20 * (6 + 8 + 11 + 4)
    assert "segments" in batches.batch(0).arrays()
