"""What every PyTorch side imports; loaded once, before the sides are forked."""

import contextlib

with contextlib.suppress(ImportError):  # MLX alone is enough for MLX's rows
    import torch
    import torch._dynamo

    torch.set_num_threads(1)

import tools.benchmarks.ours  # noqa: F401
