"""Disks that refuse: what is said, and what is left behind."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mlx_training import checkpoint_files, run_directory, run_lock
from mlx_training.checkpoint import CheckpointStore
from mlx_training.data.tokenizer import train_bpe
from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.json_lines import JsonLines
from mlx_training.run_directory import unwritable, write_atomic

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")


@needs_full
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("metrics.jsonl", lambda path: JsonLines(path, lazy=True).log({"step": 1})),
        ("tokenizer.json", lambda path: train_bpe(["text"], 300, path.parent)),
    ],
)
def test_the_file_that_a_full_disk_refused_is_named(
    tmp_path: Path, name: str, write: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: False)  # of metrics.jsonl: its first line
    for entry in (name, f".tmp-{name}"):
        (tmp_path / entry).symlink_to(FULL)
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / name)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / name))


def test_the_small_file_that_a_full_disk_refused_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_directory, "sync", refuse)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomic(tmp_path / "file", "text")
    assert error.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())


def test_the_arrays_that_a_full_disk_refused_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint_files, "save_file", refuse)
    with pytest.raises(CheckpointError, match=r"could not be written: model.safetensors: No space left on device\. It"):
        CheckpointStore(tmp_path).save(1, {}, {}, {}, best=True, keep=1)


def test_a_lock_that_cannot_be_written_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def lock(path: Path) -> Full:
        path.touch()
        return Full()

    monkeypatch.setattr(run_lock, "_lock", lock)
    no_room = r"No space left .* Free space on that disk, or set"
    with pytest.raises(ConfigError, match=no_room), run_lock.locked(tmp_path):
        pytest.fail("locked")
    assert not list(tmp_path.iterdir())
    assert "). Set output_dir" in str(unwritable(tmp_path, OSError(errno.EROFS, os.strerror(errno.EROFS))))
