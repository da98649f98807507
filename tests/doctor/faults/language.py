"""Broken language models: what they see, what they remember, which gate is which, what they are asked."""

import copy
import importlib
from typing import Any

from mlx_training.backend import replaced
from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.base import each_batch, edit, fault, framework, is_torch, override, stop


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


@fault("future_visible", case="sparse")
def window_that_ends_one_token_later(subject: Subject) -> None:
    """The keys of sparse attention are cut one place too far to the right, as where a window is centred."""
    module = importlib.import_module(type(subject.model).__module__)
    mix = module.mix

    def later(mixer: str, spec: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        f = framework(q)
        k, v = ((f.cat if is_torch(x) else f.concatenate)([x[:, :, 1:], x[:, :, -1:]], 2) for x in (k, v))
        return mix(mixer, spec, q, k, v, *rest)

    def attend(original: Any, *given: Any) -> Any:
        with replaced(module, "mix", later):
            return original(*given)

    for layer in subject.model.model.layers:
        override(layer.self_attn, attend)


@fault("realisation_differs", case="decoder", where="self_attn.k_proj", level="full", backends=("torch",))
def keys_and_values_swapped(subject: Subject) -> None:
    """A fused qkv matrix is cut in another order than it was joined: silent, since the blocks are equally large."""
    attention = subject.model.model.layers[0].self_attn
    k, v = attention.k_proj, attention.v_proj
    override(k, lambda _, x: x @ v.weight.T)
    override(v, lambda _, x: x @ k.weight.T)


@fault("decoding_differs", case="recurrent", backends=("mlx",))
def stale_state(subject: Subject) -> None:
    """The state that the prompt has left is read at every token, and never written."""
    stale_cache(subject)


@fault("decoding_differs", case="decoder")
def stale_cache(subject: Subject) -> None:
    """A copy of the cache grows: the next token finds it as the prompt has left it."""

    def stale(extend: Any, x: Any, cache: Any) -> Any:
        return extend(x, cache if x.shape[1] > 1 else copy.deepcopy(cache))

    override(subject.model, stale, "extend")


@fault("padding_supervised", case="decoder", backends=("torch",))
def loss_on_the_padding_of_windows(subject: Subject) -> None:
    """The last window is filled up, and the filling is learnt."""
    each_batch(subject, lambda batch: edit(batch, lengths=batch.lengths - 3))


@fault("vocabulary_mismatch", case="decoder", backends=("torch",))
def text_of_another_tokenizer(subject: Subject) -> None:
    """A cache of tokens was made by a tokenizer with more ids."""
    size = subject.spec.vocab_size  # type: ignore[attr-defined]
    each_batch(subject, lambda batch: edit(batch, tokens=batch.tokens + size // 2, targets=batch.targets + size // 2))


@fault("expert_unused", case="sparse", where="layers.0.mlp, expert 1")
def expert_locked_out(subject: Subject) -> None:
    """What keeps a padded expert out is added for a real one as well."""

    def routed(router: Any, x: Any) -> Any:
        logits = router(x)
        return logits - 1e4 * (framework(x).arange(logits.shape[-1]) == 1)

    override(subject.model.model.layers[0].mlp.router, routed)
