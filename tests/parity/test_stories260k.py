"""A trained model that nobody here made: logits, greedy text and mean loss as its authors' weights give them."""

import json

import numpy as np
import pytest

from mlx_training.backend import get
from mlx_training.data.batch import Batch
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.huggingface import read_huggingface
from mlx_training.quantize import quantize_directory
from tests.parity import lm_driver
from tests.parity.cases import realise


@pytest.fixture(scope="module")
def golden(shared_data):
    folder = shared_data / "stories260k"
    values = json.loads((folder / "golden.json").read_text())
    with np.load(folder / "golden_logits.npz") as logits:
        values["logits"] = [logits[f"logits_{k}"] for k in range(len(values["cases"]))]
    return values


@pytest.fixture(scope="module")
def directory(shared_data):
    return shared_data / "stories260k" / "hf"


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.load(directory)


def _session(backend: str, lm):
    """A text-only model around a pretrained LM."""
    return get(backend).session(lm_driver.model_around(backend, lm))


def _prompts(ids: list[list[int]]) -> Batch:
    lengths = np.array([len(row) for row in ids], np.int32)
    tokens = np.zeros((len(ids), lengths.max()), np.int32)
    for row, prompt in zip(tokens, ids, strict=True):
        row[: len(prompt)] = prompt
    none = np.zeros((len(ids), 1))
    return Batch(tokens, none.astype(np.int32), none.astype(np.float32), lengths)


def _greedy(session, prompts: Batch, num_tokens: int) -> np.ndarray:
    tokens = [session.prefill(prompts).argmax(-1)]
    while len(tokens) < num_tokens:
        tokens.append(session.extend(tokens[-1]).argmax(-1))
    return np.stack(tokens, axis=1)


def test_logits(backend_name, golden, directory):
    lm = lm_driver.load(backend_name, directory)
    for case, expected in zip(golden["cases"], golden["logits"], strict=True):
        actual = lm_driver.logits(backend_name, lm, np.array([case["input_ids"]]))
        np.testing.assert_allclose(actual[0], expected, rtol=0, atol=1e-4)


def test_logits_of_a_trainable_model(both_backends, golden, directory):
    """The same files read as a decoder that trains."""
    spec, arrays = read_huggingface(directory)
    for name in both_backends:
        backend, model = realise(name, spec)
        backend.load(model, arrays)
        for case, expected in zip(golden["cases"], golden["logits"], strict=True):
            logits = model.logits(backend.to_device(_prompts([case["input_ids"]])))
            np.testing.assert_allclose(np.array(logits.tolist())[0], expected, rtol=0, atol=1e-4)


def test_published_greedy_text(backend_name, golden, directory, tokenizer):
    """From BOS alone, and four prompts of different lengths side by side."""
    lm = lm_driver.load(backend_name, directory)
    story = _greedy(_session(backend_name, lm), _prompts([[1]]), 80)[0].tolist()
    assert story == golden["greedy_from_bos_80"]
    assert tokenizer.decode([1, *story]).strip() == golden["greedy_from_bos_text"]
    prompts = _prompts([case["input_ids"] for case in golden["cases"]])
    batched = _greedy(_session(backend_name, lm), prompts, 24)
    assert batched.tolist() == [case["greedy_24"] for case in golden["cases"]]


def test_mean_nll(backend_name, golden, directory, tokenizer, shared_data):
    text = (shared_data / "tinystories" / "train.txt").read_text(encoding="utf-8")[:20000]
    total, count = _nll(backend_name, lm_driver.load(backend_name, directory), [1, *tokenizer.encode(text)])
    assert count == golden["nll"]["num_scored"]
    assert abs(total / count - golden["nll"]["mean"]) <= 1e-3


def _nll(backend: str, lm, ids: list[int]) -> tuple[float, int]:
    """Sum of -log p over windows of 256 tokens, each scored alone on its second to last token."""
    total, count = 0.0, 0
    for start in range(0, len(ids), 256):
        window = np.array([ids[start : start + 256]])
        logits = lm_driver.logits(backend, lm, window)[0, :-1].astype(np.float64)
        targets = window[0, 1:]
        top = logits.max(-1, keepdims=True)
        log_z = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
        total += float((log_z - logits[np.arange(len(targets)), targets]).sum())
        count += len(targets)
    return total, count


@pytest.mark.parametrize("bits", (4, 8))
def test_quantized(both_backends, directory, tokenizer, shared_data, tmp_path, bits):
    """The same packed weights on both backends: equal logits, and about the same loss as the original."""
    quantize_directory(directory, tmp_path, bits=bits, group_size=64)
    text = (shared_data / "tinystories" / "train.txt").read_text(encoding="utf-8")[:2000]
    ids = [1, *tokenizer.encode(text)]
    window = np.array([ids[:256]])
    total, count = _nll("torch", lm_driver.load("torch", directory), ids)
    for weights in ("dequantized", "resident"):
        lms = {b: lm_driver.load(b, tmp_path, weights=weights) for b in both_backends}
        logits = {b: lm_driver.logits(b, lm, window) for b, lm in lms.items()}
        np.testing.assert_allclose(logits["mlx"], logits["torch"], rtol=0, atol=1e-4)
        quantized = _nll("torch", lms["torch"], ids)[0] / count
        assert abs(quantized - total / count) < (0.2 if bits == 4 else 0.01)  # measured: 0.163 and 0.003
