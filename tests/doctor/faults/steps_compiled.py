"""An optimiser step of one's own in MLX, compiled as a whole, with state that may or may not be given to compile."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_training.backend import Arrays, step_seed
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.subject import Subject


class CompiledStep:
    """AdamW with global-norm clipping. As it stands it is right: all state goes in and comes out."""

    def __init__(self, subject: Subject) -> None:
        import mlx.core as mx

        self.backend, self.model, self.objective = subject.backend, subject.model, subject.objective
        self.optim, self.seed, self.table, self.num_compilations = subject.optim, subject.seed, subject.spec.params(), 0
        zeros = {name: mx.zeros(param.shape) for name, param in self.table.items()}
        self.m, self.v, self.taken = zeros, dict(zeros), mx.array(0.0)
        self.compiled = mx.compile(self.take, mx.random.state, mx.random.state)

    def __call__(
        self, batches: Sequence[Batch], *, step: int, lr: Mapping[str, float], probe: bool = False
    ) -> dict[str, Any]:
        import mlx.core as mx

        mx.random.seed(step_seed(self.seed, step))
        self.model.train()
        arrays = [{k: mx.array(v) for k, v in batch.arrays().items()} for batch in batches]
        before = self.backend.export(self.model)
        state, metrics = self.run(arrays, {group: mx.array(rate) for group, rate in lr.items()})
        if state is not None:
            parameters, self.m, self.v, self.taken = state
            self.attach(parameters)
            if probe:
                after = self.backend.export(self.model)
                metrics["probe"] = {name: self.probe(name, before[name], after[name]) for name in self.table}
        return {**metrics, "skipped": 0.0}

    def run(self, arrays: list[dict[str, Any]], rates: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """New state and metrics."""
        return self.compiled(self.state(), arrays, rates)

    def state(self) -> list[Any]:
        """Parameters, moments and number of steps."""
        from mlx.utils import tree_flatten

        parameters = dict(tree_flatten(self.model.parameters()))
        return [{name: parameters[name] for name in self.table}, self.m, self.v, self.taken]

    def take(self, state: list[Any], batches: list[dict[str, Any]], rates: dict[str, Any]) -> tuple[list[Any], Any]:
        """One step as a function of arrays."""
        import mlx.core as mx

        self.num_compilations += 1
        parameters, m, v, taken = state

        def loss(parameters: dict[str, Any]) -> tuple[Any, Any]:
            self.attach(parameters)
            sums = [self.objective(self.model, Batch(**arrays)) for arrays in batches]
            weight = sum(s["weight"] for s in sums)
            return sum(s["loss"] for s in sums) / weight, weight

        (mean, weight), gradients = mx.value_and_grad(loss)(parameters)
        norm = mx.sqrt(sum(g.square().sum() for g in gradients.values()))
        factor = mx.minimum(1.0, (self.optim.grad_clip_norm or float("inf")) / (norm + 1e-6))
        (beta1, beta2), taken, updated, new_m, new_v = self.optim.betas, taken + 1, {}, {}, {}
        for name, value in parameters.items():
            gradient, param = gradients[name] * factor, self.table[name]
            new_m[name] = beta1 * m[name] + (1 - beta1) * gradient
            new_v[name] = beta2 * v[name] + (1 - beta2) * gradient**2
            direction = new_m[name] / (1 - beta1**taken)
            direction = direction / (mx.sqrt(new_v[name] / (1 - beta2**taken)) + self.optim.eps)
            decay = self.optim.weight_decay if param.decay else 0.0
            updated[name] = value * (1 - rates[param.group] * decay) - rates[param.group] * direction
        return [updated, new_m, new_v, taken], {"loss": mean, "weight": weight, "grad_norm": norm}

    def attach(self, parameters: dict[str, Any]) -> None:
        """Put arrays into the model."""
        from mlx.utils import tree_unflatten

        self.model.update(tree_unflatten(list(parameters.items())))

    def probe(self, name: str, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
        """What a step with probe=True says about one parameter; the gradient is read off the first moment."""
        m, v = np.array(self.m[name]), np.array(self.v[name])
        norms = {"grad": m / (1 - self.optim.betas[0]), "param": after, "update": after - before, "m": m, "v": v}
        figures = {f"{key}_norm": float(np.linalg.norm(values)) for key, values in norms.items()}
        return figures | {"zeros": float((m == 0).mean()), "nonfinite": int((~np.isfinite(m)).sum())}

    def export(self) -> Arrays:
        """Moments by canonical name, and the number of steps."""
        moments = {f"{name}.{k}": np.array(getattr(self, k)[name]) for name in self.table for k in "mv"}
        return moments | {"step": np.asarray(self.taken.item(), np.float32)}

    def load(self, arrays: Arrays) -> None:
        """Take over what `export` returned."""
        import mlx.core as mx

        self.taken = mx.array(float(arrays["step"]))
        self.m, self.v = ({name: mx.array(arrays[f"{name}.{k}"]) for name in self.table} for k in "mv")


class StateNotCaptured(CompiledStep):
    """Parameters and moments are read inside the compiled function, where they are constants of its first trace."""

    def run(self, arrays: list[dict[str, Any]], rates: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        import mlx.core as mx

        if not hasattr(self, "constant"):
            step = lambda arrays, rates: self.take(self.state(), arrays, rates)  # noqa: E731
            self.constant = mx.compile(step, mx.random.state, mx.random.state)
        return self.constant(arrays, rates)


class StateNotReturned(CompiledStep):
    """The compiled function updates the model itself and returns the loss only."""

    def run(self, arrays: list[dict[str, Any]], rates: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        import mlx.core as mx

        def step(state: list[Any], arrays: list[dict[str, Any]], rates: dict[str, Any]) -> Any:
            (parameters, *_), metrics = self.take(state, arrays, rates)
            self.attach(parameters)
            return metrics

        if not hasattr(self, "silent"):
            self.silent = mx.compile(step, mx.random.state, mx.random.state)
        return None, self.silent(self.state(), arrays, rates)
