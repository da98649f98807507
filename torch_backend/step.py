"""One optimiser step in PyTorch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from mlx_training.backend import Arrays, Optim, expect_names, optimizer_groups, probe_records, step_seed
from mlx_training.data.batch import Batch
from mlx_training.errors import BackendError
from mlx_training.objectives import Objective
from mlx_training.spec import Spec
from torch_backend.group import Group
from torch_backend.layers import LanguageModel
from torch_backend.optimizers import State, averaging, clock, updated
from torch_backend.sharding import gathered, is_sharded, own, own_part

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
        compiles: bool,
    ) -> None:
        self.model, self.objective, self.optim, self.seed, self.to_device = model, objective, optim, seed, to_device
        self.group = group
        leaves, self.table = dict(model.named_parameters()), spec.params()
        self.leaves = {name: leaves[name] for name in self.table}  # what gradients belong to
        self.parameters = {name: own(p) for name, p in self.leaves.items()}  # what this process updates
        self.is_sharded = any(map(is_sharded, self.leaves.values()))
        self.names = list(optim.state_shapes(spec))
        self.state: dict[str, State] = {
            name: {  # of a sharded parameter element by element
                key: torch.zeros(p.shape if self.is_sharded else shape, device=p.device)
                for key, shape in optim.state(self.table[name]).items()
            }
            for name, p in self.parameters.items()
        }
        self.averages = {} if optim.ema_decay is None else {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.taken = torch.zeros((), device=next(iter(self.parameters.values())).device)
        self.groups = optimizer_groups(spec)
        self._num_graphs = 0
        self.compiles = compiles
        self._loss = self._compile() if compiles else self._sums

    @property
    def num_compilations(self) -> int:
        """Graphs compiled so far; 0 where nothing is compiled."""
        return self._num_graphs

    def __call__(
        self, batches: Sequence[Batch], *, step: int, lr: Mapping[str, float], probe: bool = False
    ) -> dict[str, Any]:
        torch.manual_seed(step_seed(self.seed, step, self.group.rank))
        self.model.train()
        for p in self.leaves.values():
            p.grad = None
        sums = [self._backward(self.to_device(batch)) for batch in batches]
        loss, weight = (torch.stack(values).sum() for values in zip(*sums, strict=True))
        # zero where a batch did not use the parameter: it decays all the same
        gradients = [own(p.grad if p.grad is not None else torch.zeros_like(p)) for p in self.leaves.values()]
        if self.group.size > 1 and not self.is_sharded:
            loss, weight, *gradients = self.group.sum([loss, weight, *gradients])
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.is_sharded:  # each backward pass has summed its gradients
            loss, weight, square = self.group.sum([loss, weight, norm.square()])
            norm = square.sqrt()
        norm = norm / weight
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
        rows = () if self.compiles else batch.rows  # numbers that would be compiled anew for every batch
        loss, weight = self._loss(batch.arrays(), rows)
        if loss.requires_grad:  # not so for rows without series in front of a frozen LM
            loss.backward()
        return loss.detach(), weight

    def _sums(self, arrays: dict[str, Tensor], rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        sums = self.objective(self.model, Batch(**arrays, rows=rows))
        return sums["loss"], sums["weight"]

    def _compile(self) -> Callable[..., tuple[Tensor, Tensor]]:
        from torch._dynamo.exc import TorchDynamoException

        compiled = torch.compile(self._sums, backend=self._compiled)

        def sums(arrays: dict[str, Tensor], rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            try:
                return compiled(arrays, rows)
            except TorchDynamoException as error:
                cause = getattr(error, "inner_exception", error)
                reason = f"{type(cause).__name__}: {str(cause).strip()}".split("\n", 1)[0]
                raise BackendError(
                    f"PyTorch could not compile this model ({reason}). Train without compiling: "
                    "performance.compile=off. After a run that was killed while it compiled, emptying PyTorch's cache "
                    "(TORCHINDUCTOR_CACHE_DIR, else torchinductor_<user> among temporary files) may do"
                ) from error

        return sums

    def _compiled(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self._num_graphs += 1
        return _inductor(graph, inputs)

    @torch.no_grad()
    def _update(self, gradients: dict[str, Tensor], lr: Mapping[str, float], skipped: Tensor) -> None:
        is_fused = self.optim.name in FUSED and skipped.device.type in HONOURS_FOUND_INF
        (self._update_fused if is_fused else self._update_each)(gradients, lr, skipped)
        if self.averages:
            share = averaging(self.optim, self.taken + 1) * (1 - skipped)
            for name, average in self.averages.items():
                average.lerp_(self.parameters[name], share)
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
        now = clock(self.optim, self.taken + 1, skipped == 0)
        for name, p in self.parameters.items():
            param, state = self.table[name], self.state[name]
            new, new_state = updated(self.optim, param, p, gradients[name], state, now, lr[param.group])
            p.copy_(new)
            for key, array in new_state.items():
                state[key].copy_(array)

    def _probe(self, before: list[tuple[Tensor, list[Tensor]]]) -> dict[str, dict[str, float]]:
        rows = []
        for (name, p), (old, (grad_norm, zeros, nonfinite)) in zip(self.parameters.items(), before, strict=True):
            moments = [self.state[name].get(key, torch.zeros_like(old)) for key in "mv"]
            norms = [_norm(x) for x in (old, p.detach() - old, *moments)]
            rows.append(torch.stack([grad_norm, *norms, zeros.float(), nonfinite.float()]))
        figures = torch.stack(rows)
        if self.is_sharded:
            figures = self._of_all_shares(figures)
        table = dict(zip(self.parameters, figures.tolist(), strict=True))
        return probe_records(table, {name: param.size for name, param in self.table.items()})

    def _of_all_shares(self, figures: Tensor) -> Tensor:
        """The figures of whole parameters, float64, from those of this process's shares: five norms and two counts."""
        shares = figures.new_zeros(self.group.size, *figures.shape)
        shares[self.group.rank] = figures
        shares = self.group.sum([shares])[0].double()
        return torch.cat([shares[..., :5].norm(dim=0), shares[..., 5:].sum(0)], dim=-1)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """For a while the model has the averages of its weights, if there are any."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self.averages.items() if self.averages and self.taken else ():
            weights = self.parameters[name].clone()
            self.parameters[name].copy_(average)
            average.copy_(weights)

    def export(self) -> Arrays:
        """Optimiser state by canonical name; zeros where no step has been taken yet."""
        state = [(f"{name}.{key}", x, self.leaves[name]) for name, s in self.state.items() for key, x in s.items()]
        state += [(f"{name}.raw", self.parameters[name].detach(), self.leaves[name]) for name in self.averages]
        arrays = gathered(state)
        return {**arrays, "step": np.asarray(self.taken.item(), np.float32)}

    @torch.no_grad()
    def load(self, arrays: Arrays) -> None:
        """Take over a state exported by either backend."""
        expect_names(self.names, arrays, "optimiser state")
        self.taken.fill_(float(arrays["step"]))
        for name, state in self.state.items():
            for key, array in state.items():
                array.copy_(own_part(torch.from_numpy(arrays[f"{name}.{key}"]), self.leaves[name]))
        for name, average in self.averages.items():
            average.copy_(self.parameters[name])
            self.parameters[name].copy_(own_part(torch.from_numpy(arrays[f"{name}.raw"]), self.leaves[name]))


def _inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """PyTorch's compiler, with the dropout masks that are drawn without it."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches={"fallback_random": True})


def _before(p: Tensor, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What a probe must look at before clipping and update: the parameter, and figures of its gradient."""
    return p.detach().clone(), [_norm(gradient), (gradient == 0).sum(), (~gradient.isfinite()).sum()]


def _norm(x: Tensor) -> Tensor:
    """L2 norm whose squares cannot underflow: a gradient of 1e-30 is not zero."""
    if not x.numel():  # a share of few rows
        return x.new_zeros(())
    scale = x.abs().max()
    return torch.where((scale > 0) & scale.isfinite(), scale * (x / scale).norm(), scale)
