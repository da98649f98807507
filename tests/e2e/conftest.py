"""Fixtures: a tiny pretrained LM and a workbench."""

from pathlib import Path

import pytest

from tests.e2e.tiny import save_tiny_llama, timeseries_config
from tests.e2e.workbench import Workbench


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-bit Llama with its tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("llm") / "tiny-4bit")


@pytest.fixture
def bench(
    tmp_path: Path, tiny_llm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Workbench:
    """A workbench whose folder is the working directory."""
    monkeypatch.chdir(tmp_path)
    return Workbench(tmp_path, tiny_llm, capsys)


@pytest.fixture
def tiny(bench: Workbench, backend_name: str) -> Workbench:
    """A workbench whose configurations run on one backend."""
    bench.backend = backend_name
    bench.write(timeseries_config(bench.llm, bench.data, bench.run))
    return bench
