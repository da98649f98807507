"""Unseen faults in the model."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_training.backend import Step
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.base import (
    change_parameters,
    framework,
    freeze,
    hide,
    is_torch,
    override,
    stop,
    unfreeze,
)
from tests.doctor.faults.heldout.registry import fault
from tests.doctor.faults.model import masked
from tests.doctor.faults.update import around


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
    masked(subject, lambda query, key: key == key, first_layer=1)


@fault("past_hidden", "realisation_differs", case="decoder", level="full")
def sliding_window_left_over(subject: Subject) -> None:
    """A window of two tokens is left from another configuration: nothing further back is seen."""
    masked(subject, lambda query, key: (key <= query) & (key > query - 2))


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
