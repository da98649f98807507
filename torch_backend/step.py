"""One optimiser step in PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from mlx_training.backend import Arrays, Optim, expect_names, optimizer_groups, probe_records, step_seed
from mlx_training.data.batch import Batch
from mlx_training.objectives import Objective
from mlx_training.spec import Spec
from torch_backend.group import Group
from torch_backend.layers import LanguageModel
from torch_backend.optimizers import State, clock, updated

FUSED = {"adamw": adamw, "adam": adam}
HONOURS_FOUND_INF = ("cpu", "cuda")  # devices whose fused kernel reads it; Metal's takes the argument and ignores it


class Step:
    """Gradients over micro-batches and processes, one division by their total weight, clipping, the optimiser's update.

    An update that is not finite is skipped by the device, so that nobody has to wait for its result.
    """

    def __init__(
        self,
        model: LanguageModel,
        spec: Spec,
        objective: Objective,
        optim: Optim,
        *,
        seed: int,
        group: Group,
        to_device: Callable[[Batch], Batch],
    ) -> None:
        self.model, self.objective, self.optim, self.seed, self.to_device = model, objective, optim, seed, to_device
        self.group = group
        parameters, self.table = dict(model.named_parameters()), spec.params()
        self.parameters = {name: parameters[name] for name in self.table}
        self.names = list(optim.state_shapes(spec))
        self.state: dict[str, State] = {
            name: {key: torch.zeros(shape, device=p.device) for key, shape in optim.state(self.table[name]).items()}
            for name, p in self.parameters.items()
        }
        self.taken = torch.zeros((), device=next(iter(self.parameters.values())).device)
        self.groups = optimizer_groups(spec)

    @property
    def num_compilations(self) -> int:
        """Functions traced for compilation so far: none."""
        return 0

    def __call__(
        self, batches: Sequence[Batch], *, step: int, lr: Mapping[str, float], probe: bool = False
    ) -> dict[str, Any]:
        torch.manual_seed(step_seed(self.seed, step, self.group.rank))
        self.model.train()
        for p in self.parameters.values():
            p.grad = None
        sums = [self._backward(self.to_device(batch)) for batch in batches]
        loss, weight = (torch.stack(values).sum() for values in zip(*sums, strict=True))
        # zero where a batch did not use the parameter: it decays all the same
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        if self.group.size > 1:
            loss, weight, *gradients = self.group.sum([loss, weight, *gradients])
        norm = torch.nn.utils.get_total_norm(gradients) / weight
        skipped = 1 - (loss.isfinite() & norm.isfinite()).float()
        pairs = zip(self.parameters.values(), gradients, strict=True) if probe else ()
        before = [_before(p, g / weight) for p, g in pairs]
        limit = self.optim.grad_clip_norm
        factor = 1.0 if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor / weight)  # the mean, clipped, in one pass
        self._update(dict(zip(self.parameters, gradients, strict=True)), lr, skipped)
        metrics = {"loss": loss / weight, "weight": weight, "grad_norm": norm, "skipped": skipped}
        return metrics | {"probe": self._probe(before)} if probe else metrics

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        sums = self.objective(self.model, batch)
        if sums["loss"].requires_grad:  # not so for rows without series in front of a frozen LM
            sums["loss"].backward()
        return sums["loss"].detach(), sums["weight"]

    @torch.no_grad()
    def _update(self, gradients: dict[str, Tensor], lr: Mapping[str, float], skipped: Tensor) -> None:
        is_fused = self.optim.name in FUSED and skipped.device.type in HONOURS_FOUND_INF
        (self._update_fused if is_fused else self._update_each)(gradients, lr, skipped)
        self.taken += 1 - skipped

    def _update_fused(self, gradients: dict[str, Tensor], lr: Mapping[str, float], skipped: Tensor) -> None:
        for (group, decay), names in self.groups.items():
            steps = self.taken.repeat(len(names)).unbind()  # the kernel counts in them
            FUSED[self.optim.name](
                [self.parameters[name] for name in names],
                [gradients[name] for name in names],
                [self.state[name]["m"] for name in names],
                [self.state[name]["v"] for name in names],
                [],
                list(steps),
                fused=True,
                found_inf=skipped,
                amsgrad=False,
                beta1=self.optim.betas[0],
                beta2=self.optim.betas[1],
                lr=lr[group],
                weight_decay=self.optim.weight_decay if decay else 0.0,
                eps=self.optim.eps,
                maximize=False,
            )

    def _update_each(self, gradients: dict[str, Tensor], lr: Mapping[str, float], skipped: Tensor) -> None:
        now, keep = clock(self.optim, self.taken + 1), skipped > 0
        for name, p in self.parameters.items():
            param, state = self.table[name], self.state[name]
            new, new_state = updated(self.optim, param, p, gradients[name], state, now, lr[param.group])
            p.copy_(torch.where(keep, p, new))
            for key, array in new_state.items():
                state[key].copy_(torch.where(keep, state[key], array))

    def _probe(self, before: list[tuple[Tensor, list[Tensor]]]) -> dict[str, dict[str, float]]:
        rows = []
        for (name, p), (old, (grad_norm, zeros, nonfinite)) in zip(self.parameters.items(), before, strict=True):
            moments = [self.state[name].get(key, torch.zeros_like(old)) for key in "mv"]
            norms = [_norm(x) for x in (old, p.detach() - old, *moments)]
            rows.append(torch.stack([grad_norm, *norms, zeros.float(), nonfinite.float()]))
        table = dict(zip(self.parameters, torch.stack(rows).tolist(), strict=True))
        return probe_records(table, {name: p.numel() for name, p in self.parameters.items()})

    def export(self) -> Arrays:
        """Optimiser state by canonical name; zeros where no step has been taken yet."""
        arrays = {f"{name}.{key}": x.cpu().numpy().copy() for name, s in self.state.items() for key, x in s.items()}
        return {**arrays, "step": np.asarray(self.taken.item(), np.float32)}

    def load(self, arrays: Arrays) -> None:
        """Take over a state exported by either backend."""
        expect_names(self.names, arrays, "optimiser state")
        self.taken.fill_(float(arrays["step"]))
        for name, state in self.state.items():
            for key, array in state.items():
                array.copy_(torch.from_numpy(arrays[f"{name}.{key}"]))


def _before(p: Tensor, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What a probe must look at before clipping and update: the parameter, and figures of its gradient."""
    return p.detach().clone(), [_norm(gradient), (gradient == 0).sum(), (~gradient.isfinite()).sum()]


def _norm(x: Tensor) -> Tensor:
    """L2 norm whose squares cannot underflow: a gradient of 1e-30 is not zero."""
    scale = x.abs().max()
    return torch.where((scale > 0) & scale.isfinite(), scale * (x / scale).norm(), scale)
