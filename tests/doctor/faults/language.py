"""Broken language models without attention: what they see, what they remember, which gate is which."""

import copy
from typing import Any

from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.base import fault, framework, is_torch, override, stop


@fault("future_visible", case="kgram")
def centred_window(subject: Subject) -> None:
    """The convolution over k tokens is padded on both sides ("same"), so that it sees the next token."""
    override(subject.model.window, lambda window, x: window(framework(x).concatenate([x[:, 1:], 0 * x[:, :1]], 1)))


@fault("past_hidden", case="kgram")
def window_of_one_token(subject: Subject) -> None:
    """The convolution's kernel is sliced to its last weight: every token counts alone, whatever k says."""
    window, k = subject.model.window, subject.spec.k  # type: ignore[attr-defined]
    override(window, lambda _, x: x[:, k - 1 :] * window.weight[:, 0, -1] + window.bias)


@fault("batch_remembered", case="recurrent")
def stale_states(subject: Subject) -> None:
    """The states after one batch are where the next one begins, though its texts have nothing to do with it."""
    last: dict[int, Any] = {}

    def stale(rnn: Any, x: Any, states: Any, padding: Any) -> Any:
        h, after = rnn(x, last.get(len(x), states), padding)
        last[len(x)] = tuple(map(stop, after))
        return h, after

    override(subject.model.rnn, stale)


@fault("rows_mixed", case="recurrent")
def batch_first_forgotten(subject: Subject) -> None:
    """The layer takes (L, B, E) and is given (B, L, E): it goes from row to row, and forgets at every token."""

    def transposed(rnn: Any, x: Any, states: Any, padding: Any) -> Any:
        h, after = rnn(x.swapaxes(0, 1), states, padding)
        return h.swapaxes(0, 1), after

    override(subject.model.rnn, transposed)


@fault("realisation_differs", case="recurrent", level="full")
def gates_in_another_order(subject: Subject) -> None:
    """The gates come as input, cell, forget, output, as Keras has them: silent, since they are equally large."""
    rnn = subject.model.rnn
    inner = copy.deepcopy(rnn)
    inner.eval()

    def reordered(weights: Any) -> Any:
        i, c, f, o = framework(weights).split(weights, len(weights) // 4 if is_torch(weights) else 4)
        return framework(weights).concatenate([i, f, c, o])

    def call(_: Any, *args: Any) -> Any:
        if is_torch(rnn):
            weights = {name: reordered(p) for name, p in rnn.named_parameters()}
            return framework(rnn).func.functional_call(inner, weights, args)
        inner.update({name: reordered(p) for name, p in rnn.parameters().items() if name != "between"})
        return inner(*args)

    override(rnn, call)
