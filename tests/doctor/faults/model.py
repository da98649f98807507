"""Broken models: registration, initial values, attention, realisation."""

from dataclasses import replace
from typing import Any

import numpy as np

from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.base import (
    cast,
    change_parameters,
    fault,
    find,
    framework,
    freeze,
    hide,
    is_torch,
    override,
    relu,
    set_parameter,
    unfreeze,
)


@fault("unregistered_parameters", where="encoder.layers")
def layers_in_a_plain_container(subject: Subject) -> None:
    """Layers stand in a container the framework does not look into: a list in PyTorch, a tuple in MLX."""
    encoder = subject.model.encoder
    layers = list(encoder.layers)
    if is_torch(subject.model):
        del encoder.layers
    encoder.layers = layers if is_torch(subject.model) else tuple(layers)


@fault("unregistered_parameters", where="projector", backends=("mlx",))
def projector_in_a_private_attribute(subject: Subject) -> None:
    """MLX takes attributes with a leading underscore for no parameters."""
    hide(subject.model, "projector")


@fault("unregistered_parameters", where="encoder.patch_embed", backends=("mlx",))
def patch_embedding_in_a_private_attribute(subject: Subject) -> None:
    """One module of many is called `_conv`; the rest learns, so nobody notices."""
    hide(subject.model.encoder, "patch_embed")


@fault("unregistered_parameters", where="pos_embed", backends=("torch",))
def positions_without_parameter(subject: Subject) -> None:
    """A tensor with requires_grad is assigned to the module without nn.Parameter."""
    encoder = subject.model.encoder
    values = encoder.pos_embed.detach().clone()
    del encoder.pos_embed
    encoder.pos_embed = values.requires_grad_(True)


@fault("unexpected_parameters", where="projector.extra")
def module_that_is_in_no_table(subject: Subject) -> None:
    """A head of an earlier experiment is still in the model, trains, and is in no checkpoint."""
    linear = type(subject.model.encoder.scale_in)
    subject.model.projector.extra = linear(16, 8)


@fault("misshaped_parameters", where="pos_embed")
def positions_of_another_length(subject: Subject) -> None:
    """The checkpoint was made with 2,600 positions, the specification says 1,024."""
    shape = subject.spec.params()["encoder.pos_embed"].shape
    set_parameter(subject.model, "encoder.pos_embed", np.full((1, 2 * shape[1], shape[2]), 0.1, np.float32))


@fault("frozen_parameters", where="encoder")
def encoder_frozen(subject: Subject) -> None:
    """The whole model is frozen for the language model's sake, and only the projector is unfrozen again."""
    freeze(subject.model.encoder)


@fault("frozen_parameters", where="norm")
def norms_frozen(subject: Subject) -> None:
    """A rule by name that was meant for the language model's norms freezes those of the encoder too."""
    for layer in subject.model.encoder.layers:
        freeze(layer.norm1)


@fault("frozen_weights_trainable", where="lm.")
def language_model_unfrozen(subject: Subject) -> None:
    """`model.unfreeze()` for the encoder's sake unfreezes the language model as well."""
    unfreeze(subject.model.lm)


@fault("init_too_large", where="encoder")
def encoder_starts_thirty_times_too_large(subject: Subject) -> None:
    """Initial values with standard deviation 1 instead of 1 / sqrt(fan-in), as an embedding's default is."""
    change_parameters(subject, lambda values: 30 * values, "encoder.layers.0.linear")


@fault("init_too_large", case="decoder")
def decoder_starts_thirty_times_too_large(subject: Subject) -> None:
    """init_std was forgotten: matrices start at N(0, 0.6) in place of N(0, 0.02)."""
    change_parameters(subject, lambda values: 30 * values, "_proj.weight")


@fault("init_zero", where="encoder")
def encoder_starts_at_zero(subject: Subject) -> None:
    """The parameters were allocated, and the file of initial values was never loaded into them."""
    change_parameters(subject, np.zeros_like, "encoder.")


@fault("init_zero", where="projector")
def two_zero_layers(subject: Subject) -> None:
    """Norm and linear layer of the projector both start at zero for a gentle start: neither gets a gradient."""
    change_parameters(subject, np.zeros_like, "projector.norm")
    change_parameters(subject, np.zeros_like, "projector.linear")


@fault("nonfinite_parameters", where="encoder.layers.1.linear2.weight")
def nan_in_a_weight(subject: Subject) -> None:
    """A checkpoint was written after the run had diverged."""

    def spoil(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values.flat[3] = np.nan
        return values

    change_parameters(subject, spoil, "encoder.layers.1.linear2.weight")


@fault("overflow", where="encoder.layers.0.linear1")
def half_precision_overflow(subject: Subject) -> None:
    """A layer runs in float16, whose largest number is 65,504, and its values are large."""
    override(find(subject.model, "encoder.layers.0.linear1"), lambda f, x: cast(cast(f(x) * 1e6, "float16"), "float32"))


@fault("overflow", where="projector.linear")
def exponential_without_maximum(subject: Subject) -> None:
    """A home-made softmax takes exp of large scores without subtracting their maximum."""

    def softmax(f: Any, x: Any) -> Any:
        e = framework(x).exp(200 * f(x))
        return e / e.sum(axis=-1, keepdims=True)

    override(subject.model.projector.linear, softmax)


@fault("dead_activations", where="projector")
def dead_relu(subject: Subject) -> None:
    """A ReLU whose inputs are all far below zero: after one step that was too long it never wakes up."""
    override(subject.model.projector.linear, lambda linear, x: relu(linear(x) - 100))


@fault("random_in_evaluation")
def dropout_left_on(subject: Subject) -> None:
    """`model.eval()` is overridden and does not reach the dropout layers."""
    override(subject.model, lambda train, mode=True: train(True), "train")


@fault("random_in_evaluation")
def noise_in_evaluation(subject: Subject) -> None:
    """Noise for regularisation is added to the patches, whatever the mode."""

    def noisy(projector: Any, x: Any) -> Any:
        y = projector(x)
        f = framework(y)
        return y + 0.05 * (f.randn_like(y) if is_torch(y) else f.random.normal(y.shape))

    override(subject.model.projector, noisy)


@fault("future_visible", case="decoder")
def causal_mask_missing(subject: Subject) -> None:
    """Attention without its causal mask: the model copies the next token from the future."""
    masked(subject, lambda query, key: key == key)


@fault("future_visible")
def centred_smoothing(subject: Subject) -> None:
    """A convolution with "same" padding over the hidden states looks one token ahead."""

    def smooth(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        h = hidden(*args, **kwargs)
        return framework(h).concatenate([0.5 * h[:, :-1] + 0.5 * h[:, 1:], h[:, -1:]], 1)

    override(subject.model.lm, smooth, "hidden")


def masked(subject: Subject, visible: Any, first_layer: int = 0) -> None:
    """Attention of every layer from this one on by `visible(query, key)`, on grids of positions."""

    def call(layer: Any, x: Any, places: Any) -> Any:
        place = framework(x).arange(x.shape[1])
        return layer(x, replace(places, mask=visible(place[:, None], place[None])))

    for layer in subject.model.model.layers[first_layer:]:
        override(layer, call)


@fault("past_hidden", case="decoder")
def diagonal_mask(subject: Subject) -> None:
    """`eye` in place of `tril`: every token sees only itself."""
    masked(subject, lambda query, key: key == query)


@fault("realisation_differs", "past_hidden", case="decoder", where="self_attn", level="full")
def strict_causal_mask(subject: Subject) -> None:
    """key < query in place of key <= query: a token does not see itself."""
    masked(subject, lambda query, key: (key < query) | (key == 0))


@fault("rows_mixed")
def batch_statistics(subject: Subject) -> None:
    """A batch norm in place of a layer norm: rows share mean and deviation."""
    norm = subject.model.encoder.input_norm

    def batch_norm(_: Any, x: Any) -> Any:
        centred = x - x.mean(axis=(0, 1), keepdims=True)
        variance = (centred**2).mean(axis=(0, 1), keepdims=True)
        return centred / (variance + 1e-5) ** 0.5 * norm.weight + norm.bias

    override(norm, batch_norm)


@fault("rows_mixed")
def attention_over_all_series(subject: Subject) -> None:
    """Patches of all rows are flattened into one sequence, and something is averaged over it."""
    override(subject.model.projector, lambda f, x: f(x + 0.5 * x.mean(axis=0, keepdims=True)))


@fault("padding_attended")
def padding_patches_attended(subject: Subject) -> None:
    """Series are padded to the longest of the batch, and attention has no mask for it."""

    def everything(f: Any, series: Any, scale: Any, num_patches: Any, place: Any) -> Any:
        return f(series, scale, num_patches * 0 + series.shape[1] // 4, place)

    override(subject.model.encoder, everything)


@fault("realisation_differs", case="decoder", where="q_proj", level="full")
def rope_layout_of_another_checkpoint(subject: Subject) -> None:
    """Queries and keys come interleaved, as Meta's checkpoints have them, to a half-split rotary embedding."""
    size = subject.spec.head_dim  # type: ignore[attr-defined]

    def interleaved(f: Any, x: Any) -> Any:
        y = f(x)
        heads = y.reshape(*y.shape[:-1], -1, size // 2, 2)
        return heads.swapaxes(-1, -2).reshape(y.shape)

    for layer in subject.model.model.layers:
        override(layer.self_attn.q_proj, interleaved)
        override(layer.self_attn.k_proj, interleaved)


@fault("realisation_differs", where="encoder.layers.0.norm1", level="full")
def epsilon_of_another_size(subject: Subject) -> None:
    """The norm's epsilon is 1e-1 where the table means 1e-5: a default of another library."""
    for layer in subject.model.encoder.layers:
        layer.norm1.eps = 0.1


@fault("realisation_differs", where="output_norm", level="full")
def rms_epsilon_of_another_size(subject: Subject) -> None:
    """The RMS norm keeps its library's own epsilon, because it was never passed on."""
    subject.model.projector.output_norm.eps = 0.1


@fault("realisation_differs", where="encoder.layers.0", level="full")
def gelu_of_another_flavour(subject: Subject) -> None:
    """x * sigmoid(1.702 x) in place of the exact GELU."""

    def call(layer: Any, x: Any, mask: Any) -> Any:
        x = block.norm1(x + block.dropout(block.self_attn(x, mask)))
        y = block.linear1(x)
        return block.norm2(x + block.dropout(block.linear2(block.dropout(y * framework(y).sigmoid(1.702 * y)))))

    block = subject.model.encoder.layers[0]
    override(block, call)


@fault("realisation_differs", where="patch_embed", level="full")
def convolution_axes_swapped(subject: Subject) -> None:
    """The kernel is read as (kernel, out) where it lies as (out, kernel): silent, since the counts agree."""
    embed = subject.model.encoder.patch_embed

    def call(_: Any, series: Any) -> Any:
        size = embed.weight.shape[-1]
        return series.reshape(series.shape[0], -1, size) @ embed.weight.reshape(size, -1)

    override(embed, call)


@fault("realisation_differs", where="scale_in", level="full")
def features_in_another_order(subject: Subject) -> None:
    """The encoder takes (log std, mean) where the data gives (mean, log std)."""
    override(subject.model.encoder.scale_in, lambda f, x: f(framework(x).stack([x[:, 1], x[:, 0]], -1)))
