"""The PyTorch backend: device, precision, and the protocol of mlx_training.backend."""

import resource
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mlx_training.backend import ALL_AT_ONCE, Arrays, Optim, Registered, Runtime, head_chunks, replaced
from mlx_training.checkpoint import check_shapes
from mlx_training.data.batch import Batch
from mlx_training.errors import BackendError
from mlx_training.objectives import Objective
from mlx_training.spec import DecoderSpec, KgramSpec, PretrainedSpec, RecurrentSpec, Spec, SSMSpec, TimeSeriesSpec
from torch_backend.adapter import adapt
from torch_backend.decoder import Decoder
from torch_backend.frozen import frozen_hash, load_frozen
from torch_backend.group import Group
from torch_backend.kgram import Kgram
from torch_backend.layers import LanguageModel
from torch_backend.pretrained import PretrainedModel
from torch_backend.recurrent import Recurrent
from torch_backend.session import Session
from torch_backend.sharding import gathered, is_sharded, own, own_part, shard
from torch_backend.ssm import SSM
from torch_backend.step import Step
from torch_backend.timeseries import TimeSeriesLM

FAMILIES: dict[type[Spec], Callable[..., LanguageModel]] = {  # models trained from scratch
    DecoderSpec: Decoder,
    RecurrentSpec: Recurrent,
    KgramSpec: Kgram,
    SSMSpec: SSM,
}


class Backend:
    """PyTorch on CUDA, Metal (MPS) or the CPU."""

    name = "torch"

    def __init__(self, runtime: Runtime) -> None:
        self.device = torch.device(_device(runtime.device))
        self.runtime = replace(runtime, device=self.device.type)
        self.group = Group()
        self.dtype = getattr(torch, runtime.precision)

    def build(self, spec: Spec) -> LanguageModel:
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
        if self.runtime.shard and self.group.size > 1:
            shard(model, self.device)
        return model.to(self.device)

    def load(self, model: LanguageModel, arrays: Arrays) -> None:
        parameters = self._trainable(model)
        given = {name: array.shape for name, array in arrays.items()}
        check_shapes({name: tuple(p.shape) for name, p in parameters.items()}, given, "parameters")
        with torch.no_grad():
            for name, array in arrays.items():
                own(parameters[name]).copy_(own_part(torch.from_numpy(array), parameters[name]))

    def export(self, model: LanguageModel) -> Arrays:
        return gathered((name, own(p), p) for name, p in self._trainable(model).items())

    def make_step(self, model: LanguageModel, objective: Objective, optim: Optim, *, seed: int) -> Step:
        return Step(
            model,
            model.spec,
            objective,
            optim,
            seed=seed,
            group=self.group,
            to_device=partial(self._ready, model),
            compiles=self._compiles,
        )

    @torch.no_grad()
    def score(self, model: LanguageModel, objective: Objective, batch: Batch) -> dict[str, float]:
        model.eval()
        sums = objective(model, self._ready(model, batch))
        return {name: float(value) for name, value in sums.items()}

    @torch.no_grad()
    def score_tokens(self, model: LanguageModel, batch: Batch) -> Arrays:
        model.eval()
        logprobs, hits = model.scored(self.to_device(batch))
        return {"logprobs": logprobs.cpu().numpy(), "hits": hits.cpu().numpy()}

    def parameters(self, model: LanguageModel) -> dict[str, Registered]:
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        known = {**dict(model.named_parameters()), **model.state_dict()}  # packed weights are buffers
        return {
            name.replace(".packed", ".weight"): Registered(tuple(p.shape), name in trainable, bool(p.isfinite().all()))
            for name, p in known.items()
        }

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

        def mean() -> Tensor:
            sums = objective(model, batch)
            return sums["loss"] / sums["weight"]

        if wrt == "inputs":
            embed = model.inputs
            with torch.no_grad():
                change = torch.zeros_like(embed(batch), requires_grad=True)
            with replaced(model, "inputs", lambda batch: embed(batch) + change):
                return _gradients(mean(), {"inputs": change})
        parameters = self._trainable(model)
        if not any(map(is_sharded, parameters.values())):
            return _gradients(mean(), parameters)
        model.zero_grad()  # a step leaves its gradients behind
        mean().backward()  # which alone gathers and shares out
        gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in parameters.items()}
        model.zero_grad()
        return gathered((name, own(g), g) for name, g in gradients.items())

    @torch.no_grad()
    def activations(self, model: LanguageModel, objective: Objective, batch: Batch) -> Arrays:
        model.eval()
        outputs: dict[str, Tensor] = {}
        last: dict[str, Tensor] = {}

        def record(path: str) -> Callable[..., None]:
            def hook(_module: Any, _args: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    outputs.setdefault(path, output)

            return hook

        def recorded(name: str, method: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
            def recording(batch: Batch) -> Tensor:
                output = method(batch)
                last.setdefault(name, output)
                return output

            return recording

        with ExitStack() as stack:
            for path, module in model.named_modules():
                if path:
                    stack.callback(module.register_forward_hook(record(path)).remove)
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
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def to_device(self, batch: Batch) -> Batch:
        """The batch as tensors on the device (indices as int64)."""
        tensors: dict[str, Any] = {}
        for name, array in batch.arrays().items():
            tensor = torch.from_numpy(array)
            if array.dtype == np.int32 and name != "num_patches":
                tensor = tensor.long()
            tensors[name] = tensor.to(self.device, non_blocking=True)
        return Batch(**tensors, rows=batch.rows)

    def _ready(self, model: LanguageModel, batch: Batch) -> Batch:
        """The batch on the device, with what the model need not compute again for each of its gradients."""
        past = model.past(batch) if isinstance(model, LanguageModel) else None  # somebody's own model is none
        return replace(self.to_device(batch), past=past)

    def _prompts(self, model: LanguageModel, batch: Batch) -> Batch:
        """The prompts on the device, with what they begin with."""
        return replace(self.to_device(batch), past=model.shared_past(batch))

    @property
    def _compiles(self) -> bool:
        """Compiling for a CPU takes longer than it saves, and a sharded model gathers its layers one by one."""
        wanted = self.runtime.compile
        return wanted == "on" or (wanted == "auto" and self.device.type == "cuda" and not self.runtime.shard)

    def _trainable(self, model: LanguageModel) -> dict[str, torch.nn.Parameter]:
        parameters = dict(model.named_parameters())
        return {name: parameters[name] for name in model.spec.params()}


def _gradients(loss: Tensor, variables: dict[str, Tensor]) -> Arrays:
    """d(loss) / d(variable); zero where the loss does not depend on it."""
    reached = {name: x for name, x in variables.items() if x.requires_grad and loss.requires_grad}
    found = torch.autograd.grad(loss, list(reached.values()), allow_unused=True) if reached else ()
    gradients = {name: np.zeros(tuple(x.shape), np.float32) for name, x in variables.items()}
    return gradients | {name: _numpy(g) for name, g in zip(reached, found, strict=True) if g is not None}


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()


def _device(name: str) -> str:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    accelerator = next((d for d in ("cuda", "mps") if available[d]), None)
    if name == "auto":
        return accelerator or "cpu"
    if name == "gpu" and accelerator:
        return accelerator
    if available.get(name):
        return name
    usable = ", ".join(device for device, ok in available.items() if ok)
    raise BackendError(
        f"device {name!r} is not present for PyTorch {torch.__version__} on this machine; "
        f"usable here: auto, {usable}. For CUDA install a CUDA build of torch and a driver (see `mlx-training env`)."
    )
