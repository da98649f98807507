"""mlx-training: one model spec, trained on MLX or PyTorch by one trainer."""

__version__ = "0.1.0"
