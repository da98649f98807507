"""The processes that train together, in PyTorch: those that torchrun started, over gloo (CPU) and NCCL (CUDA)."""

import os
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mlx_training.backend import TIMEOUT
from mlx_training.errors import ProcessLostError


class Group:
    """This process alone, until it joins the others."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1

    def join(self) -> None:
        """Meet the other processes of this job, if a launcher started several."""
        if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
            return
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank < torch.cuda.device_count():
            torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def leave(self) -> None:
        """Say good-bye, when there is nothing more to sum."""
        if self.size > 1:
            dist.destroy_process_group()

    def sum(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        """Each array summed over the processes: all of them in one message. Raises ProcessLostError."""
        flat = torch.cat([x.flatten().float() for x in arrays])
        carried = flat.cpu() if flat.device.type == "mps" else flat  # Metal has no collectives
        self._all_reduce(carried)
        parts = carried.to(flat.device).split([x.numel() for x in arrays])
        return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, arrays, strict=True)]

    def total(self, array: np.ndarray) -> np.ndarray:
        """An array of the host (float32 or int32) summed over the processes. Raises ProcessLostError."""
        if self.size == 1:
            return array
        summed = torch.from_numpy(array.copy())
        self._all_reduce(summed)
        return summed.numpy()

    def _all_reduce(self, x: Tensor) -> None:
        try:
            dist.all_reduce(x)
        except RuntimeError as error:
            raise ProcessLostError(self.rank, error) from error
