"""MLX realisation of the specs (Metal, CPU). Mirrored by torch_backend file by file."""

from mlx_training.blas import load_fast_blas

load_fast_blas()  # on Linux: before mlx.core is imported, or its reference BLAS is used

from mlx_training.mlx_backend.backend import Backend  # noqa: E402

__all__ = ["Backend"]
