"""One thread, a fast BLAS, and fixtures that skip with the reason where data or a backend is absent."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch are imported; two threads are slower under load
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_training.blas import load_fast_blas
from mlx_training.environment import BACKENDS, installed_backends

load_fast_blas()  # before any test imports mlx.core

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets (MLX_TRAINING_DATA, or shared/data beside the checkout)."""
    path = Path(os.environ.get("MLX_TRAINING_DATA") or REPOSITORY.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set MLX_TRAINING_DATA")
    return path


@pytest.fixture(scope="session")
def backends() -> list[str]:
    """The names of the installed backends."""
    return list(installed_backends())


@pytest.fixture
def both_backends(backends: list[str]) -> list[str]:
    """Skips unless MLX and torch are both installed."""
    if missing := [name for name in BACKENDS if name not in backends]:
        pytest.skip(f"needs both backends; not installed: {', '.join(missing)}")
    return backends


@pytest.fixture(params=BACKENDS)
def backend_name(request: pytest.FixtureRequest, backends: list[str]) -> str:
    """Runs the test once per backend."""
    if request.param not in backends:
        pytest.skip(f"backend {request.param} is not installed")
    return str(request.param)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Keeps torch at one thread even after a test of the code that sets it."""
    yield
    if (torch := sys.modules.get("torch")) and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
