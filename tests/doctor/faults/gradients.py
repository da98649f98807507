"""Gradients that do not arrive, are wrong, or leave the range of numbers; and objectives that are not sums."""

from dataclasses import replace
from typing import Any

import numpy as np

from mlx_training.backend import Step
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.subject import Subject
from mlx_training.objectives import Sums
from mlx_training.objectives.lm import lm
from tests.doctor.cases import untaught_arrays
from tests.doctor.faults.base import edit, fault, framework, is_torch, override, rebuilt, stop, take
from tests.doctor.faults.steps_numpy import NumpyStep


@fault("disconnected", where="encoder")
def detached_encoder(subject: Subject) -> None:
    """A `detach` between encoder and projector is left from a linear-probe experiment."""
    override(subject.model.projector, lambda f, x: f(stop(x)))


@fault("disconnected", where="projector")
def stop_gradient_at_the_language_model(subject: Subject) -> None:
    """The language model is frozen by stopping gradients at its inputs, so that the encoder gets none either."""
    override(subject.model, lambda inputs, batch: stop(inputs(batch)), "inputs")


@fault("disconnected", where="encoder.layers.0")
def detached_middle(subject: Subject) -> None:
    """Checkpointing without reentrance support: the gradient ends before the last layer of the encoder."""
    override(subject.model.encoder.layers[1], lambda f, x, mask: f(stop(x), mask))


@fault("disconnected", where="encoder")
def round_trip_through_numpy(subject: Subject) -> None:
    """Patches are converted to NumPy and back on their way to the language model."""

    def call(projector: Any, x: Any) -> Any:
        f = framework(x)
        return projector(f.from_numpy(x.detach().numpy().copy()) if is_torch(x) else f.array(np.array(x)))

    override(subject.model.projector, call)
    if not is_torch(subject.model):
        subject.make_step = NumpyStep  # mx.compile refuses the round trip; a step that is not compiled says nothing


@fault("no_influence", where="encoder.layers.1")
def layer_skipped(subject: Subject) -> None:
    """The forward pass returns what it was given: a loop over layers forgets to assign its result."""
    override(subject.model.encoder.layers[1], lambda _, x, mask: x)


@fault("no_influence", where="encoder.series_embed")
def embedding_not_added(subject: Subject) -> Subject:
    """An embedding is declared, initialised, saved, and never added in the forward pass."""
    subject = rebuilt(subject, {"model.encoder.max_series": 4})
    subject.model.encoder.spec = replace(subject.model.encoder.spec, max_series=0)
    return subject


@fault("no_influence")
def loss_of_another_model(subject: Subject) -> None:
    """The loss closes over the model that was built first; the one that trains is a copy."""
    other = subject.backend.build(subject.spec)
    subject.backend.load(other, subject.backend.export(subject.model))
    subject.objective = lambda model, batch: lm(other, batch)


def slope(x: Any, factor: float) -> Any:
    """x, whose gradient comes back multiplied."""
    return stop(x) + factor * (x - stop(x))


@fault("gradient_wrong")
def gradient_times_three(subject: Subject) -> None:
    """A custom backward pass forgets that the forward pass had already multiplied."""
    override(subject.model.projector, lambda f, x: f(slope(x, 3.0)))


@fault("gradient_wrong")
def gradient_reversed(subject: Subject) -> None:
    """A gradient-reversal layer of an adversarial experiment is still in front of the projector."""
    override(subject.model.projector, lambda f, x: f(slope(x, -1.0)))


@fault("gradient_nonfinite")
def square_root_of_zero(subject: Subject) -> None:
    """A distance whose gradient is 0 / 0 where it is zero is added to the patches."""

    def call(projector: Any, x: Any) -> Any:
        y = projector(x)
        return y + ((y - stop(y)) ** 2) ** 0.5

    override(subject.model.projector, call)


@fault("gradient_vanishing")
def patches_scaled_to_nothing(subject: Subject) -> None:
    """Patches are multiplied by 1e-7 on their way: a learning rate that was applied to the wrong thing."""
    override(subject.model.projector, lambda f, x: 1e-7 * f(x))


@fault("gradient_exploding")
def recurrence_with_a_large_gain(subject: Subject) -> None:
    """A refinement is unrolled sixteen times at a gain above one: gradients double each time."""

    def call(layer: Any, x: Any, mask: Any) -> Any:
        x = layer(x, mask)
        for _ in range(16):
            x = framework(x).sin(3.0 * x)
        return x

    override(subject.model.encoder.layers[0], call)


@fault("initial_loss")
def logits_much_too_large(subject: Subject) -> None:
    """A temperature is multiplied where it should divide: the first loss is many times ln V."""
    override(subject.model, lambda head, h: 30 * head(h), "head")


@fault("weight_not_count")
def mean_with_weight_one(subject: Subject) -> None:
    """The objective returns the mean of a batch and says that it counts once."""

    def objective(model: Any, batch: Batch) -> Sums:
        sums = lm(model, batch)
        return {"loss": sums["loss"] / sums["weight"], "weight": sums["weight"] * 0 + 1}

    subject.objective = objective


@fault("weight_not_count")
def mean_with_its_count(subject: Subject) -> None:
    """The objective divides by the count, and the step divides again."""

    def objective(model: Any, batch: Batch) -> Sums:
        sums = lm(model, batch)
        return {"loss": sums["loss"] / sums["weight"], "weight": sums["weight"]}

    subject.objective = objective


@fault("weight_not_count")
def weight_is_the_number_of_rows(subject: Subject) -> None:
    """The sum over tokens is divided by the number of rows, so that long answers weigh more."""
    subject.objective = lambda model, batch: {**lm(model, batch), "weight": batch.mask[:, 0].sum()}


@fault("ascent", "initial_loss")
def wrong_sign_of_the_loss(subject: Subject) -> None:
    """The log-likelihood is minimised."""
    subject.objective = lambda model, batch: {**lm(model, batch), "loss": -lm(model, batch)["loss"]}


@fault("full_logits")
def logits_of_every_place(subject: Subject) -> None:
    """Logits of the full sequence are built, and then nearly all are thrown away."""

    def objective(model: Any, batch: Batch) -> Sums:
        logits = model.logits(batch)
        chosen = take(take(logits, batch.positions[..., None], 1), batch.targets[..., None], -1)[..., 0]
        logprobs = chosen - take(framework(logits).logsumexp(logits, -1), batch.positions, 1)
        return {"loss": -(logprobs * batch.mask).sum(), "weight": batch.mask.sum()}

    subject.objective = objective


@fault("recompiles", backends=("mlx",))
def every_batch_has_its_own_length(subject: Subject) -> None:
    """Batches are padded to their longest row exactly, and every new length is compiled anew."""
    original = subject.batch

    def batch(index: int) -> Batch:
        padded = original(index)
        wide = ((0, 0), (0, 1 + index % 97))
        return edit(padded, tokens=np.pad(padded.tokens, wide), patch_index=np.pad(padded.patch_index, wide))

    subject.batch = batch


@fault("recompiles", backends=("mlx",))
def made_anew_every_step(subject: Subject) -> None:
    """The compiled function is created inside the loop, so that every step is traced again."""

    class Anew:
        num_compilations = 0

        def __init__(self, first: Step) -> None:
            self.step = first

        def __getattr__(self, name: str) -> Any:
            return getattr(self.step, name)

        def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            state = self.step.export()
            self.step = subject.default_step()
            self.step.load(state)
            self.num_compilations += 1
            return self.step(*args, **kwargs)

    subject.make_step = lambda s: Anew(s.default_step())


@fault("series_ignored", case="trained")
def trained_on_answers_of_other_rows(subject: Subject) -> None:
    """Answers stood with the wrong series in training: the model learnt the commonest answer, and no more."""
    subject.backend.load(subject.model, untaught_arrays(subject.backend.name))


@fault("series_ignored", "no_influence", case="trained")
def encoder_gets_nothing(subject: Subject) -> None:
    """The trained model is given empty series since its loader was changed."""
    override(subject.model.encoder, lambda f, series, scale, n, place: f(series * 0, scale * 0, n, place))
