"""Sessions: what is decoded token by token, in any company, is what the whole forward pass gives."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_training.backend import get
from mlx_training.data.batch import Batch
from tests.parity import lm_driver
from tests.parity.cases import CASES, realise, specs
from tests.parity.tiny_checkpoints import save_tiny, save_tiny_quantized

pytestmark = pytest.mark.usefixtures("both_backends")
LENGTHS = (9, 1, 14, 5)  # beyond Gemma's window of 5, and a prompt of one token


PRETRAINED = ["llama", "qwen2", "gemma3_text", "llama 4-bit resident"]
FROM_SCRATCH = [case for case in CASES if case.startswith(("recurrent", "kgram"))]


@pytest.fixture(scope="module", params=[*PRETRAINED, *FROM_SCRATCH])
def checkpoint(request, tmp_path_factory):
    """(directory, how to load it), or the name of a case of the parity suite."""
    if request.param in FROM_SCRATCH:
        return request.param
    model_type, *resident = request.param.split()
    make = save_tiny_quantized if resident else save_tiny
    directory = make(model_type, tmp_path_factory.mktemp("lm") / "lm")
    return directory, {"weights": "resident"} if resident else {}


@pytest.fixture
def lm(backend_name, checkpoint):
    if checkpoint in FROM_SCRATCH:
        backend, model = realise(backend_name, specs(Path())[checkpoint])
        backend.load(model, {name: 3 * array for name, array in backend.export(model).items()})  # logits that differ
        if backend_name == "torch":
            model.requires_grad_(False)
        return model
    return lm_driver.load(backend_name, checkpoint[0], **checkpoint[1])


@pytest.fixture
def new_session(backend_name, lm):
    model = lm if isinstance(lm, lm_driver.module(backend_name, "layers").LanguageModel) else None
    return lambda: get(backend_name).session(model or lm_driver.model_around(backend_name, lm))


def _rows() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, 96, length + 4).astype(np.int32) for length in LENGTHS]


def _prompts(rows: list[np.ndarray]) -> Batch:
    """The rows without their last four tokens, padded at the end with a token that must not matter."""
    lengths = np.array([len(row) - 4 for row in rows], np.int32)
    tokens = np.full((len(rows), lengths.max() + 2), 77, np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row) - 4] = row[:-4]
    none = np.zeros((len(rows), 1))
    return Batch(tokens, none.astype(np.int32), none.astype(np.float32), lengths)


def _decode(session, rows: list[np.ndarray], prompts: Batch | None = None) -> np.ndarray:
    """Logits after the prompt and after each of the four known tokens (B, 5, V)."""
    steps = [session.prefill(prompts or _prompts(rows))]
    steps += [session.extend(np.array([row[i] for row in rows])) for i in range(-4, 0)]
    return np.stack(steps, axis=1)


def test_equals_the_whole_forward_pass(backend_name, lm, new_session):
    rows = _rows()
    decoded = _decode(new_session(), rows)
    assert decoded.dtype == np.float32
    for row, actual in zip(rows, decoded, strict=True):
        expected = lm_driver.logits(backend_name, lm, row[None])[0, -5:]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(new_session):
    rows = _rows()
    together = _decode(new_session(), rows)
    for row, expected in zip(rows, together, strict=True):
        np.testing.assert_allclose(_decode(new_session(), [row])[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpoint", PRETRAINED, indirect=True)
def test_what_prompts_begin_with_is_read_once(backend_name, lm):
    rng = np.random.default_rng(6)
    instruction = rng.integers(3, 96, 13)  # 8 of whose tokens are read once
    rows = [np.concatenate([instruction, rng.integers(3, 96, length + 12)]).astype(np.int32) for length in LENGTHS]
    prompts, decoded = replace(_prompts(rows), prefix=16), {}
    for setting, num_kept in {"off": 0, "compute": 0, "reuse": 1}.items():
        model = lm_driver.model_around(backend_name, lm, frozen_prefix=setting)
        decoded[setting] = _decode(get(backend_name).session(model), rows, prompts)
        assert len(model._kept) == num_kept
        get(backend_name).session(model).prefill(replace(_prompts(rows[:1]), prefix=16))
        assert len(model._kept) == num_kept  # a row alone has nobody to share with
    np.testing.assert_array_equal(decoded["compute"], decoded["off"])
    np.testing.assert_allclose(decoded["reuse"], decoded["off"], rtol=0, atol=1e-5)
    for row, actual in zip(rows, decoded["reuse"], strict=True):
        expected = lm_driver.logits(backend_name, lm, row[None])[0, -5:]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpoint", PRETRAINED, indirect=True)
def test_beyond_the_room_of_a_cache(backend_name, lm, new_session):
    """150 tokens one by one, half of the rows leaving on the way: room is made again and again, and taken along."""
    rng = np.random.default_rng(7)
    rows = [rng.integers(3, 96, length + 150).astype(np.int32) for length in LENGTHS]
    session, staying = new_session(), list(range(len(rows)))
    session.prefill(_prompts([row[: length + 4] for row, length in zip(rows, LENGTHS, strict=True)]))
    for place in range(150):
        if place == 80:
            staying = [2, 0]
            session = session.fork(staying)
        logits = session.extend(np.array([rows[b][LENGTHS[b] + place] for b in staying]))
    for actual, b in zip(logits, staying, strict=True):
        expected = lm_driver.logits(backend_name, lm, rows[b][None])[0, -1]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_fork_leaves_the_parent_valid(new_session):
    rows = _rows()
    expected = _decode(new_session(), rows)
    parent = new_session()
    parent.prefill(_prompts(rows))
    parent.extend(np.array([row[-4] for row in rows]))
    order = [2, 0, 2, 1]  # reordered, repeated, dropped
    fork = parent.fork(order)
    other = fork.extend(np.array([11, rows[0][-3], rows[2][-3], rows[1][-3]]))
    np.testing.assert_allclose(other[1:], expected[[0, 2, 1], 2], rtol=0, atol=1e-5)
    assert np.abs(other[0] - other[2]).max() > 0.1  # the same history, another token
    later = [parent.extend(np.array([row[i] for row in rows])) for i in (-3, -2, -1)]
    np.testing.assert_allclose(np.stack(later, axis=1), expected[:, 2:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", FROM_SCRATCH)
def test_decoding_takes_no_more_memory_with_every_token(case, backend_name):
    backend, model = realise(backend_name, specs(Path())[case])
    session = backend.session(model)
    session.prefill(_prompts(_rows()))

    def size() -> int:
        arrays = getattr(session.cache, "states", None) or (session.cache.past,)
        return sum(array.nbytes for array in arrays)

    before = size()
    for token in range(40):
        session.extend(np.full(len(LENGTHS), token))
    assert size() == before < 4000


@pytest.mark.parametrize("checkpoint", ["llama"], indirect=True)
def test_a_beginning_ends_where_it_is_said_to(backend_name, lm):
    """One token after what is known already, too: the room after it is no part of it."""
    rows = [np.arange(3, 20, dtype=np.int32), np.array([*range(3, 11), *range(30, 39)], np.int32)]
    batch = replace(_prompts(rows), prefix=9)
    assert lm_driver.model_around(backend_name, lm).past(batch).shape[-2] == 9
