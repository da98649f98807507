"""The MLX backend: device, precision, and the protocol of mlx_training.backend."""

import resource
import sys
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_training.backend import Arrays, Optim, Runtime
from mlx_training.checkpoint import check_shapes
from mlx_training.data.batch import Batch
from mlx_training.errors import BackendError
from mlx_training.mlx_backend.decoder import Decoder
from mlx_training.mlx_backend.layers import LanguageModel
from mlx_training.mlx_backend.pretrained import frozen_hash, load_pretrained
from mlx_training.mlx_backend.session import Session
from mlx_training.mlx_backend.step import Step
from mlx_training.mlx_backend.timeseries import TimeSeriesLM
from mlx_training.objectives import Objective
from mlx_training.spec import DecoderSpec, Spec, TimeSeriesSpec


class Backend:
    """MLX on Metal or the CPU."""

    name = "mlx"

    def __init__(self, runtime: Runtime) -> None:
        self.device = _device(runtime.device)
        mx.set_default_device(self.device)
        self.runtime = replace(runtime, device="gpu" if self.device == mx.Device(mx.gpu) else "cpu")
        self.dtype = getattr(mx, runtime.precision)

    def build(self, spec: Spec) -> LanguageModel:
        model: LanguageModel
        if isinstance(spec, TimeSeriesSpec):
            lm = load_pretrained(
                spec.llm.directory, precision=self.runtime.precision, weights=spec.llm.weights, device=self.device
            )
            model = TimeSeriesLM(spec, lm)
        else:
            assert isinstance(spec, DecoderSpec), f"no MLX realisation of {type(spec).__name__}"
            model = Decoder(spec, self.dtype)
        model.spec = spec
        return model

    def load(self, model: LanguageModel, arrays: Arrays) -> None:
        parameters = self._trainable(model)
        given = {name: array.shape for name, array in arrays.items()}
        check_shapes({name: tuple(p.shape) for name, p in parameters.items()}, given, "parameters")
        model.update(tree_unflatten([(name, mx.array(array)) for name, array in arrays.items()]))

    def export(self, model: LanguageModel) -> Arrays:
        return {name: np.array(p.astype(mx.float32)) for name, p in self._trainable(model).items()}

    def make_step(self, model: LanguageModel, objective: Objective, optim: Optim, *, seed: int) -> Step:
        return Step(model, model.spec, objective, optim, seed=seed, to_device=self.to_device)

    def score(self, model: LanguageModel, objective: Objective, batch: Batch) -> dict[str, float]:
        model.eval()
        sums = objective(model, self.to_device(batch))
        return {name: float(value) for name, value in sums.items()}

    def gradients(self, model: LanguageModel, objective: Objective, batch: Batch) -> Arrays:
        model.eval()
        batch, parameters = self.to_device(batch), self._trainable(model)

        def loss(parameters: dict[str, mx.array]) -> mx.array:
            model.update(tree_unflatten(list(parameters.items())))
            sums = objective(model, batch)
            return sums["loss"] / sums["weight"]

        gradients = mx.grad(loss)(parameters)
        model.update(tree_unflatten(list(parameters.items())))
        return {name: np.array(g.astype(mx.float32)) for name, g in gradients.items()}

    def session(self, model: LanguageModel) -> Session:
        model.eval()
        return Session(model, to_device=self.to_device)

    def frozen_hash(self, model: LanguageModel) -> str:
        return frozen_hash(model.lm) if isinstance(model, TimeSeriesLM) else ""

    def peak_memory(self) -> int:
        if self.runtime.device == "gpu":
            return mx.get_peak_memory()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def to_device(self, batch: Batch) -> Batch:
        """The batch as MLX arrays."""
        arrays: dict[str, Any] = {name: mx.array(array) for name, array in batch.arrays().items()}
        return Batch(**arrays, rows=batch.rows)

    def _trainable(self, model: LanguageModel) -> dict[str, mx.array]:
        parameters = dict(tree_flatten(model.parameters()))
        return {name: parameters[name] for name in model.spec.params()}


def _device(name: str) -> mx.Device:
    has_gpu = mx.is_available(mx.Device(mx.gpu))
    if name == "auto":
        return mx.Device(mx.gpu if has_gpu else mx.cpu)
    if name == "cpu":
        return mx.Device(mx.cpu)
    if name == "gpu" and has_gpu:
        return mx.Device(mx.gpu)
    usable = "auto, cpu, gpu" if has_gpu else "auto, cpu"
    raise BackendError(
        f"device {name!r} is not present for MLX {mx.__version__} on this machine; usable here: {usable}. "
        "cuda and mps are PyTorch's names (--backend torch)."
    )
