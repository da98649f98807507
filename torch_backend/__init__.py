"""PyTorch realisation of the specs (CUDA, MPS, CPU). Mirrors mlx_training/mlx_backend file by file."""

from torch_backend.backend import Backend

__all__ = ["Backend"]
