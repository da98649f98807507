"""One optimiser step in PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlx_training.backend import Arrays, Optim, expect_names, optimizer_groups, probe_records, step_seed
from mlx_training.data.batch import Batch
from mlx_training.objectives import Objective
from mlx_training.spec import Spec
from torch_backend.layers import LanguageModel

HONOURS_FOUND_INF = ("cpu", "cuda")  # devices whose fused kernel reads it; Metal's takes the argument and ignores it


class Step:
    """Gradients over micro-batches, one division by their total weight, clipping, AdamW.

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
        to_device: Callable[[Batch], Batch],
    ) -> None:
        self.model, self.objective, self.optim, self.seed, self.to_device = model, objective, optim, seed, to_device
        parameters = dict(model.named_parameters())
        self.parameters = {name: parameters[name] for name in spec.params()}
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [self.parameters[name] for name in names],
                    "group": group,
                    "weight_decay": optim.weight_decay if decay else 0.0,
                }
                for (group, decay), names in optimizer_groups(spec).items()
            ],
            lr=0.0,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,
        )

    @property
    def num_compilations(self) -> int:
        """Functions traced for compilation so far: none."""
        return 0

    def __call__(
        self, batches: Sequence[Batch], *, step: int, lr: Mapping[str, float], probe: bool = False
    ) -> dict[str, Any]:
        torch.manual_seed(step_seed(self.seed, step))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = [self._backward(self.to_device(batch)) for batch in batches]
        loss, weight = (torch.stack(values).sum() for values in zip(*sums, strict=True))
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        torch._foreach_div_(gradients, weight)
        norm = torch.nn.utils.get_total_norm(gradients)
        skipped = 1 - (loss.isfinite() & norm.isfinite()).float()
        before = [_before(p, g) for p, g in zip(self.parameters.values(), gradients, strict=True)] if probe else []
        if self.optim.grad_clip_norm is not None:
            torch._foreach_mul_(gradients, (self.optim.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        for p, gradient in zip(self.parameters.values(), gradients, strict=True):
            p.grad = gradient  # zero where a batch did not use the parameter: it decays all the same
        for group in self.optimizer.param_groups:
            group["lr"] = lr[group["group"]]
        self._update(skipped)
        metrics = {"loss": loss / weight, "weight": weight, "grad_norm": norm, "skipped": skipped}
        return metrics | {"probe": self._probe(before)} if probe else metrics

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        sums = self.objective(self.model, batch)
        if sums["loss"].requires_grad:  # not so for rows without series in front of a frozen LM
            sums["loss"].backward()
        return sums["loss"].detach(), sums["weight"]

    def _update(self, skipped: Tensor) -> None:
        if skipped.device.type in HONOURS_FOUND_INF and self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = skipped
            self.optimizer.step()
            return
        before = {name: tensor.clone() for name, tensor in self._tensors().items()}
        self.optimizer.step()
        for name, tensor in self._tensors().items():  # a state that is new here was zero before
            tensor.copy_(torch.where(skipped > 0, before.get(name, torch.zeros_like(tensor)), tensor))

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {name: p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{name}.{k}": v for k, v in self.optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
        return tensors

    def _probe(self, before: list[tuple[Tensor, list[Tensor]]]) -> dict[str, dict[str, float]]:
        rows = []
        for p, (old, (grad_norm, zeros, nonfinite)) in zip(self.parameters.values(), before, strict=True):
            state = self.optimizer.state[p]
            moments = [state.get(key, torch.zeros_like(old)) for key in ("exp_avg", "exp_avg_sq")]
            norms = [_norm(x) for x in (old, p.detach() - old, *moments)]
            rows.append(torch.stack([grad_norm, *norms, zeros.float(), nonfinite.float()]))
        table = dict(zip(self.parameters, torch.stack(rows).tolist(), strict=True))
        return probe_records(table, {name: p.numel() for name, p in self.parameters.items()})

    def export(self) -> Arrays:
        """Optimiser state by canonical name; zeros where no step has been taken yet."""
        arrays: Arrays = {"step": np.zeros((), np.float32)}
        for name, p in self.parameters.items():
            state = self.optimizer.state.get(p, {})
            for key, torch_key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                value = state.get(torch_key, torch.zeros_like(p))
                arrays[f"{name}.{key}"] = value.detach().float().cpu().numpy().copy()
            if state:
                arrays["step"] = np.asarray(state["step"].item(), np.float32)
        return arrays

    def load(self, arrays: Arrays) -> None:
        """Take over a state exported by either backend."""
        expect_names(["step", *(f"{n}.{k}" for n in self.parameters for k in "mv")], arrays, "optimiser state")
        for name, p in self.parameters.items():
            self.optimizer.state[p] = {
                "step": torch.tensor(float(arrays["step"]), dtype=torch.float32, device=p.device),
                "exp_avg": torch.tensor(arrays[f"{name}.m"], device=p.device),
                "exp_avg_sq": torch.tensor(arrays[f"{name}.v"], device=p.device),
            }


def _before(p: Tensor, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What a probe must look at before clipping and update: the parameter, and figures of its gradient."""
    return p.detach().clone(), [_norm(gradient), (gradient == 0).sum(), (~gradient.isfinite()).sum()]


def _norm(x: Tensor) -> Tensor:
    """L2 norm whose squares cannot underflow: a gradient of 1e-30 is not zero."""
    scale = x.abs().max()
    return torch.where((scale > 0) & scale.isfinite(), scale * (x / scale).norm(), scale)
