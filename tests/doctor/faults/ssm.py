"""Broken state-space models: a convolution that looks ahead, a state that is kept or that grows."""

import importlib
from typing import Any

from mlx_training.backend import replaced
from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.base import fault, find, framework, is_torch, override

MIXER = "backbone.layers.0.mixer"


@fault("future_visible", case="ssm")
def convolution_centred(subject: Subject) -> None:
    """The short convolution is padded on both sides, as image models do: it sees the next token."""

    def centred(convolve: Any, x: Any, *rest: Any) -> Any:
        y, past = convolve(x, *rest)
        return framework(y).concatenate([y[:, 1:], y[:, -1:]], 1), past

    override(find(subject.model, f"{MIXER}.conv1d"), centred)


@fault("future_visible", case="ssm")
def kernel_turned_round(subject: Subject) -> None:
    """The long convolution of the spectral filters is taken backwards, as BiGS's second half is."""

    def backward(mix: Any, x: Any, places: Any) -> Any:
        f = framework(x)
        turned = f.flip(x, (1,)) if is_torch(x) else x[:, ::-1]
        y = mix(turned, places)
        return f.flip(y, (1,)) if is_torch(x) else y[:, ::-1]

    override(find(subject.model, "backbone.layers.3.mixer"), backward)


@fault("random_in_evaluation", "batch_remembered", "rows_mixed", case="ssm", backends=("torch",))
def state_of_the_batch_before(subject: Subject) -> None:
    """The state is kept between batches, so that a text begins where another one ended (MLX: not beyond a trace)."""
    kept: dict[str, Any] = {}

    def mixed(mix: Any, x: Any, places: Any) -> Any:
        kept["rows"] = len(x)
        return mix(x, places)

    def remembered(_original: Any, _places: Any) -> Any:
        return tuple(x.expand(kept["rows"], *x.shape[1:]) for x in kept.get("states", ())) or (None, None)

    def remember(_original: Any, _places: Any, past: Any, state: Any) -> None:
        kept["states"] = past.detach()[:1], state.detach()[:1]

    mixer = find(subject.model, MIXER)
    override(mixer, mixed)
    override(mixer, remembered, "remembered")
    override(mixer, remember, "remember")


@fault("overflow", "gradient_nonfinite", case="ssm", where=MIXER)
def state_that_grows(subject: Subject) -> None:
    """A has lost its minus sign, and time steps are long: the state grows with every token until it overflows."""
    module = importlib.import_module(type(subject.model).__module__)
    scan = module.selective_scan

    def growing(x: Any, dt: Any, A: Any, *rest: Any) -> Any:
        return scan(x, 100 * dt, -A, *rest)

    def mixed(mix: Any, *given: Any) -> Any:
        with replaced(module, "selective_scan", growing):
            return mix(*given)

    override(find(subject.model, MIXER), mixed)
