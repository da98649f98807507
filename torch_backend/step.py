"""One optimiser step in PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlx_training.backend import Arrays, Optim, expect_names, optimizer_groups, step_seed
from mlx_training.data.batch import Batch
from mlx_training.objectives import Objective
from mlx_training.spec import Spec
from torch_backend.layers import LanguageModel


class Step:
    """Gradients over micro-batches, one division by their total weight, clipping, AdamW."""

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

    def __call__(self, batches: Sequence[Batch], *, step: int, lr: Mapping[str, float]) -> dict[str, Any]:
        torch.manual_seed(step_seed(self.seed, step))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = [self._backward(self.to_device(batch)) for batch in batches]
        loss, weight = (torch.stack(values).sum() for values in zip(*sums, strict=True))
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        torch._foreach_div_(gradients, weight)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.optim.grad_clip_norm is not None:
            torch._foreach_mul_(gradients, (self.optim.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        for p, gradient in zip(self.parameters.values(), gradients, strict=True):
            p.grad = gradient  # zero where a batch did not use the parameter: it decays all the same
        for group in self.optimizer.param_groups:
            group["lr"] = lr[group["group"]]
        self.optimizer.step()
        return {"loss": loss / weight, "weight": weight, "grad_norm": norm}

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        sums = self.objective(self.model, batch)
        if sums["loss"].requires_grad:  # not so for rows without series in front of a frozen LM
            sums["loss"].backward()
        return sums["loss"].detach(), sums["weight"]

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
