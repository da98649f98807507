"""log p(target) in chunks of labels: never more logits at once than those of one chunk, forward and backward.

A chunk's logits are computed again in the backward pass: one more product with the head. Where nothing of the head
trains, the gradient of each log-probability may be computed ahead instead, and is only scaled later.

Shape suffixes: N labels, C labels of a chunk, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_backend.dropout import drawing_from, new_key

Head = Callable[[Tensor], Tensor]  # hidden states (C, H) -> logits (C, V), float32


def log_softmax_at(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target), of logits (..., V) and targets (...)."""
    return -F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def chunked_logprobs(
    head: Head, layer: nn.Module, h_NH: Tensor, targets_N: Tensor, size: int, *, ahead: bool = False
) -> Tensor:
    """log p(target), float32 (N,).

    Args:
        head: works on each place alone.
        layer: holds everything in `head` that trains.
        size: labels of a chunk.
        ahead: compute the gradient in the forward pass where nothing of `layer` trains.
    """
    trained = [p for p in layer.parameters() if p.requires_grad]
    return _LogProbs.apply(head, size, ahead and not trained, targets_N, h_NH, *trained)


@torch.no_grad()
def chunked_scores(head: Head, h_NH: Tensor, targets_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """log p(target) and whether the target is the most probable token, both (N,), without gradients."""
    logprobs_N, hits_N = h_NH.new_empty(len(h_NH), dtype=torch.float32), torch.empty_like(targets_N, dtype=torch.bool)
    for chunk in _chunks(len(h_NH), size):
        logits_CV, targets_C = head(h_NH[chunk]), targets_N[chunk]
        logprobs_N[chunk], hits_N[chunk] = log_softmax_at(logits_CV, targets_C), logits_CV.argmax(-1) == targets_C
    return logprobs_N, hits_N


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: Head, size: int, ahead: bool, targets_N: Tensor, h_NH: Tensor, *trained: Tensor
    ) -> Tensor:
        ctx.head, ctx.size, ctx.key = head, size, new_key()
        logprobs_N = h_NH.new_empty(len(h_NH), dtype=torch.float32)
        unit_NH = torch.empty_like(h_NH) if ahead and ctx.needs_input_grad[4] else None
        with drawing_from(ctx.key), torch.set_grad_enabled(unit_NH is not None):
            for chunk in _chunks(len(h_NH), size):
                h_CH, targets_C = h_NH[chunk].detach().requires_grad_(unit_NH is not None), targets_N[chunk]
                logits_CV = head(h_CH)
                logprobs_N[chunk] = logprobs_C = log_softmax_at(logits_CV.detach(), targets_C)
                if unit_NH is not None:
                    of_logits = _gradient(logits_CV, targets_C, logprobs_C, torch.ones_like(logprobs_C))
                    (unit_NH[chunk],) = torch.autograd.grad(logits_CV, [h_CH], of_logits)
                    del of_logits
                del logits_CV
        ctx.is_ahead = unit_NH is not None
        ctx.save_for_backward(*([unit_NH] if unit_NH is not None else [targets_N, logprobs_N, h_NH, *trained]))
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grads_N,) = grads
        if ctx.is_ahead:
            (unit_NH,) = ctx.saved_tensors
            return None, None, None, None, unit_NH * grads_N[:, None].to(unit_NH.dtype)
        targets_N, logprobs_N, h_NH, *trained = ctx.saved_tensors
        of_h_NH, of_trained = torch.empty_like(h_NH), list[Tensor]()
        with drawing_from(ctx.key), torch.enable_grad():
            for chunk in _chunks(len(h_NH), ctx.size):
                h_CH = h_NH[chunk].detach().requires_grad_()
                logits_CV = ctx.head(h_CH)
                of_logits = _gradient(logits_CV, targets_N[chunk], logprobs_N[chunk], grads_N[chunk])
                of_h_NH[chunk], *found = torch.autograd.grad(logits_CV, [h_CH, *trained], of_logits)
                _add(of_trained, found)
                del logits_CV, of_logits, found
        return None, None, None, None, of_h_NH, *of_trained


@torch.no_grad()
def _gradient(logits_CV: Tensor, targets_C: Tensor, logprobs_C: Tensor, grads_C: Tensor) -> Tensor:
    """d(loss) / d(logits), from d(loss) / d(log p(target)): (one-hot - softmax) times that. In the logits' memory."""
    at_target = targets_C[:, None]
    normalizer_C1 = logits_CV.gather(-1, at_target) - logprobs_C[:, None]
    of_logits = logits_CV.detach().sub_(normalizer_C1).exp_().mul_(-grads_C[:, None])
    return of_logits.scatter_add_(-1, at_target, grads_C[:, None])


@torch.no_grad()
def _add(sums: list[Tensor], more: Sequence[Tensor]) -> None:
    if sums:
        torch._foreach_add_(sums, list(more))
    else:
        sums.extend(more)


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]
