"""A run directory is trained in by one process at a time."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from mlx_training.errors import ConfigError
from mlx_training.json_text import parse_json
from mlx_training.run_directory import unwritable

try:
    import fcntl
except ImportError:  # not on this system: the lock file is a note, not a lock
    fcntl = None  # type: ignore[assignment]

LOCK = "train.lock"


@contextlib.contextmanager
def locked(directory: str | Path) -> Iterator[None]:
    """Hold the run directory, creating it, against a second training process; a killed process lets go of it.

    Raises ConfigError while another process holds it, or when it cannot be written.
    """
    path = Path(directory) / LOCK
    was_there = path.parent.exists()
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except OSError as error:
        raise unwritable(directory, error) from error
    try:
        try:
            file.truncate(0)
            file.write(json.dumps(holder) + "\n")
            file.flush()
        except OSError as error:
            raise unwritable(directory, error) from error
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: nobody else can have locked this very file
        with contextlib.suppress(OSError):  # a note that a full disk did not take
            file.close()
        if not was_there:
            with contextlib.suppress(OSError):  # it is not empty: something was saved
                path.parent.rmdir()


def _lock(path: Path) -> TextIO:
    """The lock file, open and locked."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = open(os.open(path, flags, 0o644), "r+", encoding="utf-8", errors="replace")  # noqa: SIM115  held
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                time.sleep(0.2)  # its holder may have only just begun: then another's name, or none, stands there
                raise ConfigError(_held(path.parent, file.read())) from None
        except OSError:  # a file system without locks: the file is a note there
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder has removed it since it was opened


def _held(directory: Path, content: str) -> str:
    try:
        holder = parse_json(content)
        who = f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
    except (ValueError, KeyError, TypeError):  # it has only just begun
        who = "another process"
    return (
        f"output_dir: {directory} is being trained in by {who}. Wait for it or stop it, or set output_dir to "
        "another directory; nothing was changed."
    )
