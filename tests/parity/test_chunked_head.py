"""Logits in chunks of labels: the same log-probabilities and gradients, and never all logits at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training import backend as backends
from mlx_training.backend import ALL_AT_ONCE, MAX_LOGITS, Arrays, HeadChunks, Optim, Runtime, head_chunks
from mlx_training.data.batch import Batch
from mlx_training.init import initialise
from mlx_training.objectives import Sums
from mlx_training.objectives.lm import lm
from mlx_training.pretrained import find_linears
from mlx_training.spec import AdapterSpec, DecoderSpec, FrozenLM, PretrainedSpec, Spec
from tests.parity.cases import CASES, VOCAB, batches, realise, relative, specs, without_zero_gradients
from tests.parity.tiny_checkpoints import save_tiny_quantized

pytestmark = pytest.mark.usefixtures("both_backends")
MOST = HeadChunks(14, 7)  # labels; no number of labels here is a multiple of seven


def weighed(model: Any, batch: Batch) -> Sums:
    """An objective whose weights nobody knows before the log-probabilities."""
    logprobs_BK = model.logprobs(batch)
    return {"loss": (logprobs_BK * logprobs_BK * batch.mask).sum(), "weight": batch.mask.sum()}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same(case: str, directory: Path, backend_name: str) -> None:
    spec = specs(directory)[case]
    backend, model = realise(backend_name, spec)
    (batch,) = batches(spec, 1)
    found = []
    for most in (ALL_AT_ONCE, MOST):
        model.head_chunks = most
        gradients = without_zero_gradients(spec, backend.gradients(model, weighed, batch))
        found.append((gradients, backend.score(model, weighed, batch)["loss"], backend.score_tokens(model, batch)))
    (whole, loss, tokens), (chunked, chunked_loss, chunked_tokens) = found
    assert batch.targets.size % MOST.size and chunked_loss == pytest.approx(loss, rel=1e-6)
    assert {name for name in whole if relative(chunked[name], whole[name]) > 3e-6} == set()
    np.testing.assert_allclose(chunked_tokens["logprobs"], tokens["logprobs"], rtol=1e-6, atol=2e-6)
    np.testing.assert_array_equal(chunked_tokens["hits"], tokens["hits"])


def steps(backend: Any, spec: Spec, model: Any, most: HeadChunks) -> tuple[list[float], Arrays]:
    """Losses of three steps of SGD, the second over two micro-batches, and where the parameters end."""
    start, model.labels_at_once = backend.export(model), most
    step, (first, *more) = backend.make_step(model, lm, Optim("sgd"), seed=0), batches(spec, 4)
    rates, plan = dict.fromkeys(spec.groups, 0.05), [[first], more[:2], more[2:]]
    losses = [float(step(part, step=i, lr=rates)["loss"]) for i, part in enumerate(plan, start=1)]
    ends = backend.export(model)
    backend.load(model, start)
    return losses, {name: array - start[name] for name, array in ends.items()}


def changed(found: Arrays, expected: Arrays, share: float) -> list[str]:
    """Parameters that moved otherwise by more than rounding and this share."""
    return [n for n, x in expected.items() if np.abs(found[n] - x).max() > 1e-6 + share * np.abs(x).max()]


SMALL = DecoderSpec(VOCAB, 16, 24, 3, 2, 1, 8, context_length=20, init_std=0.2)
TRAINED = {
    "tied, soft-capped": replace(SMALL, logit_softcap=2.0),
    "untied": replace(SMALL, tie_word_embeddings=False),
}


@pytest.mark.parametrize("case", [*TRAINED, "frozen 4-bit head", "adapters on the head"])
def test_steps_are_the_same(case: str, untied: Path, backend_name: str, uncompiled: None) -> None:
    """In training, where the gradient of a frozen head is computed ahead; in bfloat16 as near to float32 as without."""
    spec = TRAINED.get(case) or adapted(untied, *(("q_proj",) if case.startswith("frozen") else ("q_proj", "lm_head")))
    backend, model = built(backend_name, spec)
    (losses, moved), (chunked_losses, chunked) = (steps(backend, spec, model, most) for most in (ALL_AT_ONCE, MOST))
    assert chunked_losses == pytest.approx(losses, rel=1e-6)
    assert changed(chunked, moved, 1e-5) == []
    backend, model = built(backend_name, spec, precision="bfloat16")
    (_, rounded), (_, chunked) = (steps(backend, spec, model, most) for most in (ALL_AT_ONCE, MOST))
    off = {n: (relative(chunked[n], x), relative(rounded[n], x)) for n, x in moved.items()}
    assert {n: pair for n, pair in off.items() if pair[0] > 1.3 * pair[1] + 5e-3} == {}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen 2, packed to 4 bits; it has a head of its own."""
    return save_tiny_quantized("qwen2", tmp_path_factory.mktemp("lm") / "qwen2-4bit")


def adapted(base: Path, *targets: str, dropout: float = 0.0) -> PretrainedSpec:
    adapter = AdapterSpec(find_linears(base, targets), rank=3, alpha=5.0, dropout=dropout)
    return PretrainedSpec(FrozenLM(base, 64, VOCAB, weights="resident"), adapter=adapter)


def built(name: str, spec: Spec, **runtime: Any) -> tuple[Any, Any]:
    """Backend and model, its adapters away from where nothing moves."""
    backend = backends.get(name, Runtime(device="cpu", **runtime))
    model, rng = backend.build(spec), np.random.default_rng(0)
    moved = {n: rng.normal(0, 0.1, p.shape).astype(np.float32) for n, p in spec.params().items() if ".lora_" in n}
    backend.load(model, backend.export(model) | initialise(spec, 0) | moved)
    return backend, model


def test_with_gradient_checkpointing_and_dropout(backend_name: str, uncompiled: None) -> None:
    """What is computed again has the dropout of the first time: in layers, and in none beside them."""
    spec = replace(SMALL, dropout=0.3)
    backend, model = built(backend_name, spec, gradient_checkpointing=True)
    plain_backend, plain = built(backend_name, spec)
    again, moved = steps(backend, spec, model, MOST)
    losses, expected = steps(plain_backend, spec, plain, MOST)
    assert again == pytest.approx(losses, rel=1e-6)
    assert changed(moved, expected, 1e-5) == []


def test_dropout_inside_the_head(untied: Path, backend_name: str, uncompiled: None) -> None:
    """Adapters on the head drop the same in both passes: a step changes the loss as its gradient says."""
    spec = adapted(untied, "lm_head", dropout=0.5)
    backend, model = built(backend_name, spec)
    model.head_chunks = MOST
    (batch,), start = batches(spec, 1), backend.export(model)
    step, losses = backend.make_step(model, lm, Optim("sgd", grad_clip_norm=None), seed=0), []
    for rate in (1e-3, -1e-3):  # the same step and so the same dropout, from the same place
        first = step([batch], step=1, lr={"lora": rate})
        losses.append(float(step([batch], step=1, lr={"lora": 0.0})["loss"]))
        backend.load(model, start)
    slope = -(losses[0] - losses[1]) / 2e-3
    assert slope == pytest.approx(float(first["grad_norm"]) ** 2, rel=0.02)


@pytest.mark.parametrize("task", ["train", "score"])
def test_no_more_logits_than_allowed(task: str, backend_name: str, uncompiled: None) -> None:
    """Of 8 x 228 labels and 2,000 words: 15 MB of logits. MLX has ten products under way at once."""
    spec = DecoderSpec(2000, 8, 8, 1, 1, 1, 8, context_length=256)
    tokens = np.random.default_rng(0).integers(0, 2000, (8, 229)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((8, 228), np.float32), np.full(8, 228, np.int32))
    peaks = []
    for most in (ALL_AT_ONCE, HeadChunks(100, 50)):
        backend, model = built(backend_name, spec)
        model.head_chunks = most
        step = backend.make_step(model, lm, Optim("sgd"), seed=0)
        with MEASURE[backend_name]() as peak:
            if task == "train":
                float(step([batch], step=1, lr={"model": 0.0})["loss"])
            else:
                backend.score_tokens(model, batch)
        peaks.append(peak[0])
    assert peaks[0] >= 8 * 228 * 2000 * 4 and peaks[1] < 10e6


@contextmanager
def _largest_of_torch() -> Iterator[list[int]]:
    """Bytes of the largest tensor that any operation makes, its gradients' too."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for x in made if isinstance(made, tuple | list) else [made]:
                if isinstance(x, torch.Tensor):
                    found[0] = max(found[0], x.numel() * x.element_size())
            return made

    with Largest():
        yield found


@contextmanager
def _peak_of_mlx() -> Iterator[list[int]]:
    import mlx.core as mx

    found: list[int] = []
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    yield found
    found.append(mx.get_peak_memory() - before)


MEASURE = {"torch": _largest_of_torch, "mlx": _peak_of_mlx}


def test_few_logits_are_made_at_once(backend_name: str) -> None:
    """Up to 2^26 nothing changes; the switch turns chunks off."""
    backend, model = built(backend_name, SMALL)
    most = MAX_LOGITS // VOCAB
    assert model.head_chunks == head_chunks(SMALL) == HeadChunks(most, most // 8)
    calls: list[tuple[int, ...]] = []
    head = model.head
    model.head = lambda h: calls.append(tuple(h.shape)) or head(h)
    (batch,) = batches(SMALL, 1)
    for model.head_chunks in (HeadChunks(76, 50), HeadChunks(75, 50)):
        backend.score(model, lm, batch)
    assert calls == [(*batch.targets.shape, 16), (50, 16), (26, 16)]
    assert built(backend_name, SMALL, chunked_head=False)[1].head_chunks is ALL_AT_ONCE


def test_a_large_vocabulary_has_chunks_of_some_size() -> None:
    """The weights of the head are read once for each chunk."""
    found = {v: head_chunks(replace(SMALL, vocab_size=v)) for v in (128_256, 2**20, 2**28)}
    assert found == {128_256: HeadChunks(523, 256), 2**20: HeadChunks(64, 64), 2**28: HeadChunks(1, 1)}
