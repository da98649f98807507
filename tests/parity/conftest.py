"""Fixtures of the parity suite."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, packed to 4 bits."""
    from tests.parity.tiny_checkpoints import save_tiny_quantized

    return save_tiny_quantized("llama", tmp_path_factory.mktemp("lm") / "llama-4bit")


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """MLX without mx.compile, which has every new kernel built by a C++ compiler."""
    import mlx.core as mx

    mx.disable_compile()
    yield
    mx.enable_compile()
