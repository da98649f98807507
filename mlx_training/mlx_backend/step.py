"""One optimiser step in MLX."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_training.backend import Arrays, Optim, expect_names, probe_records, step_seed
from mlx_training.data.batch import Batch
from mlx_training.mlx_backend.group import Group
from mlx_training.mlx_backend.layers import LanguageModel
from mlx_training.mlx_backend.optimizers import State, averaging, clock, updated
from mlx_training.objectives import Objective
from mlx_training.spec import Spec

Flat = dict[str, mx.array]
States = tuple[dict[str, State], Flat, mx.array]  # of every parameter, averages if any, the number of steps taken


class Step:
    """Gradients over micro-batches and processes, one division by their total weight, clipping, the optimiser's update.

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
        group: Group,
        to_device: Callable[[Batch], Batch],
        compiles: bool,
    ) -> None:
        self.model, self.objective, self.optim, self.seed, self.to_device = model, objective, optim, seed, to_device
        self.group = group
        self.table, self.names = spec.params(), list(optim.state_shapes(spec))
        self.state: dict[str, State] = {
            name: {key: mx.zeros(shape) for key, shape in optim.state(param).items()}
            for name, param in self.table.items()
        }
        shapes = {name: param.shape for name, param in self.table.items() if optim.ema_decay is not None}
        self.averages: Flat = {name: mx.zeros(shape) for name, shape in shapes.items()}
        self.taken = mx.array(0.0)
        self._num_traces = 0

        def prepared(f: Callable[..., Any]) -> Callable[..., Any]:
            return mx.compile(self._counted(f), mx.random.state, mx.random.state) if compiles else f

        self._compiled_gradients, self._compiled_update = prepared(self._gradients), prepared(self._update)
        self._compiled_whole = prepared(self._whole)

    @property
    def num_compilations(self) -> int:
        """Functions traced for compilation so far; 0 where nothing is compiled."""
        return self._num_traces

    def __call__(
        self, batches: Sequence[Batch], *, step: int, lr: Mapping[str, float], probe: bool = False
    ) -> dict[str, Any]:
        mx.random.seed(step_seed(self.seed, step, self.group.rank))
        self.model.train()
        rates = {group: mx.array(rate, mx.float32) for group, rate in lr.items()}
        arrays = [self.to_device(batch).arrays() for batch in batches]
        parameters, states = self._parameters(), (self.state, self.averages, self.taken)
        before = parameters
        if len(arrays) == 1 and not probe and self.group.size == 1:
            parameters, states, metrics = self._compiled_whole(parameters, states, arrays[0], rates)
        else:
            sums, gradients = self._compiled_gradients(parameters, arrays[0])
            for more in arrays[1:]:
                more_sums, more_gradients = self._compiled_gradients(parameters, more)
                sums = [a + b for a, b in zip(sums, more_sums, strict=True)]
                gradients = {name: g + more_gradients[name] for name, g in gradients.items()}
            if self.group.size > 1:
                summed = self.group.sum([*sums, *gradients.values()])
                sums, gradients = summed[:2], dict(zip(gradients, summed[2:], strict=True))
            parameters, states, metrics = self._compiled_update(parameters, states, sums, gradients, rates)
        self.state, self.averages, self.taken = states
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
        self, parameters: Flat, states: States, sums: list[mx.array], gradients: Flat, rates: Flat
    ) -> tuple[Flat, States, dict[str, mx.array]]:
        (loss, weight), (state, averages, taken) = sums, states
        norm = mx.sqrt(sum(g.square().sum() for g in gradients.values())) / weight
        is_finite = mx.isfinite(loss) & mx.isfinite(norm)
        factor = 1 / weight
        if self.optim.grad_clip_norm is not None:
            factor = factor * mx.minimum(self.optim.grad_clip_norm / (norm + 1e-6), 1.0)
        moved, moments, now = dict(parameters), dict(state), clock(self.optim, taken + 1, is_finite)
        for name, param in self.table.items():
            p, g, rate = parameters[name], gradients[name] * factor, rates[param.group]
            moved[name], moments[name] = updated(self.optim, param, p, g, state[name], now, rate)
        if averages:
            share = now.kept(averaging(self.optim, taken + 1), mx.zeros_like(taken))
            averages = {name: average + share * (moved[name] - average) for name, average in averages.items()}
        metrics = {"loss": loss / weight, "weight": weight, "grad_norm": norm}
        metrics["skipped"] = 1 - is_finite.astype(mx.float32)
        return moved, (moments, averages, now.kept(taken + 1, taken)), metrics

    def _whole(
        self, parameters: Flat, states: States, arrays: dict[str, mx.array], rates: Flat
    ) -> tuple[Flat, States, dict[str, mx.array]]:
        sums, gradients = self._gradients(parameters, arrays)
        return self._update(parameters, states, sums, gradients, rates)

    def _counted(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counting how often Python runs it: once a trace."""

        def counted(*args: Any) -> Any:
            self._num_traces += 1
            return f(*args)

        return counted

    def _probe(self, gradients: Flat, before: Flat, after: Flat) -> dict[str, dict[str, float]]:
        rows = []
        for name, g in gradients.items():
            moments = [self.state[name].get(key, mx.zeros_like(g)) for key in "mv"]
            norms = [_norm(x) for x in (g, before[name], after[name] - before[name], *moments)]
            rows.append(mx.stack([*norms, (g == 0).sum(), mx.logical_not(mx.isfinite(g)).sum()]))
        table = dict(zip(gradients, mx.stack(rows).tolist(), strict=True))
        return probe_records(table, {name: g.size for name, g in gradients.items()})

    def _parameters(self) -> Flat:
        return dict(tree_flatten(self.model.trainable_parameters()))

    def _attach(self, parameters: Flat) -> None:
        self.model.update(tree_unflatten(list(parameters.items())))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """For a while the model has the averages of its weights, if there are any."""
        weights = self._parameters()
        self._attach(self.averages if self.averages and self.taken.item() else {})
        try:
            yield
        finally:
            self._attach(weights)

    def export(self) -> Arrays:
        """Optimiser state by canonical name; zeros where no step has been taken yet."""
        arrays = {f"{name}.{key}": np.array(x) for name, state in self.state.items() for key, x in state.items()}
        arrays |= {f"{name}.raw": np.array(p) for name, p in self._parameters().items() if name in self.averages}
        return {**arrays, "step": np.asarray(self.taken.item(), np.float32)}

    def load(self, arrays: Arrays) -> None:
        """Take over a state exported by either backend."""
        expect_names(self.names, arrays, "optimiser state")
        self.taken = mx.array(float(arrays["step"]))
        self.state = {
            name: {key: mx.array(arrays[f"{name}.{key}"]) for key in state} for name, state in self.state.items()
        }
        if self.averages:
            self.averages = self._parameters()
            self._attach({name: mx.array(arrays[f"{name}.raw"]) for name in self.averages})


def _norm(x: mx.array) -> mx.array:
    """L2 norm whose squares cannot underflow: a gradient of 1e-30 is not zero."""
    scale = mx.abs(x).max()
    return mx.where((scale > 0) & mx.isfinite(scale), scale * mx.linalg.norm(x / scale), scale)
