"""Models whose parameters, gradients and optimiser state are shared out over the processes, by rows (FSDP2).

A sharded parameter is a DTensor, of which a process holds `own` rows. MLX has nothing like it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mlx_training.backend import Arrays
from mlx_training.errors import BackendError

ENTRIES = ("logprobs", "scored", "logits", "within")  # what computes with a sharded model; none of them calls another


def shard(model: nn.Module, device: torch.device) -> None:
    """Give every process its rows of every parameter, in place and on the device: each layer's, then all others'.

    While a layer computes, and only then, all of its rows are there. Gradients come summed over the processes. Raises
    BackendError where PyTorch cannot do it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if device.type not in ("cpu", "cuda"):
        raise BackendError(
            f"performance.shard: given true on the device {device.type}, which has no collectives in PyTorch; use "
            "device: cuda or cpu, or set it to false"
        )
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise BackendError(f"performance.shard: PyTorch {torch.__version__} cannot sum gradients in FSDP2; upgrade it")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # the step divides, once
        module.set_force_sum_reduction_for_comms(True)  # the factor's own operation is NCCL's alone
    model.within = lambda function, *args: function(*args)
    for entry in ENTRIES:
        register_fsdp_forward_method(model, entry)


def is_sharded(x: Tensor) -> bool:
    """Whether a process holds only some rows of a tensor."""
    return hasattr(x, "to_local")  # importing DTensor to ask it takes a second


def own(x: Tensor) -> Tensor:
    """The rows that this process holds, in the memory where they are; of what is not sharded, the tensor itself."""
    return x.detach().to_local() if is_sharded(x) else x


def own_part(array: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole array that this process holds of a parameter of that shape."""
    if not is_sharded(like):
        return array
    parts, rank = array.chunk(like.device_mesh.size()), like.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else array[:0]


def gathered(parts: Iterable[tuple[str, Tensor, Tensor]]) -> Arrays:
    """Whole arrays, float32, of (name, the rows that this process holds, a parameter of that layout).

    All processes must call it. What is sharded comes to process 0 alone.
    """
    arrays: Arrays = {}
    for name, part, like in parts:
        if is_sharded(like):
            whole = _whole(part, like)
            if like.device_mesh.get_rank() == 0:
                arrays[name] = whole.cpu().numpy()
        else:
            arrays[name] = part.detach().float().cpu().numpy().copy()
    return arrays


def within(model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """The function's value, while the parameters outside of the layers are whole."""
    return model.within(function, *args) if hasattr(model, "within") else function(*args)


def _whole(part: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    layout = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, **layout).full_tensor()
