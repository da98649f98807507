"""What `disk` does to disks: a tmpfs of one's own, filled as far as wished or read-only, and when. Root, and Linux."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mlx_training import trainer

PAGE = 4096
PLENTY = 16 * 2**20  # bytes of a disk


class Disk:
    """A mounted tmpfs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def leave(self, pages: int) -> None:
        """Fill it up, but for so many pages."""
        self.free()
        with contextlib.suppress(OSError), self._ballast.open("wb") as file:
            while True:
                file.write(bytes(PAGE))
                file.flush()
        size = self._ballast.stat().st_size // PAGE
        os.truncate(self._ballast, max(0, size - pages) * PAGE)

    def free(self) -> None:
        """Make room again."""
        self._ballast.unlink(missing_ok=True)

    @contextlib.contextmanager
    def read_only(self, folder: Path) -> Iterator[None]:
        """What is opened in `folder` from now on can be read only; files that are open stay open.

        A read-only view of the folder laid over it: the disk itself cannot be made so while a file is open for writing.
        """
        _mount("--bind", str(folder), str(folder))
        try:
            _mount("-o", "remount,bind,ro", str(folder))
            yield
        finally:
            _unmount(folder)

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    """Mount one; OSError, with the reason, where this machine refuses."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={PLENTY}", "tmpfs", str(folder))
    try:
        yield Disk(folder)
    finally:
        _unmount(folder)


def why_not(folder: Path) -> str:
    """Why disks cannot be mounted here; "" where they can."""
    try:
        with disk(folder / "probe") as probe, probe.read_only(probe.folder):
            try:
                (probe.folder / "file").write_text("text")
            except OSError as error:
                return "" if error.errno == errno.EROFS else f"a read-only disk says {error.strerror}"
            return "a read-only disk can be written"
    except OSError as error:
        return f"no disk can be mounted here: {error}"


@contextlib.contextmanager
def at_step(step: int, last: int, act: Callable[[], Any]) -> Iterator[None]:
    """Call `act` at the start of a step (0: now; after the `last`: in the final report), once."""
    acts, rates, report = [act], trainer.learning_rates, trainer.Evaluator.report

    def now() -> None:
        if acts:
            acts.pop()()

    def rates_at(config: Any, number: int, total: int) -> dict[str, float]:
        if number == step:
            now()
        return rates(config, number, total)

    def report_at(*given: Any) -> Any:
        if step > last:
            now()
        return report(*given)

    if step == 0:
        now()
    with (
        mock.patch.object(trainer, "learning_rates", rates_at),
        mock.patch.object(trainer.Evaluator, "report", report_at),
    ):
        yield


@contextlib.contextmanager
def after(seconds: float, act: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """Call `act` from another thread; what is given calls that off, or waits for it."""
    thread = threading.Timer(seconds, act)

    def stop() -> None:
        thread.cancel()
        thread.join()

    thread.start()
    try:
        yield stop
    finally:
        stop()


class Wandb:
    """In place of the package: it writes to the run's disk as that does, and fails as it likes."""

    @classmethod
    def init(cls, *, dir: str, **_: Any) -> "Wandb":
        return cls(Path(dir))

    def __init__(self, folder: Path) -> None:
        self.path = folder / "wandb.jsonl"

    def log(self, values: dict[str, Any], step: int) -> None:
        with self.path.open("a") as file:
            file.write(f"{step} {values}\n")

    def finish(self) -> None:
        self.log({}, -1)


@contextlib.contextmanager
def wandb_on_this_disk() -> Iterator[None]:
    """`import wandb` gives the class above."""
    before = sys.modules.get("wandb")
    sys.modules["wandb"] = Wandb  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop("wandb")
        if before:
            sys.modules["wandb"] = before


def _mount(*words: str) -> None:
    _run("mount", *words)


def _unmount(folder: Path) -> None:
    _run("umount", "--lazy", str(folder))  # also where something still holds a file of it


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.returncode, done.stderr.strip() or f"{words[0]} exits with {done.returncode}")
