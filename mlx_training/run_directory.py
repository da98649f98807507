"""A run directory on the disk: claimed, written atomically, and what to say when the disk refuses."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from mlx_training.errors import CheckpointError, ConfigError

TEMPORARY = ".tmp-"  # what a file is called until it is whole; ends in the process that writes it
RUN_FILES = ("config.yaml", "env.json", "metrics.jsonl", "checkpoints")


def claim_run_directory(directory: str | Path, resume: bool) -> Path:
    """Create the run directory and prove that it can be written (by writing: root ignores mode bits).

    Raises ConfigError when it already holds a run and `resume` is false, holds links, or is not writable.
    """
    directory = Path(directory)
    held = [name for name in RUN_FILES if (directory / name).exists()]
    if held and not resume:
        raise ConfigError(
            f"output_dir: {directory} already holds a run ({', '.join(held)}). Continue it with --resume auto, or "
            "set output_dir to a directory that does not exist yet; nothing was changed."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".write-test-", dir=directory):
            pass
    except OSError as error:
        raise unwritable(directory, error) from error
    _remove_temporary(directory)
    links = sorted(path.name for path in directory.glob("*") if path.is_symlink())
    if links:
        raise ConfigError(
            f"output_dir: {directory} holds links ({', '.join(links)}); a run writes into its own directory only. "
            "Remove them, or make output_dir itself the link; nothing was changed."
        )
    return directory


def _remove_temporary(directory: Path) -> None:
    """What killed processes had begun to write."""
    for path in directory.glob(f"{TEMPORARY}*.*"):
        pid = path.suffix.removeprefix(".")
        if path.is_symlink() or not pid.isdecimal():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except OSError:  # somebody else's, and alive
            continue


def unwritable(directory: str | Path, error: OSError) -> ConfigError:
    """What to raise when a run directory cannot be made or written."""
    advice = "Free space on that disk, or set" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Set"
    return ConfigError(
        f"output_dir: {directory} cannot be written ({error.strerror or error}). {advice} output_dir to a directory "
        "you can write to."
    )


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a small file: readers see the old content or the new, never a part."""
    temporary = path.with_name(
        f"{TEMPORARY}{path.name}.{os.getpid()}"
    )  # of two commands that write it, each has its own
    with naming(path):
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:  # never through a link that somebody has put there
                file.write(content.encode() if isinstance(content, str) else content)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `target` (absent or empty until then) when that is done, or vanishes.

    Raises ConfigError when there is something at `target`, CheckpointError when the disk refuses.
    """
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "is not empty" if target.is_dir() else "is a file"
        raise ConfigError(f"--to {target} {what}; give a directory that does not exist yet. Nothing was changed")
    temporary = target.with_name(f".tmp-{target.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left behind
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"--to {target}: cannot be written: {error}. Free space there, or give another directory; "
            "nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of writing name this file: one of a file that is open already names none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def full_disk_explained(run: Path) -> Iterator[None]:
    """Any write that a full or read-only disk refuses as a CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            raise
        raise CheckpointError(
            f"{error.filename or run}: cannot be written: {error.strerror}. {disk_advice(run)}"
        ) from error


def disk_advice(run: Path) -> str:
    """What is free on a run's disk, and what to do when a write to it was refused."""
    try:
        free = f"{shutil.disk_usage(run).free / 1e6:.1f} MB are free"
    except OSError:
        free = "The free space is unknown"
    return (
        f"{free}. Remove files from that disk (runs that are not needed, their checkpoints/step_...), or make the "
        "directory writable, or move the run to another disk and set output_dir. Earlier checkpoints are intact; "
        "continue with --resume auto."
    )
