"""Faults and look-alikes that no check was developed on: what the doctor does with them is measured, never tuned.

They differ from the catalogue in mechanism or in place: one layer, some rows, one group, one micro-batch, later steps.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.backend import Arrays, Step
from mlx_training.checkpoint import CheckpointStore
from mlx_training.data.batch import Batch
from mlx_training.data.prompt import Encoded, PromptEncoder
from mlx_training.data.rows import Row
from mlx_training.data.series import SeriesStats, pad_to
from mlx_training.diagnostics.causes import CAUSES
from mlx_training.diagnostics.subject import Subject
from mlx_training.objectives import Sums
from mlx_training.objectives.lm import lm
from tests.doctor.faults.base import (
    Fault,
    Lookalike,
    Plant,
    change_parameters,
    each_batch,
    edit,
    find,
    framework,
    freeze,
    hide,
    is_torch,
    override,
    rebuilt,
    rows_of,
    stop,
    take,
    train_rows,
    unfreeze,
    with_encoder,
    with_rows,
)
from tests.doctor.faults.gradients import slope
from tests.doctor.faults.runs import falling, rewrite
from tests.doctor.faults.steps_compiled import CompiledStep
from tests.doctor.faults.steps_numpy import NumpyStep
from tests.doctor.faults.update import around

HELDOUT: list[Fault] = []
HELDOUT_LOOKALIKES: list[Lookalike] = []


def fault(*causes: str, **fields: Any) -> Callable[[Plant], Plant]:
    """As `base.fault`, into HELDOUT."""

    def register(plant: Plant) -> Plant:
        assert causes and set(causes) <= set(CAUSES), causes
        HELDOUT.append(Fault(plant.__name__, plant.__doc__ or "", causes, plant, **fields))
        return plant

    return register


def lookalike(plant: Plant | None = None, *, case: str = "timeseries") -> Any:
    """As `base.lookalike`, into HELDOUT_LOOKALIKES."""
    if plant is None:
        return partial(lookalike, case=case)
    HELDOUT_LOOKALIKES.append(Lookalike(plant.__name__, plant.__doc__ or "", plant, case))
    return plant


# Data


def encoding(subject: Subject, kind: type[PromptEncoder]) -> None:
    """Rows become tokens by a subclass of PromptEncoder."""
    with_encoder(subject)
    subject.data.encoder.__class__ = kind  # type: ignore[union-attr]


def odd_batches(subject: Subject, change: Callable[[Batch], Batch]) -> None:
    """Every second micro-batch goes through `change`."""
    original = subject.batch
    subject.batch = lambda index: change(original(index)) if index % 2 else original(index)


@fault("labels_shifted")
def long_rows_shifted_once_more(subject: Subject) -> None:
    """Rows above a length take another path through the collator, which shifts their labels a second time."""
    typical = float(np.median(np.concatenate([subject.batch(i).lengths for i in range(12)])))

    def change(batch: Batch) -> Batch:
        targets, mask = batch.targets.copy(), batch.mask.copy()
        for b in np.flatnonzero(batch.lengths > typical):
            count = int(mask[b].sum())
            targets[b, : count - 1] = batch.targets[b, 1:count]
            mask[b, count - 1] = 0
        return edit(batch, targets=targets, mask=mask)

    each_batch(subject, change)


@fault("labels_swapped", case="decoder")
def windows_and_targets_of_two_workers(subject: Subject) -> None:
    """Inputs and targets come from two loaders, one of which turns every second batch round."""
    odd_batches(subject, lambda batch: edit(batch, targets=batch.targets[::-1].copy(), mask=batch.mask[::-1].copy()))


@fault("labels_swapped")
def answers_swapped_in_one_micro_batch(subject: Subject) -> None:
    """The second worker of the loader returns its labels in reverse order."""
    odd_batches(subject, lambda batch: edit(batch, targets=batch.targets[::-1].copy(), mask=batch.mask[::-1].copy()))


@fault("eos_missing")
def rows_of_one_importer_without_end(subject: Subject) -> None:
    """Rows of one of two sources have no end token: their last label is not supervised."""
    eos = subject.data.tokenizer.eos_id  # type: ignore[union-attr]

    def change(batch: Batch) -> Batch:
        affected = np.array([row % 2 == 1 for row in batch.rows])[:, None]
        return edit(batch, mask=batch.mask * ~(affected & (batch.targets == eos)))

    each_batch(subject, change)


@fault("bos_repeated")
def bos_before_the_answer(subject: Subject) -> None:
    """Only the answer is tokenised with special tokens, and its first label is a beginning of text."""

    class Doubled(PromptEncoder):
        def encode(self, row: Row, *, with_answer: bool = True, ablate: bool = False) -> Encoded:
            encoded = super().encode(row, with_answer=with_answer, ablate=ablate)
            if not with_answer:
                return encoded
            at, bos = encoded.prompt_length, self.tokenizer.bos_id
            places = np.insert(encoded.patch_place, at, 0)
            return replace(encoded, tokens=np.insert(encoded.tokens, at, bos or 0), patch_place=places)

    encoding(subject, Doubled)


@fault("prompt_supervised")
def labels_begin_two_tokens_early(subject: Subject) -> None:
    """The length of the prompt is counted without its last words, which become labels."""

    class Early(PromptEncoder):
        def encode(self, row: Row, *, with_answer: bool = True, ablate: bool = False) -> Encoded:
            encoded = super().encode(row, with_answer=with_answer, ablate=ablate)
            return replace(encoded, prompt_length=encoded.prompt_length - 2) if with_answer else encoded

    encoding(subject, Early)


@fault("padding_supervised")
def one_pad_behind_the_end(subject: Subject) -> None:
    """The range of labels is one too long: the first pad after the end token is a label."""

    def change(batch: Batch) -> Batch:
        targets, positions, mask = batch.targets.copy(), batch.positions.copy(), batch.mask.copy()
        for b, count in enumerate(batch.mask.sum(axis=1).astype(int)):
            if count < mask.shape[1] and batch.lengths[b] < batch.tokens.shape[1]:
                targets[b, count], positions[b, count], mask[b, count] = 0, batch.lengths[b] - 1, 1
        return edit(batch, targets=targets, positions=positions, mask=mask)

    each_batch(subject, change)


@fault("nothing_supervised")
def micro_batches_without_labels(subject: Subject) -> None:
    """Every second micro-batch has no label at all, since a filter looked for another answer prefix."""
    odd_batches(subject, lambda batch: edit(batch, mask=batch.mask * 0))


@fault("vocabulary_mismatch")
def added_token_in_some_rows(subject: Subject) -> None:
    """A special token that was added to the tokenizer stands in some prompts only."""
    size = subject.spec.llm.vocab_size  # type: ignore[attr-defined]

    def change(batch: Batch) -> Batch:
        tokens = batch.tokens.copy()
        tokens[[row % 8 == 2 for row in batch.rows], 2] = size
        return edit(batch, tokens=tokens)

    each_batch(subject, change)


@fault("vocabulary_mismatch")
def ignore_index_in_the_labels(subject: Subject) -> None:
    """Labels outside the mask are -100, which the loss of another framework would skip; here they are looked up."""
    each_batch(subject, lambda batch: edit(batch, targets=np.where(batch.mask > 0, batch.targets, -100)))


@fault("answer_truncated")
def answers_of_at_most_two_tokens(subject: Subject) -> None:
    """A limit on the answer's length cuts long answers; the end token is put behind what is left."""

    class Short(PromptEncoder):
        def encode(self, row: Row, *, with_answer: bool = True, ablate: bool = False) -> Encoded:
            encoded = super().encode(row, with_answer=with_answer, ablate=ablate)
            at = encoded.prompt_length + 2
            if not with_answer or len(encoded) <= at + 1:
                return encoded
            tokens = np.append(encoded.tokens[:at], np.int32(self.tokenizer.eos_id))
            return replace(encoded, tokens=tokens, patch_place=encoded.patch_place[: at + 1])

    encoding(subject, Short)


@fault("series_nonfinite")
def logarithm_of_a_zero_deviation(subject: Subject) -> None:
    """The scale features of some rows are NaN, while their samples are fine."""

    def change(batch: Batch) -> Batch:
        scale = batch.scale.copy()
        for row, first in zip(batch.rows, np.flatnonzero(batch.series_place == 0), strict=False):
            if row % 6 == 1:
                scale[first, 1] = np.nan
        return edit(batch, scale=scale)

    each_batch(subject, change)


@fault("series_not_normalized")
def statistics_of_the_whole_data_set(subject: Subject) -> None:
    """One mean and deviation for all rows, whose units differ by factors of a thousand."""
    values = np.concatenate([v for row in train_rows(subject) for v in row.series])
    mean, std = float(values.mean()), float(values.std())

    class Global(PromptEncoder):
        def _samples(self, values: np.ndarray, stats: SeriesStats, num_patches: int, ablate: bool) -> np.ndarray:
            samples = (values * (not ablate) - mean) / std
            return pad_to(samples.astype(np.float32), num_patches * self.patch_size)

    encoding(subject, Global)


@fault("series_not_normalized")
def second_series_raw(subject: Subject) -> None:
    """Only the first series of a row is normalised; the second keeps its unit."""

    class FirstOnly(PromptEncoder):
        def encode(self, row: Row, *, with_answer: bool = True, ablate: bool = False) -> Encoded:
            encoded = super().encode(row, with_answer=with_answer, ablate=ablate)
            raw = [pad_to(v * (not ablate), s.size) for v, s in zip(row.series, encoded.series, strict=True)]
            return replace(encoded, series=(*encoded.series[:1], *raw[1:]))

    encoding(subject, FirstOnly)


@fault("series_constant")
def series_of_one_type_missing(subject: Subject) -> None:
    """The files of one recording device were not found, and zeros stand in for all its series."""
    rows = train_rows(subject)
    kind = rows[0].type
    with_rows(
        subject,
        train=[replace(r, series=tuple(v * 0 for v in r.series)) if r.type == kind else r for r in rows],
    )


@fault("rows_duplicated")
def part_of_the_rows_twice(subject: Subject) -> None:
    """A retried download appended two fifths of the rows again under new ids and groups."""
    rows = train_rows(subject)
    again = [replace(row, id=f"again {i}", group=f"again {i}") for i, row in enumerate(rows[: len(rows) * 2 // 5])]
    with_rows(subject, train=[*rows, *again])


@fault("leakage")
def validation_rows_in_training(subject: Subject) -> None:
    """Another export of the validation rows, rounded to six digits and under other ids, went into training."""

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.array([float(f"{v:.6g}") for v in values], np.float32)

    leaked = [
        replace(row, id=f"x{row.id}", group=f"x{row.group}", series=tuple(map(rounded, row.series)))
        for row in rows_of(subject, "validation")
    ]
    with_rows(subject, train=[*train_rows(subject), *leaked])


@fault("patches_misplaced")
def second_slot_shows_the_first_series(subject: Subject) -> None:
    """The places of a row's second series are filled with patches of its first."""

    def change(batch: Batch) -> Batch:
        num_patches = batch.series.shape[1] // 4
        series = np.maximum(batch.patch_index - 1, 0) // num_patches
        first = np.maximum.accumulate(np.where(batch.series_place == 0, np.arange(len(batch.series_place)), 0))
        moved = batch.patch_index - (series - first[series]) * num_patches
        return edit(batch, patch_index=np.where(batch.patch_index > 0, moved, 0))

    each_batch(subject, change)


@fault("batches_repeat")
def iterator_advanced_once_a_step(subject: Subject) -> None:
    """Both micro-batches of a step are the same: the index counts steps."""
    original = subject.batch
    subject.batch = lambda index: original(index // 2)


@fault("batches_not_reproducible")
def augmentation_after_the_warm_up(subject: Subject) -> None:
    """Unseeded noise comes in at the sixth step only."""
    original, rng = subject.batch, np.random.default_rng()

    def batch(index: int) -> Batch:
        made = original(index)
        noise = 0.02 * rng.standard_normal(made.series.shape) * (made.series != 0)
        return made if index < 12 else edit(made, series=made.series + noise)

    subject.batch = batch


# Model


@fault("unregistered_parameters", where="encoder.layers.1.norm2")
def one_norm_unregistered(subject: Subject) -> None:
    """One norm of one layer is unknown to the framework; all else learns."""
    layer = subject.model.encoder.layers[1]
    if not is_torch(subject.model):
        return hide(layer, "norm2")
    values = layer.norm2.bias.detach().clone().requires_grad_(True)
    del layer.norm2.bias
    layer.norm2.bias = values
    return None


@fault("unexpected_parameters", where="lm_head", case="decoder")
def tied_head_untied_by_accident(subject: Subject) -> None:
    """A deep copy of the embedding is the head: the table ties them, and two matrices train apart."""
    model, f = subject.model, framework(subject.model)
    size, hidden = model.model.embed_tokens.weight.shape
    linear = f.nn.Linear if is_torch(model) else __import__("mlx.nn").nn.Linear
    model.lm_head = linear(hidden, size, bias=False)
    if is_torch(model):
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    else:
        model.lm_head.weight = model.model.embed_tokens.weight + 0
    override(model, lambda head, h: h @ model.lm_head.weight.T, "head")


@fault("frozen_parameters", where="embed_tokens", case="decoder")
def embedding_frozen(subject: Subject) -> None:
    """The embedding is frozen for fine-tuning, and this run starts from scratch."""
    freeze(subject.model.model.embed_tokens)


@fault("frozen_weights_trainable", where="lm.model.norm")
def norm_of_the_language_model_unfrozen(subject: Subject) -> None:
    """A rule that unfreezes everything called `norm` reaches one weight of the frozen language model."""
    unfreeze(subject.model.lm.model.norm)


@fault("frozen_weights_changed")
def frozen_norm_drifts_later(subject: Subject) -> None:
    """A moving average is written into the wrong module from the third step on."""

    def call(take: Step, batches: Sequence[Batch], **options: Any) -> dict[str, Any]:
        metrics = take(batches, **options)
        if options["step"] > 2:
            norm = subject.model.lm.model.norm
            if is_torch(norm):
                norm.weight.data.mul_(1.01)
            else:
                norm.weight = norm.weight * 1.01
        return metrics

    around(subject, call)


@fault("init_too_large", where="encoder.layers.1.self_attn.out_proj")
def one_matrix_ten_times_too_large(subject: Subject) -> None:
    """One matrix of one layer has ten times its initial values; the norm behind it hides that."""
    change_parameters(subject, lambda values: 10 * values, "encoder.layers.1.self_attn.out_proj.weight")


@fault("init_too_large", where="embed_tokens", case="decoder")
def embedding_with_the_library_default(subject: Subject) -> None:
    """The embedding starts at N(0, 1), the library's default, in place of N(0, 0.02)."""
    change_parameters(subject, lambda values: 50 * values, "embed_tokens")


@fault("init_zero", where="layers.1.self_attn", case="decoder")
def one_attention_starts_at_zero(subject: Subject) -> None:
    """Value and output projection of one layer both start at zero: that attention never learns."""
    change_parameters(subject, np.zeros_like, "layers.1.self_attn.v_proj")
    change_parameters(subject, np.zeros_like, "layers.1.self_attn.o_proj")


@fault("dead_activations", where="encoder.layers.0")
def bias_far_below_zero(subject: Subject) -> None:
    """After one step that was too long the biases of a feed-forward layer stand at -50."""
    change_parameters(subject, lambda values: values - 50, "encoder.layers.0.linear1.bias")
    subject.fresh = False


@fault("nonfinite_parameters", where="lm.model.norm")
def infinity_in_a_frozen_weight(subject: Subject) -> None:
    """A conversion to half precision overflowed in one number of the frozen language model."""
    norm = subject.model.lm.model.norm
    if is_torch(norm):
        norm.weight.data[3] = math.inf
    else:
        f = framework(norm.weight)
        norm.weight = f.where(f.arange(norm.weight.size) == 3, math.inf, norm.weight)


@fault("overflow", where="encoder.scale_in")
def scale_features_exponentiated_twice(subject: Subject) -> None:
    """Features that are logarithms already are taken for logarithms of logarithms: rows of large mean overflow."""

    def call(f: Any, x: Any) -> Any:
        x = x * 2
        return f(framework(x).exp(framework(x).exp(x)))

    override(subject.model.encoder.scale_in, call)


@fault("random_in_evaluation")
def one_dropout_stays_on(subject: Subject) -> None:
    """One dropout layer is not reached by eval(): it is kept outside the module tree's own switch."""
    dropout = subject.model.encoder.layers[1].dropout
    dropout.train()
    override(dropout, lambda train, mode=True: train(True), "train" if is_torch(dropout) else "_set_training_mode")


@fault("future_visible", case="decoder")
def causal_mask_missing_in_one_layer(subject: Subject) -> None:
    """The second layer alone attends without a mask."""
    override(subject.model.model.layers[1], lambda f, x, angles, mask, cache, i: f(x, angles, None, cache, i))


@fault("past_hidden", "realisation_differs", case="decoder", level="full")
def sliding_window_left_over(subject: Subject) -> None:
    """A window of two tokens is left from another configuration: nothing further back is seen."""

    def call(layer: Any, x: Any, angles: Any, mask: Any, cache: Any, i: int) -> Any:
        places = framework(x).arange(x.shape[1])
        query, key = places[:, None], places[None]
        return layer(x, angles, (key <= query) & (key > query - 2), cache, i)

    for layer in subject.model.model.layers:
        override(layer, call)


@fault("rows_mixed")
def one_layer_attends_over_all_series(subject: Subject) -> None:
    """The second encoder layer sees all series of the batch as one sequence."""

    def call(layer: Any, x: Any, mask: Any) -> Any:
        count, num_patches, size = x.shape
        joined = layer(x.reshape(1, count * num_patches, size), mask.reshape(1, 1, 1, count * num_patches))
        return joined.reshape(count, num_patches, size)

    override(subject.model.encoder.layers[1], call)


@fault("rows_mixed", case="decoder")
def decoder_batch_norm(subject: Subject) -> None:
    """The final norm takes its mean square over the rows of the batch."""
    norm = subject.model.model.norm
    override(norm, lambda _, x: x / ((x**2).mean(axis=(0, 2), keepdims=True) + 1e-5) ** 0.5 * norm.weight)


@fault("padding_attended")
def mask_missing_in_one_layer(subject: Subject) -> None:
    """One of two encoder layers attends to padding patches."""
    override(subject.model.encoder.layers[1], lambda layer, x, mask: layer(x, mask | True))


@fault("padding_attended")
def mean_pooling_over_padding(subject: Subject) -> None:
    """A summary of the series, averaged over all patches, padding included, is added to every patch."""
    override(subject.model.projector, lambda f, x: f(x + 0.3 * x.mean(axis=1, keepdims=True)))


def attention(module: Any, x: Any, mask: Any, *, scale: float | None = None, detached: bool = False) -> Any:
    """The encoder's attention by hand: another scale, or one head without gradient."""
    f, (count, num_patches, size) = framework(x), x.shape
    qkv = (x @ module.in_proj_weight.T + module.in_proj_bias).reshape(count, num_patches, 3, module.num_heads, -1)
    q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))
    scores = q @ k.swapaxes(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    y = f.softmax(f.where(mask, scores, -1e9), -1) @ v
    if detached:
        y = f.concatenate([stop(y[:, :1]), y[:, 1:]], 1)
    return module.out_proj(y.swapaxes(1, 2).reshape(count, num_patches, size))


@fault("realisation_differs", where="encoder.layers.1.self_attn", level="full")
def attention_not_scaled(subject: Subject) -> None:
    """Scores of one layer are not divided by the square root of the head's size."""
    module = subject.model.encoder.layers[1].self_attn
    override(module, lambda _, x, mask: attention(module, x, mask, scale=1.0))


@fault("realisation_differs", where="self_attn", case="decoder", level="full")
def rotary_base_of_another_model(subject: Subject) -> None:
    """Rotary angles are computed with base 500,000 where the table says 10,000."""
    model, spec = subject.model, replace(subject.spec, rope_theta=500000.0)  # type: ignore[call-arg]
    angles = spec.rope_frequencies()  # type: ignore[attr-defined]
    if is_torch(model):
        model.frequencies.copy_(framework(model).from_numpy(angles))
    else:
        model._frequencies = framework(model._frequencies).array(angles)


@fault("realisation_differs", where="model.layers.0.mlp", case="decoder", level="full")
def gate_and_up_exchanged(subject: Subject) -> None:
    """The activation is put on the wrong half of a gated feed-forward layer."""
    mlp = subject.model.model.layers[0].mlp

    def call(_: Any, x: Any) -> Any:
        up = mlp.up_proj(x)
        return mlp.down_proj(up * framework(x).sigmoid(up) * mlp.gate_proj(x))

    override(mlp, call)


# Gradients and objectives


@fault("disconnected", "gradient_wrong")
def one_head_detached(subject: Subject) -> None:
    """One attention head of one layer is cut off the gradient, for the sake of a picture of its scores."""
    module = subject.model.encoder.layers[0].self_attn
    override(module, lambda _, x, mask: attention(module, x, mask, detached=True))


@fault("gradient_wrong")
def residual_branch_detached(subject: Subject) -> None:
    """The residual around one feed-forward block has no gradient: everything gets some, and too little."""
    layer = subject.model.encoder.layers[1]

    def call(_: Any, x: Any, mask: Any) -> Any:
        x = layer.norm1(x + layer.dropout(layer.self_attn(x, mask)))
        h = layer.linear1(x)
        gelu = framework(h).nn.functional.gelu(h) if is_torch(h) else __import__("mlx.nn").nn.gelu(h)
        return layer.norm2(stop(x) + layer.dropout(layer.linear2(layer.dropout(gelu))))

    override(layer, call)


@fault("gradient_wrong", where="encoder.layers.0.linear1")
def gradient_halved_in_one_layer(subject: Subject) -> None:
    """A straight-through estimator around one layer halves what passes."""
    override(find(subject.model, "encoder.layers.0.linear1"), lambda f, x: slope(f(x), 0.5))


@fault("gradient_wrong", case="decoder", where="embed_tokens")
def embeddings_detached_at_the_input(subject: Subject) -> None:
    """Tied embeddings get the gradient of the head only: the lookup is detached."""
    override(subject.model, lambda inputs, batch: stop(inputs(batch)), "inputs")


@fault("disconnected", where="encoder.scale_in")
def features_without_gradient(subject: Subject) -> None:
    """The small network for the scale of a series runs under no_grad."""
    override(subject.model.encoder.scale_in, lambda f, x: stop(f(x)))


@fault("no_influence", "dead_activations", where="encoder.scale_out")
def features_masked_out(subject: Subject) -> None:
    """The scale of a series is multiplied by a switch that is off."""
    override(subject.model.encoder.scale_out, lambda f, x: f(x) * 0)


@fault("no_influence", "dead_activations", where="layers.1.mlp", case="decoder")
def feed_forward_not_added(subject: Subject) -> None:
    """The second layer returns after its attention."""
    override(subject.model.model.layers[1].mlp, lambda f, x: x * 0)


@fault("gradient_nonfinite")
def where_over_a_square_root(subject: Subject) -> None:
    """where(x > 0, sqrt(x), 0): the value is fine, and the branch not taken has a gradient of NaN."""

    def call(projector: Any, x: Any) -> Any:
        y = projector(x)
        return y + 0.01 * framework(y).where(y > 0, y**0.5, y * 0)

    override(subject.model.projector, call)


@fault("loss_nonfinite")
def logarithm_of_the_mask(subject: Subject) -> None:
    """An entropy term takes log of weights that are zero at padded labels: 0 * log 0."""

    def objective(model: Any, batch: Batch) -> Sums:
        sums = lm(model, batch)
        return {**sums, "loss": sums["loss"] - (batch.mask * framework(batch.mask).log(batch.mask)).sum()}

    subject.objective = objective


@fault("gradient_vanishing", where="layers.1.mlp", case="decoder")
def layer_scale_far_too_small(subject: Subject) -> None:
    """The learnable scale of a branch was set to 1e-8 in place of 1e-2."""
    override(subject.model.model.layers[1].mlp, lambda f, x: 1e-8 * f(x))


@fault("initial_loss")
def forbidden_token_preferred(subject: Subject) -> None:
    """The bias that should forbid a token has the wrong sign."""

    def call(head: Any, h: Any) -> Any:
        logits = head(h)
        return logits + 30.0 * (framework(h).arange(logits.shape[-1]) == 2)

    override(subject.model, call, "head")


@fault("weight_not_count", "initial_loss")
def loss_times_batch_size(subject: Subject) -> None:
    """The sum of losses is multiplied by the number of rows, to undo a mean that nobody took."""
    subject.objective = lambda model, batch: {
        **lm(model, batch),
        "loss": lm(model, batch)["loss"] * batch.targets.shape[0],
    }


@fault("weight_not_count")
def padding_counted(subject: Subject) -> None:
    """The weight is the number of label places, padding included."""
    subject.objective = lambda model, batch: {**lm(model, batch), "weight": (batch.mask * 0 + 1).sum()}


@fault("weight_not_count", case="decoder")
def mean_over_rows(subject: Subject) -> None:
    """Every row's loss is divided by its own length, and the weight is still the number of tokens."""

    def objective(model: Any, batch: Batch) -> Sums:
        each = -(model.logprobs(batch) * batch.mask).sum(axis=1) / batch.mask.sum(axis=1)
        return {"loss": each.mean(), "weight": batch.mask.sum()}

    subject.objective = objective


@fault("full_logits", case="timeseries")
def softmax_of_every_place(subject: Subject) -> None:
    """Log-probabilities of all places are made first, and label places are picked at the very end."""

    def objective(model: Any, batch: Batch) -> Sums:
        logits = model.head(model.hidden(model.inputs(batch)))
        table = logits - framework(logits).logsumexp(logits, -1)[..., None]
        chosen = take(take(table, batch.positions[..., None], 1), batch.targets[..., None], -1)[..., 0]
        return {"loss": -(chosen * batch.mask).sum(), "weight": batch.mask.sum()}

    subject.objective = objective


@fault("recompiles", backends=("mlx",))
def series_of_every_width(subject: Subject) -> None:
    """Series are padded to a width that differs from batch to batch."""
    original = subject.batch

    def batch(index: int) -> Batch:
        made = original(index)
        old, new = made.series.shape[1] // 4, made.series.shape[1] // 4 + index % 5
        moved = made.patch_index - 1
        moved = np.where(made.patch_index > 0, moved // old * new + moved % old + 1, 0)
        labels = ((0, 0), (0, index % 23))
        wide = {name: np.pad(getattr(made, name), labels) for name in ("targets", "positions", "mask")}
        return edit(made, series=np.pad(made.series, ((0, 0), (0, 4 * (new - old)))), patch_index=moved, **wide)

    subject.batch = batch


# Updates


def stepping(subject: Subject, kind: type[NumpyStep]) -> None:
    """Steps of a subclass of NumpyStep."""
    subject.make_step = kind


@fault("norm_misreported")
def norm_of_the_last_micro_batch(subject: Subject) -> None:
    """The norm is taken of the gradient that came last, not of the sum."""

    class Own(NumpyStep):
        def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
            self.last = super().gradients(batches[-1:], weights[-1:])
            return super().gradients(batches, weights)

        def reported(self, norm: float, gradients: Arrays) -> float:
            return math.sqrt(sum(float((g**2).sum()) for g in self.last.values()))

    stepping(subject, Own)


@fault("norm_misreported")
def norm_without_its_root(subject: Subject) -> None:
    """The sum of squares is reported."""

    class Own(NumpyStep):
        def reported(self, norm: float, gradients: Arrays) -> float:
            return norm**2

    stepping(subject, Own)


@fault("clip_wrong", "clip_ignored")
def clipped_at_ten_times_the_limit(subject: Subject) -> None:
    """The limit is 10 where the configuration says 1."""
    limit = 10 * (subject.optim.grad_clip_norm or 1.0)
    subject.make_step = lambda s: replace(s, optim=replace(s.optim, grad_clip_norm=limit)).default_step()


@fault("clip_wrong")
def clipped_by_group(subject: Subject) -> None:
    """Encoder, projector and head are clipped apart, each by its own norm."""

    class Own(NumpyStep):
        def clipped(self, gradients: Arrays, norm: float) -> Arrays:
            result: Arrays = {}
            for group in dict.fromkeys(param.group for param in self.table.values()):
                part = {name: g for name, g in gradients.items() if self.table[name].group == group}
                result |= super().clipped(part, math.sqrt(sum(float((g**2).sum()) for g in part.values())))
            return result

    stepping(subject, Own)


@fault("learning_rate_wrong")
def rates_of_two_groups_swapped(subject: Subject) -> None:
    """Encoder and projector get each other's learning rate."""
    around(
        subject,
        lambda take, batches, lr, **options: take(
            batches, lr={**lr, "encoder": lr["projector"], "projector": lr["encoder"]}, **options
        ),
    )


@fault("learning_rate_wrong")
def rate_read_once(subject: Subject) -> None:
    """The rate of the first step is captured by the closure and used for ever."""

    def make(s: Subject) -> Any:
        step = original(s)
        first: dict[str, Any] = {}

        def call(batches: Sequence[Batch], *, lr: dict[str, float], **options: Any) -> dict[str, Any]:
            first.setdefault("lr", dict(lr))
            return step(batches, lr=first["lr"], **options)

        class Once:
            def __getattr__(self, name: str) -> Any:
                return getattr(step, name)

            def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
                return call(*args, **kwargs)

        return Once()

    original = subject.make_step
    subject.make_step = make


@fault("learning_rate_zero")
def schedule_counts_epochs(subject: Subject) -> None:
    """The schedule was given the number of epochs as its length: from step 12 on the rate is zero."""
    rates = subject.rates
    subject.rates = lambda step: {group: rate * max(0.0, 1 - step / 12) for group, rate in rates(step).items()}


@fault("update_wrong")
def decay_twice(subject: Subject) -> None:
    """Both the optimiser and a hook of the trainer apply weight decay."""

    class Own(NumpyStep):
        def updated(self, name: str, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
            return super().updated(name, value, gradient, rate) - rate * self.decay(name) * value

    stepping(subject, Own)


@fault("update_wrong")
def decay_without_the_rate(subject: Subject) -> None:
    """Weights are multiplied by 1 - decay / 10 whatever the learning rate is."""

    class Own(NumpyStep):
        def updated(self, name: str, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
            return value * (1 - 0.1 * self.decay(name)) - rate * self.direction(name, gradient)

    stepping(subject, Own)


@fault("decay_ignored", where="projector")
def decay_of_one_group_lost(subject: Subject) -> None:
    """The group of the projector is made without weight_decay."""

    class Own(NumpyStep):
        def decay(self, name: str) -> float:
            return 0.0 if "projector" in name else super().decay(name)

    stepping(subject, Own)


@fault("decay_everywhere", where="pos_embed")
def positions_decay_too(subject: Subject) -> None:
    """The rule `more than one dimension` lets the learned positions decay, which the table exempts."""

    class Own(NumpyStep):
        def decay(self, name: str) -> float:
            return self.optim.weight_decay if len(self.table[name].shape) > 1 else 0.0

    stepping(subject, Own)


@fault("update_wrong")
def momentum_of_another_size(subject: Subject) -> None:
    """beta1 is 0.5, left from a GAN."""

    class Own(NumpyStep):
        def betas(self) -> tuple[float, float]:
            return 0.5, super().betas()[1]

    stepping(subject, Own)


@fault("update_wrong")
def epsilon_inside_the_root(subject: Subject) -> None:
    """sqrt(v + eps) in place of sqrt(v) + eps."""

    class Own(NumpyStep):
        def direction(self, name: str, gradient: np.ndarray) -> np.ndarray:
            super().direction(name, gradient)
            first, second = self.corrections()
            return (self.m[name] / first) / np.sqrt(self.v[name] / second + self.optim.eps)

    stepping(subject, Own)


@fault("no_bias_correction", "update_wrong")
def second_moment_not_corrected(subject: Subject) -> None:
    """Only the first moment is divided by its correction."""

    class Own(NumpyStep):
        def corrections(self) -> tuple[float, float]:
            return super().corrections()[0], 1.0

    stepping(subject, Own)


@fault("update_wrong")
def state_in_half_precision(subject: Subject) -> None:
    """Moments are kept in float16, where squares of small gradients are zero."""

    class Own(NumpyStep):
        def direction(self, name: str, gradient: np.ndarray) -> np.ndarray:
            super().direction(name, gradient)
            for moments in (self.m, self.v):
                moments[name] = moments[name].astype(np.float16).astype(np.float64)
            first, second = self.corrections()
            return (self.m[name] / first) / (np.sqrt(self.v[name] / second) + self.optim.eps)

    stepping(subject, Own)


@fault("state_lost", "update_wrong")
def second_moment_lost(subject: Subject) -> None:
    """The second moment is not part of the state that is handed on: every step starts it at zero."""

    class Own(NumpyStep):
        def direction(self, name: str, gradient: np.ndarray) -> np.ndarray:
            self.v[name] = self.v[name] * 0
            return super().direction(name, gradient)

    stepping(subject, Own)


@fault("ascent", "update_wrong")
def one_group_goes_up(subject: Subject) -> None:
    """An adversarial experiment left the sign of the encoder's update reversed."""

    class Own(NumpyStep):
        def direction(self, name: str, gradient: np.ndarray) -> np.ndarray:
            return super().direction(name, gradient) * (-1 if name.startswith("encoder") else 1)

    stepping(subject, Own)


@fault("accumulation_wrong")
def first_micro_batch_twice(subject: Subject) -> None:
    """The gradient of the first micro-batch is the start of the sum, and is added once more."""

    class Own(NumpyStep):
        def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
            total, scale = super().gradients(batches, weights), weights[0] / sum(weights)
            first = super().gradients(batches[:1], weights[:1])
            return {name: g + scale * first[name] * (len(batches) > 1) for name, g in total.items()}

    stepping(subject, Own)


@fault("micro_batches_dropped")
def first_micro_batch_only(subject: Subject) -> None:
    """Loss and count are of all micro-batches, the gradient of the first alone."""

    class Own(NumpyStep):
        def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
            return super().gradients(batches[:1], weights[:1])

    stepping(subject, Own)


@fault("gradients_accumulate", where="projector")
def one_group_never_cleared(subject: Subject) -> None:
    """zero_grad is called on the encoder's optimiser, and the projector has its own."""

    class Own(NumpyStep):
        total: Arrays = {}

        def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
            new = super().gradients(batches, weights)
            old = {name: g for name, g in self.total.items() if "projector" in name}
            self.total = {name: g + old.get(name, 0.0) for name, g in new.items()}
            return self.total

    stepping(subject, Own)


@fault("update_discarded")
def no_update_after_the_second_step(subject: Subject) -> None:
    """The model is copied for evaluation after two steps, and training goes on with the copy."""

    class Own(NumpyStep):
        def write(self, arrays: Arrays) -> None:
            if self.taken <= 2:
                super().write(arrays)

    stepping(subject, Own)


@fault("update_discarded", where="encoder.layers.1.linear2")
def one_matrix_never_written(subject: Subject) -> None:
    """A name is misspelt when new parameters are written back: one matrix stays as it was."""

    class Own(NumpyStep):
        def write(self, arrays: Arrays) -> None:
            name = "encoder.layers.1.linear2.weight"
            super().write({**arrays, name: self.backend.export(self.model)[name]})

    stepping(subject, Own)


@fault("compiled_differs", backends=("mlx",))
def step_count_is_a_constant(subject: Subject) -> None:
    """The number of steps is no input of mx.compile: bias correction stays at the first step."""

    class Own(CompiledStep):
        def run(self, arrays: list[dict[str, Any]], rates: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            import mlx.core as mx

            if not hasattr(self, "constant"):
                count = self.taken
                step = lambda state, arrays, rates: self.take([*state, count], arrays, rates)  # noqa: E731
                self.constant = mx.compile(step, mx.random.state, mx.random.state)
            return self.constant(self.state()[:3], arrays, rates)

    subject.make_step = Own


@fault("resume_differs", level="full")
def moments_loaded_into_the_neighbour(subject: Subject) -> None:
    """Moments are matched by order and shape: those of two norms are exchanged."""

    class Own(NumpyStep):
        def load(self, arrays: Arrays) -> None:
            def other(name: str) -> str:
                for a, b in (("norm1", "norm2"), ("norm2", "norm1")):
                    if a in name:
                        return name.replace(a, b)
                return name

            super().load({name: arrays[other(name)] for name in arrays})

    stepping(subject, Own)


@fault("resume_differs", level="full")
def second_moments_saved_in_half(subject: Subject) -> None:
    """The exported second moments are float16: small ones come back as zero."""

    class Own(NumpyStep):
        def export(self) -> Arrays:
            half = super().export().items()
            return {n: a.astype(np.float16).astype(np.float32) if n.endswith(".v") else a for n, a in half}

    stepping(subject, Own)


# Trained models and runs


@fault("series_ignored", "dead_activations", "no_influence", case="trained", level="full")
def series_pooled_to_nothing(subject: Subject) -> None:
    """Patches are centred over the places of a series and then averaged: all of them are zero."""

    def call(projector: Any, x: Any) -> Any:
        centred = x - x.mean(axis=1, keepdims=True)
        return projector(centred.mean(axis=1, keepdims=True) + 0 * x)

    override(subject.model.projector, call)


@fault("loss_nonfinite", case="run")
def evaluation_is_nan(run: Path) -> None:
    """Training is fine; one evaluation row makes every evaluation NaN."""
    rewrite(run, falling, lambda step: math.nan)


@fault("loss_flat", case="run")
def loss_rises(run: Path) -> None:
    """The loss climbs slowly from its first value."""
    rewrite(run, lambda step: 5.9 + step / 150 + 0.03 * float(np.random.default_rng(step).standard_normal()))


@fault("loss_spikes", case="run")
def loss_jumps_and_stays(run: Path) -> None:
    """After two thirds of the run the loss jumps back to where it began, and stays."""
    rewrite(run, lambda step: falling(step) if step < 150 else 5.9 + 0.05 * math.sin(step))


@fault("overfitting", case="run")
def evaluation_turns_late(run: Path) -> None:
    """Evaluation improves for half the run, then rises by a half."""
    rewrite(run, lambda step: 0.05 + 5.9 * math.exp(-step / 40), lambda step: 1.0 + abs(step - 100) / 180)


@fault("checkpoint_damaged", case="run")
def optimizer_file_missing(run: Path) -> None:
    """Large files were left out of the copy: the optimiser's state is gone."""
    for path in run.glob("checkpoints/step_*/optimizer.safetensors"):
        path.unlink()


@fault("checkpoint_damaged", case="run")
def configuration_of_another_size(run: Path) -> None:
    """config.yaml was edited after the run: its encoder has other sizes than the checkpoint."""
    config = run / "config.yaml"
    text = config.read_text()
    assert "ffn_size: 32" in text
    config.write_text(text.replace("ffn_size: 32", "ffn_size: 48"))


@fault("nonfinite_parameters", "checkpoint_damaged", case="run", where="projector")
def one_nan_in_the_checkpoint(run: Path) -> None:
    """A single number of the saved projector is NaN, under a valid checksum."""
    store = CheckpointStore(run)
    last = store.load("latest")
    spoilt = dict(last.model)
    spoilt["projector.norm.weight"] = np.where(np.arange(16) == 5, np.nan, spoilt["projector.norm.weight"])
    spoilt["projector.norm.weight"] = spoilt["projector.norm.weight"].astype(np.float32)
    state = {key: value for key, value in last.state.items() if key != "step"}
    store.save(last.step, spoilt, last.optimizer, state, best=True, keep=1)


# Look-alikes


def answered(subject: Subject, answer: Callable[[str], str]) -> None:
    """Other answers in every split."""

    def changed(rows: Iterable[Row]) -> list[Row]:
        return [replace(r, answer=answer(r.answer), options=tuple(map(answer, r.options))) for r in rows]

    with_rows(subject, **{split: changed(rows_of(subject, split)) for split in ("train", "validation", "test")})


@lookalike
def letters_as_answers(subject: Subject) -> None:
    """Answers are single letters."""
    options = train_rows(subject)[0].options
    answered(subject, lambda text: "ABC"[options.index(text)])


@lookalike
def long_explanations(subject: Subject) -> None:
    """Answers are explanations, many times longer than the question."""
    answered(subject, lambda text: f"The teeth rise and fall along the whole of the series. {text}. " * 4)


@lookalike
def outliers_in_some_series(subject: Subject) -> None:
    """One sample of some series is fifty times the rest: a spike that was measured."""

    def spike(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[4] += 50 * values.std()
        return values

    rows = train_rows(subject)
    with_rows(
        subject,
        train=[replace(r, series=tuple(map(spike, r.series))) if i % 4 == 0 else r for i, r in enumerate(rows)],
    )


@lookalike
def small_wave_on_a_large_offset(subject: Subject) -> None:
    """Series of pressure in pascal: a mean of 101,325 and a deviation of a few."""
    rows = train_rows(subject)
    moved = [replace(r, series=tuple((v / v.std() * 3 + 101325).astype(np.float32) for v in r.series)) for r in rows]
    with_rows(subject, train=moved)


@lookalike
def own_betas(subject: Subject) -> None:
    """betas (0.9, 0.95) and a limit of 0.5, as many language models are trained."""
    subject.optim = replace(subject.optim, betas=(0.9, 0.95), grad_clip_norm=0.5)


@lookalike
def no_warm_up_and_constant_rate(subject: Subject) -> None:
    """One rate for all groups from the first step to the last."""
    rates = subject.rates
    subject.rates = lambda step: dict.fromkeys(rates(step), 5e-3)


@lookalike
def rows_without_series(subject: Subject) -> None:
    """Every fourth row is a plain question, replayed so that the language is not forgotten."""
    rows = train_rows(subject)
    plain = [
        replace(r, series=(), series_text=(), pre_prompt=f"Note {i}: the answer is {r.answer}.") if i % 4 == 0 else r
        for i, r in enumerate(rows)
    ]
    with_rows(subject, train=plain)


@lookalike
def trained_norms(subject: Subject) -> None:
    """After long training norms have weights between 0.2 and 2.6 and biases that are not zero."""
    change_parameters(subject, lambda v: v * (0.2 + 2.4 * np.linspace(0, 1, v.size)), "norm1.weight")
    change_parameters(subject, lambda v: v + 0.5 * np.sin(np.arange(v.size)), "norm2.bias")
    subject.fresh = False


@lookalike(case="decoder")
def no_grouped_heads(subject: Subject) -> Subject:
    """As many key heads as heads, and a longer context."""
    return rebuilt(subject, {"model.decoder.num_kv_heads": 2, "model.decoder.context_length": 48})


@lookalike(case="run")
def noisy_and_short(run: Path) -> None:
    """A short run with large noise whose loss falls by a third."""
    path = run / "metrics.jsonl"
    noise = np.random.default_rng(0).standard_normal(60)
    rewrite(run, lambda step: 6 - step / 30 + 0.25 * noise[step - 1], lambda step: 6 - step / 32, steps=60)
    assert all(json.loads(line) for line in path.read_text().splitlines())
