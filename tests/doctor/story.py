"""The week of `grad_norm=0.00`, played again: a training loop with its old mistakes, and what the doctor says of it.

    python -m tests.doctor.story [--backend mlx|torch] [--steps 40] [--profile]

The model, the data and the learning rates are those of `quick_test`. The loop is the developer's own: its gradient norm
skips whatever is not an array, it clips by that norm, and its loss builds the logits of the whole sequence. It trains
all the same. The doctor then looks at it three times: as it is, with the norm repaired, and with the loss repaired too.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_training.backend import Arrays, optimizer_groups
from mlx_training.config import load_config
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.doctor import Watcher, examine
from mlx_training.diagnostics.profile import profile_subject, show
from mlx_training.diagnostics.report import Report
from mlx_training.diagnostics.subject import Subject, from_config
from mlx_training.objectives import Sums
from mlx_training.objectives.lm import lm
from tests.doctor.faults.base import framework, take

CONFIG = "quick_test"
NUM_ROWS = 32  # a batch


def wasteful(model: Any, batch: Batch) -> Sums:
    """The loss of the answers, from the logits of every place."""
    logits_BLV = model.logits(batch)
    logprobs_BLV = logits_BLV - framework(logits_BLV).logsumexp(logits_BLV, -1, True)
    logprobs_BKV = take(logprobs_BLV, batch.positions[..., None], 1)
    logprobs_BK = take(logprobs_BKV, batch.targets[..., None], -1)[..., 0]
    return {"loss": -(logprobs_BK * batch.mask).sum(), "weight": batch.mask.sum()}


class Loop:
    """A training step of one's own: one AdamW for every group of the table, clipping by the global norm."""

    num_compilations = 0  # nothing is compiled

    def __init__(self, subject: Subject, leaves: Callable[[Iterable[tuple[str, Any]]], list[Any]]) -> None:
        """`leaves`: what the norm is taken over, of (path, array) pairs."""
        self.model, self.objective, self.backend = subject.model, subject.objective, subject.backend
        self.groups, self.optim, self.leaves, self.taken = optimizer_groups(subject.spec), subject.optim, leaves, 0

    def norm_and_factor(self, pairs: Iterable[tuple[str, Any]]) -> tuple[float, float]:
        """The norm, and what gradients of that norm are multiplied by so that they keep to the limit."""
        norm = sum(float((leaf * leaf).sum()) for leaf in self.leaves(pairs)) ** 0.5
        return norm, min(1.0, (self.optim.grad_clip_norm or float("inf")) / (norm + 1e-6))

    def mean(self, batches: Sequence[Batch]) -> tuple[Any, Any]:
        """Mean loss of some micro-batches, and their number of labels."""
        sums = [self.objective(self.model, batch) for batch in batches]
        weight = sum(s["weight"] for s in sums)
        return sum(s["loss"] for s in sums) / weight, weight


class MlxLoop(Loop):
    """In MLX."""

    def __init__(self, subject: Subject, leaves: Callable[..., list[Any]]) -> None:
        from mlx import optimizers
        from mlx.utils import tree_flatten

        super().__init__(subject, leaves)
        o, parameters = self.optim, dict(tree_flatten(self.model.trainable_parameters()))
        self.optimizers = {
            key: optimizers.AdamW(0.0, list(o.betas), o.eps, o.weight_decay if key[1] else 0.0, bias_correction=True)
            for key in self.groups
        }
        for key, names in self.groups.items():
            self.optimizers[key].init({name: parameters[name] for name in names})

    def __call__(self, batches: Sequence[Batch], *, step: int, lr: Mapping[str, float], **_: Any) -> dict[str, Any]:
        import mlx.core as mx
        from mlx import nn
        from mlx.utils import tree_flatten, tree_unflatten

        self.model.train()
        on_device = [Batch(**{name: mx.array(array) for name, array in batch.arrays().items()}) for batch in batches]
        (loss, weight), gradients = nn.value_and_grad(self.model, lambda: self.mean(on_device))()
        norm, factor = self.norm_and_factor(tree_flatten(gradients))
        parameters = dict(tree_flatten(self.model.trainable_parameters()))
        clipped = {name: gradient * factor for name, gradient in tree_flatten(gradients)}
        for (group, decay), names in self.groups.items():
            optimizer = self.optimizers[group, decay]
            optimizer.learning_rate = lr[group]
            updated = optimizer.apply_gradients({n: clipped[n] for n in names}, {n: parameters[n] for n in names})
            self.model.update(tree_unflatten(list(updated.items())))
        mx.eval(self.model.trainable_parameters(), [optimizer.state for optimizer in self.optimizers.values()])
        self.taken += 1
        return {"loss": loss.item(), "weight": weight.item(), "grad_norm": norm, "skipped": 0.0}

    def export(self) -> Arrays:
        """Both moments of every parameter, and the number of steps."""
        state = {
            f"{n}.{k}": np.array(self.optimizers[key].state[n][k])
            for key, names in self.groups.items()
            for n in names
            for k in "mv"
        }
        return state | {"step": np.asarray(self.taken, np.float32)}

    def load(self, arrays: Arrays) -> None:
        """This loop cannot resume."""
        raise NotImplementedError


class TorchLoop(Loop):
    """In PyTorch."""

    def __init__(self, subject: Subject, leaves: Callable[..., list[Any]]) -> None:
        import torch

        super().__init__(subject, leaves)
        self.parameters, o = dict(self.model.named_parameters()), self.optim
        groups = [
            {
                "params": [self.parameters[n] for n in names],
                "group": group,
                "weight_decay": o.weight_decay if decay else 0.0,
            }
            for (group, decay), names in self.groups.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=o.betas, eps=o.eps)

    def __call__(self, batches: Sequence[Batch], *, step: int, lr: Mapping[str, float], **_: Any) -> dict[str, Any]:
        self.model.train()
        self.optimizer.zero_grad()
        loss, weight = self.mean([self.backend.to_device(batch) for batch in batches])  # type: ignore[attr-defined]
        loss.backward()
        used = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norm, factor = self.norm_and_factor(used.items())
        for gradient in used.values():
            gradient.mul_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr[group["group"]]
        self.optimizer.step()
        self.taken += 1
        return {"loss": loss.item(), "weight": weight.item(), "grad_norm": norm, "skipped": 0.0}

    def export(self) -> Arrays:
        """Both moments of every parameter, and the number of steps."""
        kept = {"m": "exp_avg", "v": "exp_avg_sq"}
        names = [n for names in self.groups.values() for n in names]
        state = {
            f"{n}.{k}": self.optimizer.state[self.parameters[n]][kept[k]].numpy().copy() for n in names for k in kept
        }
        return state | {"step": np.asarray(self.taken, np.float32)}

    def load(self, arrays: Arrays) -> None:
        """This loop cannot resume."""
        raise NotImplementedError


LOOPS: dict[str, Callable[..., Any]] = {"mlx": MlxLoop, "torch": TorchLoop}


def only_arrays(leaves: Iterable[Any]) -> list[Any]:
    """The week's mistake: a pair (path, array) is no array, so nothing is left and the norm is 0."""
    return [leaf for leaf in leaves if hasattr(leaf, "shape")]


def second_of_pairs(pairs: Iterable[tuple[str, Any]]) -> list[Any]:
    """The repair."""
    return [array for _, array in pairs]


def as_it_was(subject: Subject) -> Subject:
    """The developer's loop around the subject's model."""
    loop = LOOPS[subject.backend.name]
    return replace(subject, objective=wasteful, make_step=lambda s: loop(s, only_arrays))


def norm_repaired(subject: Subject) -> Subject:
    """The same loop with the right norm."""
    loop = LOOPS[subject.backend.name]
    return replace(subject, objective=wasteful, make_step=lambda s: loop(s, second_of_pairs))


def both_repaired(subject: Subject) -> Subject:
    """And with logits at label places only."""
    return replace(norm_repaired(subject), objective=lm)


VISITS = (
    ("the loop as it was", as_it_was),
    ("the norm repaired", norm_repaired),
    ("the loss repaired too", both_repaired),
)


def train(subject: Subject, num_steps: int) -> None:
    """What the developer saw. The parameters are put back."""
    with subject.restored():
        step = subject.new_step()
        for number in range(1, num_steps + 1):
            started = time.perf_counter()
            metrics = step([subject.batch(number - 1)], step=number, lr=subject.rates(number))
            if number == 1 or number % 10 == 0:
                loss, norm, seconds = metrics["loss"], metrics["grad_norm"], time.perf_counter() - started
                print(f"step {number:3}  loss={loss:.4f}  grad_norm={norm:.2f}  {seconds:.2f}s/it")


def visit(subject: Subject, watch: Watcher | None = None) -> list[Report]:
    """The reports of the three visits."""
    reports = []
    for title, change in VISITS:
        if watch:
            print(f"\n--- {title}")
        reports.append(examine(change(subject), watch=watch))
        if watch:
            print(reports[-1].summary)
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=sorted(LOOPS), default="mlx")
    parser.add_argument("--steps", type=int, default=40, help="steps that are trained (default: 40)")
    parser.add_argument("--profile", action="store_true", help="show where the time of a step goes instead")
    args = parser.parse_args()
    subject = from_config(load_config(CONFIG, [f"training.max_steps={args.steps}"]), args.backend, max_rows=NUM_ROWS)
    if args.profile:
        print(show(profile_subject(as_it_was(subject))))
        return
    train(as_it_was(subject), args.steps)
    visit(subject, watch=print)


if __name__ == "__main__":
    main()
