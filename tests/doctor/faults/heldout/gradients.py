"""Unseen faults in gradients and objectives."""

from typing import Any

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.diagnostics.subject import Subject
from mlx_training.objectives import Sums
from mlx_training.objectives.lm import lm
from tests.doctor.faults.base import (
    edit,
    find,
    framework,
    is_torch,
    override,
    stop,
    take,
)
from tests.doctor.faults.gradients import slope
from tests.doctor.faults.heldout.model import attention
from tests.doctor.faults.heldout.registry import fault


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
