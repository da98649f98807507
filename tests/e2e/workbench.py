"""A folder with rows and a configuration, and the command line run in this process."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlx_training import cli
from mlx_training.data.rows import write_rows
from mlx_training.json_lines import read_metrics
from tests.e2e.tiny import decoder_config, language_config, rows, timeseries_config

CONFIG, DATA = 2, 3  # exit codes
TIMES = {"tokens_per_second", "seconds_per_step", "memory_gb"}


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

    @property
    def no_step_was_taken(self) -> bool:
        """Whether `run` holds nothing but perhaps an empty folder or a tokenizer."""
        return not (self.run / "metrics.jsonl").exists() and not (self.run / "config.yaml").exists()

    def use_decoder(self) -> None:
        """Make `config.yaml` one of a decoder."""
        self.write(decoder_config(self.run))

    def use_language(self, family: str) -> None:
        """Make `config.yaml` one of a family that is trained from scratch on text."""
        self.write(language_config(self.run, family))

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


def metrics(run: Path) -> list[dict[str, Any]]:
    """What a run logged, without times."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(run / "metrics.jsonl")]


def truncate(path: Path) -> None:
    """Cut off the end of a file."""
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
