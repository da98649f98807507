"""A workbench: a tiny pretrained LM, rows, configurations, and the command line run in this process."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlx_training import cli
from mlx_training.data.rows import write_rows
from tests.e2e.tiny import decoder_config, rows, save_tiny_llama, timeseries_config


@dataclass
class Workbench:
    """One test's folder with `rows.jsonl` (32 rows) and `config.yaml`, and the command line."""

    folder: Path
    llm: Path
    capsys: pytest.CaptureFixture[str]
    backend: str = "auto"

    def __post_init__(self) -> None:
        write_rows(self.data, rows(32))
        self.write(timeseries_config(self.llm, self.data, self.run))

    @property
    def data(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    def write(self, config: str) -> None:
        """Another configuration, with this bench's backend."""
        self.config.write_text(f"{config}backend: {self.backend}\n")

    def use_decoder(self) -> None:
        """Make `config.yaml` one of a decoder."""
        self.write(decoder_config(self.run))

    def main(self, *argv: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of one command."""
        self.capsys.readouterr()
        code = cli.main([str(word) for word in argv])
        return code, *self.capsys.readouterr()

    def json(self, *argv: object) -> dict[str, Any]:
        """The object of a command that succeeds."""
        code, out, err = self.main(*argv, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    def train(self, *overrides: object) -> dict[str, Any]:
        """The result of a training run that succeeds."""
        return self.json("train", self.config, *overrides)

    def refused(self, code: int, *argv: object) -> str:
        """The one message of a command that fails with this exit code and changes no file that was there."""
        before = contents(self.folder)
        given, out, err = self.main(*argv)
        assert (given, out) == (code, ""), err
        message = err[err.index("error: ") :]
        assert "Traceback" not in err and len(message) < 1500, err
        after = contents(self.folder)
        assert {path: after.get(path) for path in before} == before
        return message


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-bit Llama with its tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("llm") / "tiny-4bit")


@pytest.fixture
def bench(
    tmp_path: Path, tiny_llm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Workbench]:
    """A workbench whose folder is the working directory."""
    monkeypatch.chdir(tmp_path)
    yield Workbench(tmp_path, tiny_llm, capsys)
