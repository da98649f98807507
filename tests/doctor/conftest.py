"""Fixtures of the doctor's tests."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def uncompiled(backend_name: str) -> Iterator[None]:
    """MLX without mx.compile, which has every new kernel built by a C++ compiler."""
    if backend_name == "torch":
        yield
        return
    mx = pytest.importorskip("mlx.core")
    mx.disable_compile()
    yield
    mx.enable_compile()
