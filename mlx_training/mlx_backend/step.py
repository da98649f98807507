"""One optimiser step in MLX."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_training.backend import Arrays, Optim, expect_names, optimizer_groups, probe_records, step_seed
from mlx_training.data.batch import Batch
from mlx_training.mlx_backend.layers import LanguageModel
from mlx_training.objectives import Objective
from mlx_training.spec import Spec

Flat = dict[str, mx.array]


class Step:
    """Gradients over micro-batches, one division by their total weight, clipping, AdamW.

    The compiled functions are pure: parameters and optimiser state go in and come out, so nothing can be lost by
    a capture that was forgotten. Only the random state is captured (dropout). One trace a batch shape.
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
        self.groups = optimizer_groups(spec)
        parameters = self._parameters()
        self.optimizers = {(group, decay): self._optimizer(decay) for group, decay in self.groups}
        for key, names in self.groups.items():
            self.optimizers[key].init({name: parameters[name] for name in names})
        self.state = {key: optimizer.state for key, optimizer in self.optimizers.items()}
        self._num_traces = 0
        counted = [self._counted(f) for f in (self._gradients, self._update, self._whole)]
        self._compiled_gradients, self._compiled_update, self._compiled_whole = (
            mx.compile(f, mx.random.state, mx.random.state) for f in counted
        )

    @property
    def num_compilations(self) -> int:
        """Functions traced for compilation so far."""
        return self._num_traces

    def __call__(
        self, batches: Sequence[Batch], *, step: int, lr: Mapping[str, float], probe: bool = False
    ) -> dict[str, Any]:
        mx.random.seed(step_seed(self.seed, step))
        self.model.train()
        rates = {group: mx.array(rate, mx.float32) for group, rate in lr.items()}
        arrays = [self.to_device(batch).arrays() for batch in batches]
        parameters, states = self._parameters(), list(self.state.values())
        before = parameters
        if len(arrays) == 1 and not probe:
            parameters, states, metrics = self._compiled_whole(parameters, states, arrays[0], rates)
        else:
            sums, gradients = self._compiled_gradients(parameters, arrays[0])
            for more in arrays[1:]:
                more_sums, more_gradients = self._compiled_gradients(parameters, more)
                sums = [a + b for a, b in zip(sums, more_sums, strict=True)]
                gradients = {name: g + more_gradients[name] for name, g in gradients.items()}
            parameters, states, metrics = self._compiled_update(parameters, states, sums, gradients, rates)
        self.state = dict(zip(self.state, states, strict=True))
        self._attach(parameters)
        mx.async_eval(parameters, states, metrics)
        if not probe:
            return metrics
        gradients = {name: g / sums[1] for name, g in gradients.items()}
        return metrics | {"probe": self._probe(gradients, before, parameters)}

    def _gradients(self, parameters: Flat, arrays: dict[str, mx.array]) -> tuple[list[mx.array], Flat]:
        def loss(parameters: Flat) -> tuple[mx.array, mx.array]:
            self._attach(parameters)
            sums = self.objective(self.model, Batch(**arrays))
            return sums["loss"], sums["weight"]

        (total, weight), gradients = mx.value_and_grad(loss)(parameters)
        return [total, weight], gradients

    def _update(
        self, parameters: Flat, states: list[dict], sums: list[mx.array], gradients: Flat, rates: Flat
    ) -> tuple[Flat, list[dict], dict[str, mx.array]]:
        loss, weight = sums
        old_states = tree_map(lambda x: x, states)  # the optimiser writes into `states`
        gradients = {name: g / weight for name, g in gradients.items()}
        if self.optim.grad_clip_norm is not None:
            gradients, norm = optim.clip_grad_norm(gradients, self.optim.grad_clip_norm)
        else:
            norm = mx.sqrt(sum(g.square().sum() for g in gradients.values()))
        updated = dict(parameters)
        for (key, names), state in zip(self.groups.items(), states, strict=True):
            optimizer = self.optimizers[key]
            optimizer.state = state
            optimizer.learning_rate = rates[key[0]]
            group = {name: parameters[name] for name in names}
            updated |= optimizer.apply_gradients({name: gradients[name] for name in names}, group)
        new_states = [optimizer.state for optimizer in self.optimizers.values()]
        is_finite = mx.isfinite(loss) & mx.isfinite(norm)
        updated, new_states = tree_map(
            lambda new, old: mx.where(is_finite, new, old), (updated, new_states), (parameters, old_states)
        )
        skipped = 1 - is_finite.astype(mx.float32)
        return updated, new_states, {"loss": loss / weight, "weight": weight, "grad_norm": norm, "skipped": skipped}

    def _whole(
        self, parameters: Flat, states: list[dict], arrays: dict[str, mx.array], rates: Flat
    ) -> tuple[Flat, list[dict], dict[str, mx.array]]:
        sums, gradients = self._gradients(parameters, arrays)
        return self._update(parameters, states, sums, gradients, rates)

    def _counted(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counting how often Python runs it: once a trace."""

        def counted(*args: Any) -> Any:
            self._num_traces += 1
            return f(*args)

        return counted

    def _probe(self, gradients: Flat, before: Flat, after: Flat) -> dict[str, dict[str, float]]:
        states = {name: state[name] for state in self.state.values() for name in state if name in gradients}
        rows = []
        for name, g in gradients.items():
            moments = [states.get(name, {}).get(key, mx.zeros_like(g)) for key in "mv"]
            norms = [_norm(x) for x in (g, before[name], after[name] - before[name], *moments)]
            rows.append(mx.stack([*norms, (g == 0).sum(), mx.logical_not(mx.isfinite(g)).sum()]))
        table = dict(zip(gradients, mx.stack(rows).tolist(), strict=True))
        return probe_records(table, {name: g.size for name, g in gradients.items()})

    def _parameters(self) -> Flat:
        return dict(tree_flatten(self.model.trainable_parameters()))

    def _attach(self, parameters: Flat) -> None:
        self.model.update(tree_unflatten(list(parameters.items())))

    def _optimizer(self, decay: bool) -> optim.AdamW:
        o = self.optim
        # bias_correction is off by default in MLX: the first step would be 3.16 times too long
        return optim.AdamW(0.0, list(o.betas), o.eps, o.weight_decay if decay else 0.0, bias_correction=True)

    def export(self) -> Arrays:
        """Optimiser state by canonical name; zeros where no step has been taken yet."""
        arrays: Arrays = {}
        for (key, names), state in zip(self.groups.items(), self.state.values(), strict=True):
            for name in names:
                arrays |= {f"{name}.{k}": np.array(state[name][k]) for k in "mv"}
            arrays["step"] = np.asarray(self.state[key]["step"].item(), np.float32)
        return arrays

    def load(self, arrays: Arrays) -> None:
        """Take over a state exported by either backend."""
        names = [name for group in self.groups.values() for name in group]
        expect_names(["step", *(f"{name}.{k}" for name in names for k in "mv")], arrays, "optimiser state")
        for key, names in self.groups.items():
            state = self.state[key]
            state["step"] = mx.array(int(arrays["step"]), mx.uint64)
            for name in names:
                state[name] = {k: mx.array(arrays[f"{name}.{k}"]) for k in "mv"}


def _norm(x: mx.array) -> mx.array:
    """L2 norm whose squares cannot underflow: a gradient of 1e-30 is not zero."""
    scale = mx.abs(x).max()
    return mx.where((scale > 0) & mx.isfinite(scale), scale * mx.linalg.norm(x / scale), scale)
