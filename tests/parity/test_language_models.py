"""What every language model owes: no look into the future, documents that do not see each other, balanced experts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_training.data.batch import Batch
from mlx_training.environment import installed_backends
from mlx_training.objectives.balanced import balanced_lm
from mlx_training.objectives.lm import lm
from mlx_training.spec import DecoderSpec, ExpertsSpec
from tests.parity.cases import CASES, MASKED, VOCAB, batches, realise, specs

LANGUAGE_MODELS = [case for case in CASES if not case.startswith("timeseries") and case not in MASKED]
PACKABLE = [case for case in CASES if case.startswith("decoder") and "fixed" not in case]
BY_FOURIER = ("ssm-s4d", "ssm-stu-local")  # a fast Fourier transform spreads its rounding over all places
BACKENDS = list(installed_backends())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LANGUAGE_MODELS)
def test_no_gradient_from_the_future(backend: str, case: str, directory: Path) -> None:
    spec = specs(directory)[case]
    (batch,) = batches(spec, 1)
    one_place = np.zeros_like(batch.mask)
    one_place[:, 9] = 1
    chosen, model = realise(backend, spec)
    gradient = chosen.gradients(model, lm, replace(batch, mask=one_place), wrt="inputs")["inputs"]
    norms_L = np.linalg.norm(gradient, axis=(0, 2))
    rounding = 1e-6 * norms_L[9] if case in BY_FOURIER else 0
    assert norms_L[9] > 0 and norms_L[10:].max() <= rounding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("case", MASKED)
def test_hidden_tokens_are_told_from_both_sides(backend: str, with_documents: bool, case: str, directory: Path) -> None:
    """By gradient: from every token of the row's own document, and from no padding, row or document beside it."""
    spec = specs(directory)[case]
    (batch,) = batches(spec, 1)
    (B, L), b = batch.tokens.shape, 0
    own = np.arange(L) < batch.lengths[b]
    if with_documents:
        segments = (np.arange(L) >= 5).astype(np.int32) + (np.arange(L) >= batch.lengths[:, None])
        batch, own = (
            replace(batch, segments=segments.astype(np.int32)),
            segments[b] == segments[b, batch.positions[b, 0]],
        )
    one_label = np.zeros_like(batch.mask)
    one_label[b, 0] = 1
    chosen, model = realise(backend, spec)
    gradient = chosen.gradients(model, lm, replace(batch, mask=one_label), wrt="inputs")["inputs"]
    seen_BL = np.abs(gradient).max(-1) > 0
    assert batch.lengths[b] < L and own.sum() < L
    np.testing.assert_array_equal(seen_BL, (np.arange(B) == b)[:, None] & own)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PACKABLE)
def test_packed_documents_are_what_they_are_alone(backend: str, case: str, directory: Path) -> None:
    chosen, model = realise(backend, specs(directory)[case])
    rng = np.random.default_rng(3)
    documents = [rng.integers(3, VOCAB, length).astype(np.int32) for length in (9, 3, 7)]
    alone = [chosen.score(model, lm, windows([document])) for document in documents]
    packed = chosen.score(model, lm, windows(documents))
    assert packed["weight"] == sum(sums["weight"] for sums in alone)
    assert packed["loss"] == pytest.approx(sum(sums["loss"] for sums in alone), rel=1e-6)


def windows(documents: list[np.ndarray]) -> Batch:
    """One row of documents, each predicting its own next tokens only."""
    tokens = np.concatenate([document[:-1] for document in documents])[None]
    targets = np.concatenate([document[1:] for document in documents])[None]
    segments = np.repeat(np.arange(len(documents)), [len(document) - 1 for document in documents])[None]
    mask, lengths = np.ones(tokens.shape, np.float32), np.array([tokens.size], np.int32)
    return Batch(tokens, targets, mask, lengths, segments=segments.astype(np.int32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_that_are_alike_are_one_layer(backend: str) -> None:
    dense = DecoderSpec(VOCAB, hidden_size=32, intermediate_size=48, num_layers=2, head_dim=8, init_std=0.1)
    spec = replace(dense, experts=ExpertsSpec(4, 3, balance=0.5))
    (batch,) = batches(spec, 1)
    chosen, one = realise(backend, dense)
    _, many = realise(backend, spec)
    arrays = chosen.export(one)
    stacked = chosen.export(many)
    for name, array in arrays.items():
        stacked[name] = np.stack([array] * 4) if ".mlp." in name else array
    chosen.load(many, stacked)
    expected = chosen.score(one, lm, batch)
    assert chosen.score(many, lm, batch)["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    balance = chosen.score(many, balanced_lm, batch)["loss"] - expected["loss"]
    assert 0.5 * expected["weight"] <= balance <= 4 * 0.5 * expected["weight"]  # 1 where all are used alike, at most E


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_are_those_of_the_router(backend: str) -> None:
    """Against plain NumPy: the two largest of four, softmax over those two."""
    spec = DecoderSpec(VOCAB, hidden_size=8, intermediate_size=6, num_layers=1, head_dim=4, experts=ExpertsSpec(4, 2))
    chosen, model = realise(backend, spec)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(array.shape).astype(np.float32) for name, array in chosen.export(model).items()}
    chosen.load(model, arrays)
    (batch,) = batches(spec, 1)
    outputs = chosen.activations(model, lm, batch)
    x = outputs["model.layers.0.post_attention_layernorm"]
    router, gate, up, down = (
        arrays[f"model.layers.0.mlp.{part}.weight"] for part in ("router", "gate_proj", "up_proj", "down_proj")
    )
    scores = x @ router.T
    order = np.argsort(-scores, axis=-1)[..., :2]
    weights = np.exp(np.take_along_axis(scores, order, -1) - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    hidden = np.einsum("blh,efh->blef", x, gate)
    inner = hidden / (1 + np.exp(-hidden)) * np.einsum("blh,efh->blef", x, up)
    all_experts = np.einsum("blef,ehf->bleh", inner, down)
    expected = (np.take_along_axis(all_experts, order[..., None], 2) * weights[..., None]).sum(2)
    np.testing.assert_allclose(outputs["model.layers.0.mlp"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LANGUAGE_MODELS)
def test_decoding_is_the_whole_forward_pass(backend: str, case: str, directory: Path) -> None:
    """Prompts of different lengths side by side, then four known tokens, against every row alone."""
    chosen, model = realise(backend, specs(directory)[case])
    rng = np.random.default_rng(5)
    rows = [rng.integers(3, VOCAB, length + 4).astype(np.int32) for length in (9, 1, 14, 5)]
    lengths = np.array([len(row) - 4 for row in rows], np.int32)
    prompts = np.full((len(rows), lengths.max() + 2), 77, np.int32)
    for padded, row in zip(prompts, rows, strict=True):
        padded[: len(row) - 4] = row[:-4]
    unlabelled = np.zeros(prompts.shape, np.int32)
    session = chosen.session(model)
    steps = [session.prefill(Batch(prompts, unlabelled, unlabelled.astype(np.float32), lengths))]
    for i in range(-4, 0):
        if i == -2:
            session = session.fork(range(len(rows)))
        steps.append(session.extend(np.array([row[i] for row in rows])))
    for row, decoded in zip(rows, np.stack(steps, axis=1), strict=True):
        alone = np.zeros((1, len(row)), np.int32)
        batch = Batch(row[None], alone, alone.astype(np.float32), np.array([len(row)], np.int32))
        whole = np.asarray(model.logits(chosen.to_device(batch)).tolist())[0, -5:]
        np.testing.assert_allclose(decoded, whole, atol=2e-5)
