"""The MLX backend: device, precision, and the protocol of mlx_training.backend."""

import resource
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_training.backend import ALL_AT_ONCE, Arrays, Optim, Registered, Runtime, head_chunks, replaced
from mlx_training.checkpoint import check_shapes
from mlx_training.data.batch import Batch
from mlx_training.errors import BackendError
from mlx_training.mlx_backend.adapter import adapt
from mlx_training.mlx_backend.decoder import Decoder
from mlx_training.mlx_backend.frozen import frozen_hash, load_frozen
from mlx_training.mlx_backend.group import Group
from mlx_training.mlx_backend.kgram import Kgram
from mlx_training.mlx_backend.layers import LanguageModel
from mlx_training.mlx_backend.pretrained import PretrainedModel
from mlx_training.mlx_backend.recurrent import Recurrent
from mlx_training.mlx_backend.session import Session
from mlx_training.mlx_backend.ssm import SSM
from mlx_training.mlx_backend.step import Step
from mlx_training.mlx_backend.timeseries import TimeSeriesLM
from mlx_training.objectives import Objective
from mlx_training.spec import DecoderSpec, KgramSpec, PretrainedSpec, RecurrentSpec, Spec, SSMSpec, TimeSeriesSpec

FAMILIES: dict[type[Spec], Callable[..., LanguageModel]] = {  # models trained from scratch
    DecoderSpec: Decoder,
    RecurrentSpec: Recurrent,
    KgramSpec: Kgram,
    SSMSpec: SSM,
}


class Backend:
    """MLX on Metal or the CPU."""

    name = "mlx"

    def __init__(self, runtime: Runtime) -> None:
        self.device = _device(runtime.device)
        mx.set_default_device(self.device)
        self.runtime = replace(runtime, device="gpu" if self.device == mx.Device(mx.gpu) else "cpu")
        self.group = Group()
        self.dtype = getattr(mx, runtime.precision)

    def build(self, spec: Spec) -> LanguageModel:
        if self.runtime.shard and self.group.size > 1:
            raise BackendError(
                f"performance.shard: given true for {self.group.size} processes of MLX, which cannot share out a "
                "model; set it to false, or use --backend torch and torchrun"
            )
        model: LanguageModel
        if isinstance(spec, PretrainedSpec):
            lm = load_frozen(spec.llm, precision=self.runtime.precision, device=self.device)
            if spec.adapter:
                adapt(lm, spec.adapter)
            if isinstance(spec, TimeSeriesSpec):
                model = TimeSeriesLM(spec, lm, self.runtime)
            else:
                model = PretrainedModel(spec, lm, self.runtime)
        else:
            model = FAMILIES[type(spec)](spec, self.dtype)
        model.spec = spec
        model.gradient_checkpointing = self.runtime.gradient_checkpointing
        model.head_chunks = head_chunks(spec) if self.runtime.chunked_head else ALL_AT_ONCE
        return model

    def load(self, model: LanguageModel, arrays: Arrays) -> None:
        parameters = self._trainable(model)
        given = {name: array.shape for name, array in arrays.items()}
        check_shapes({name: tuple(p.shape) for name, p in parameters.items()}, given, "parameters")
        model.update(tree_unflatten([(name, mx.array(array)) for name, array in arrays.items()]))

    def export(self, model: LanguageModel) -> Arrays:
        return {name: np.array(p.astype(mx.float32)) for name, p in self._trainable(model).items()}

    def make_step(self, model: LanguageModel, objective: Objective, optim: Optim, *, seed: int) -> Step:
        return Step(
            model,
            model.spec,
            objective,
            optim,
            seed=seed,
            group=self.group,
            to_device=partial(self._ready, model),
            compiles=self.runtime.compile != "off",
        )

    def score(self, model: LanguageModel, objective: Objective, batch: Batch) -> dict[str, float]:
        model.eval()
        sums = objective(model, self._ready(model, batch))
        return {name: float(value) for name, value in sums.items()}

    def score_tokens(self, model: LanguageModel, batch: Batch) -> Arrays:
        model.eval()
        logprobs, hits = model.scored(self.to_device(batch))
        return {"logprobs": np.array(logprobs), "hits": np.array(hits)}

    def parameters(self, model: LanguageModel) -> dict[str, Registered]:
        trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
        known = tree_flatten(model.parameters())
        return {name: Registered(tuple(p.shape), name in trainable, mx.isfinite(p).all().item()) for name, p in known}

    def gradients(
        self,
        model: LanguageModel,
        objective: Objective,
        batch: Batch,
        *,
        wrt: Literal["parameters", "inputs"] = "parameters",
    ) -> Arrays:
        model.eval()
        batch = self._ready(model, batch) if wrt == "parameters" else self.to_device(batch)

        def mean() -> mx.array:
            sums = objective(model, batch)
            return sums["loss"] / sums["weight"]

        if wrt == "inputs":
            embed = model.inputs

            def moved(change: mx.array) -> mx.array:
                with replaced(model, "inputs", lambda batch: embed(batch) + change):
                    return mean()

            return {"inputs": _numpy(mx.grad(moved)(mx.zeros_like(embed(batch))))}

        def loss(parameters: dict[str, mx.array]) -> mx.array:
            model.update(tree_unflatten(list(parameters.items())))
            return mean()

        parameters = self._trainable(model)
        gradients = mx.grad(loss)(parameters)
        model.update(tree_unflatten(list(parameters.items())))
        return {name: _numpy(g) for name, g in gradients.items()}

    def activations(self, model: LanguageModel, objective: Objective, batch: Batch) -> Arrays:
        model.eval()
        outputs: dict[str, mx.array] = {}
        last: dict[str, mx.array] = {}
        paths = {id(module): path for path, module in model.named_modules() if path}

        def record(cls: type, call: Callable[..., Any]) -> Callable[..., Any]:
            def recording(module: Any, *args: Any, **kwargs: Any) -> Any:
                output = call(module, *args, **kwargs)
                if type(module) is cls and id(module) in paths and isinstance(output, mx.array):
                    outputs.setdefault(paths[id(module)], output)
                return output

            return recording

        def recorded(name: str, method: Callable[[Batch], mx.array]) -> Callable[[Batch], mx.array]:
            def recording_method(batch: Batch) -> mx.array:
                output = method(batch)
                last.setdefault(name, output)
                return output

            return recording_method

        with ExitStack() as stack:  # MLX has no hooks: for a while the classes themselves record
            for cls, call in {type(m): type(m).__call__ for _, m in model.named_modules()}.items():
                if any("__call__" in vars(base) for base in cls.__mro__):
                    stack.enter_context(replaced(cls, "__call__", record(cls, call)))
            for name in ("inputs", "logprobs"):  # somebody's own model need not have them
                if hasattr(model, name):
                    stack.enter_context(replaced(model, name, recorded(name, getattr(model, name))))
            objective(model, self.to_device(batch))
        return {path: _numpy(x) for path, x in (outputs | last).items()}

    def session(self, model: LanguageModel) -> Session:
        model.eval()
        return Session(model, to_device=partial(self._prompts, model))

    def frozen_hash(self, model: LanguageModel) -> str:
        return frozen_hash(model.lm) if isinstance(model, PretrainedModel) else ""

    def peak_memory(self) -> int:
        if self.runtime.device == "gpu":
            return mx.get_peak_memory()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def to_device(self, batch: Batch) -> Batch:
        """The batch as MLX arrays."""
        arrays: dict[str, Any] = {name: mx.array(array) for name, array in batch.arrays().items()}
        return Batch(**arrays, rows=batch.rows)

    def _ready(self, model: LanguageModel, batch: Batch) -> Batch:
        """The batch on the device, with what the model need not compute again for each of its gradients."""
        past = model.past(batch) if isinstance(model, LanguageModel) else None  # somebody's own model is none
        return replace(self.to_device(batch), past=past)

    def _prompts(self, model: LanguageModel, batch: Batch) -> Batch:
        """The prompts on the device, with what they begin with."""
        return replace(self.to_device(batch), past=model.shared_past(batch))

    def _trainable(self, model: LanguageModel) -> dict[str, mx.array]:
        parameters = dict(tree_flatten(model.parameters()))
        return {name: parameters[name] for name in model.spec.params()}


def _numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


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
