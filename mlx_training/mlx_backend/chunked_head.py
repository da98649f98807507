"""log p(target) in chunks of labels: never more logits at once than those of one chunk, forward and backward.

A chunk's logits are computed again in the backward pass: one more product with the head. Where nothing of the head
trains, the gradient of each log-probability may be computed ahead instead, and is only scaled later.

Shape suffixes: N labels, C labels of a chunk, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_training.mlx_backend.dropout import drawing_from, new_key

Head = Callable[[mx.array], mx.array]  # hidden states (C, H) -> logits (C, V), float32


def log_softmax_at(logits: mx.array, targets: mx.array) -> mx.array:
    """log p(target), of logits (..., V) and targets (...)."""
    return mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)


def chunked_logprobs(
    head: Head, layer: nn.Module, h_NH: mx.array, targets_N: mx.array, size: int, *, ahead: bool = False
) -> mx.array:
    """log p(target), float32 (N,).

    Args:
        head: works on each place alone.
        layer: holds everything in `head` that trains.
        size: labels of a chunk.
        ahead: compute the gradient in the forward pass where nothing of `layer` trains.
    """
    trained: dict[str, mx.array] = dict(tree_flatten(layer.trainable_parameters()))
    chunks = _chunks(len(h_NH), size)
    keys = mx.random.split(new_key(), len(chunks))
    ahead = ahead and not trained

    def attach(arrays: Iterable[mx.array]) -> None:
        if trained:
            layer.update(tree_unflatten(list(zip(trained, arrays, strict=True))))

    def logits(number: int, h_CH: mx.array, *arrays: mx.array) -> mx.array:
        attach(arrays)
        with drawing_from(keys[number]):
            return head(h_CH)

    def gradient(
        number: int, h_CH: mx.array, arrays: list[mx.array], logprobs_C: mx.array, grads_C: mx.array
    ) -> list[mx.array]:
        """Of the chunk's hidden states and of `arrays`."""

        def run(*primals: mx.array) -> mx.array:
            return logits(number, *primals)

        primals = [h_CH, *arrays]
        of_logits = _gradient(run(*primals), targets_N[chunks[number]], logprobs_C, grads_C)
        return mx.vjp(run, primals, [of_logits])[1]

    @mx.custom_function
    def run(h_NH: mx.array, arrays: list[mx.array]) -> list[mx.array]:
        found: list[list[mx.array]] = []
        for number, chunk in enumerate(chunks):
            h_CH = _after(h_NH[chunk], *found[-1:])
            logprobs_C = log_softmax_at(logits(number, h_CH, *arrays), targets_N[chunk])
            more = gradient(number, h_CH, [], logprobs_C, mx.ones_like(logprobs_C)) if ahead else []
            found.append([logprobs_C, *more])
        return [mx.concatenate(parts) for parts in zip(*found, strict=True)]

    @run.vjp
    def run_vjp(
        primals: tuple[mx.array, list[mx.array]], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, list[mx.array]]:
        (h_NH, arrays), grads_N, (logprobs_N, *unit_NH) = primals, cotangents[0], outputs
        if ahead:
            return unit_NH[0] * grads_N[:, None].astype(h_NH.dtype), []
        of_h: list[mx.array] = []
        sums: list[mx.array] = []
        for number, chunk in enumerate(chunks):
            h_CH = _after(h_NH[chunk], of_h[-1:], sums)
            of_h_CH, *of_arrays = gradient(number, h_CH, arrays, logprobs_N[chunk], grads_N[chunk])
            sums = [a + b for a, b in zip(sums, of_arrays, strict=True)] if sums else of_arrays
            of_h.append(of_h_CH)
        return mx.concatenate(of_h), sums

    logprobs_N = run(h_NH, list(trained.values()))[0]
    attach(trained.values())
    return logprobs_N


def chunked_scores(head: Head, h_NH: mx.array, targets_N: mx.array, size: int) -> tuple[mx.array, mx.array]:
    """log p(target) and whether the target is the most probable token, both (N,), without gradients."""
    found: list[list[mx.array]] = []
    for chunk in _chunks(len(h_NH), size):
        logits_CV, targets_C = head(_after(h_NH[chunk], *found[-1:])), targets_N[chunk]
        found.append([log_softmax_at(logits_CV, targets_C), logits_CV.argmax(-1) == targets_C])
    logprobs, hits = zip(*found, strict=True)
    return mx.concatenate(logprobs), mx.concatenate(hits)


def _gradient(logits_CV: mx.array, targets_C: mx.array, logprobs_C: mx.array, grads_C: mx.array) -> mx.array:
    """d(loss) / d(logits), from d(loss) / d(log p(target)): (one-hot - softmax) times that."""
    at_target = targets_C[:, None]
    normalizer_C1 = mx.take_along_axis(logits_CV, at_target, axis=-1) - logprobs_C[:, None]
    is_target_CV = mx.arange(logits_CV.shape[-1]) == at_target
    return grads_C[:, None] * (is_target_CV - mx.exp(logits_CV - normalizer_C1))


def _after(x: mx.array, *found: list[mx.array]) -> mx.array:
    """The same array, to be used when what was found is there: one chunk at a time."""
    known = [array for arrays in found for array in arrays]
    return mx.depends([x], known)[0] if known else x


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]
