"""Checkpoints that are complete or absent, and checked before they are believed.

A run directory holds

    config.yaml  env.json  metrics.jsonl
    checkpoints/step_00000050/{model.safetensors, optimizer.safetensors, state.json, manifest.json}
    checkpoints/latest  checkpoints/best         text files naming one of the step directories

A checkpoint is written to a hidden directory, every file flushed to the disk, and committed by one rename, so
a kill at any moment leaves either the whole checkpoint or none of it. `manifest.json` holds size and SHA-256 of
the other files. Arrays are float32 under canonical parameter names, the same for both backends.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_training.checkpoint_files import (
    NOT_JSON_OF_OURS,
    STATE,
    STEP_DIRECTORY,
    Arrays,
    Checkpoint,
    read_checkpoint,
    verify,
    write_checkpoint,
)
from mlx_training.errors import CheckpointError
from mlx_training.run_directory import disk_advice, sync, write_atomic

MARGIN = 2**20  # bytes that must be free beside the arrays of a checkpoint: headers, its JSON, the other files of a run


class CheckpointStore:
    """The checkpoints of one run directory. One process writes; any number may read."""

    def __init__(self, run_directory: str | Path) -> None:
        self.directory = Path(run_directory) / "checkpoints"

    def save(
        self, step: int, model: Arrays, optimizer: Arrays, state: Mapping[str, Any], *, best: bool, keep: int
    ) -> Path:
        """Commit one checkpoint, point `latest` (and `best`) at it, keep the last `keep` and the best.

        `state` must be JSON with finite numbers. Raises CheckpointError when the disk refuses; the checkpoints
        that were there stay as they were.
        """
        assert keep >= 1, keep
        final = self.directory / f"step_{step:08d}"
        needed = sum(array.nbytes for array in (*model.values(), *optimizer.values())) + MARGIN
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            if shutil.disk_usage(self.directory).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            temporary = self.directory / ".tmp-new"
            temporary.mkdir()
            write_checkpoint(temporary, step, model, optimizer, state)
            if os.path.lexists(final):  # the step was trained again after resuming from an older one
                final.rename(self.directory / f".tmp-{final.name}")
            temporary.rename(final)
            sync(self.directory)
            if best:  # first: a kill in between leaves a `latest` that does not know of this best value yet
                self._point("best", final)
            self._point("latest", final)
            self._retain(step, keep)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._remove_leftovers()
            raise CheckpointError(
                f"{final}: the checkpoint could not be written: {error}. It needs {needed / 1e6:.1f} MB. "
                f"{disk_advice(self.directory.parent)}"
            ) from error
        return final

    def load(self, which: str | Path = "latest") -> Checkpoint:
        """Read `latest`, `best` or the checkpoint directory at a path; every sum is verified first.

        Raises CheckpointError naming the bad file, what was expected of it, and the newest good checkpoint.
        """
        while True:
            name = self.pointer(str(which))
            try:
                return self._load(which)
            except (CheckpointError, FileNotFoundError):
                if self.pointer(str(which)) == name:
                    raise  # else the run goes on: it has dropped that checkpoint, and named another

    def _load(self, which: str | Path) -> Checkpoint:
        path = self._pointed(which) if which in ("latest", "best") else Path(which)
        if path is None:
            names = ", ".join(path.name for path in self.paths())
            expected = f"expected {self.directory / str(which)} to name one of: {names}"
            advice = expected if names else "the run has saved nothing yet"
            raise CheckpointError(f"{self.directory}: there is no '{which}' checkpoint; {advice}.")
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            good = next((other for other in reversed(self.paths()) if other != path and not verify(other)), None)
            advice = "No other checkpoint here is good"
            if good:
                advice = (
                    f"The newest good one is {good}: train --resume {good}, or read it with --checkpoint {good.name}"
                )
            raise CheckpointError(f"{error}\n{advice}.") from error

    def latest_valid(self, fits: Callable[[Checkpoint], None] = lambda _: None) -> tuple[Checkpoint | None, str]:
        """The newest good checkpoint, and a message ("" when that is the one `latest` names).

        Good is what verifies and what `fits` does not refuse, with a CheckpointError. For the process that goes on
        with the run. (None, "") when it has saved nothing; CheckpointError when it has and nothing is good.
        """
        self._remove_leftovers()
        paths = self.paths()
        bad = [*self.lost_pointers().values()]
        named = self.pointer("latest")
        newest = named if named and STEP_DIRECTORY.fullmatch(named) else max((path.name for path in paths), default="")
        # Directories newer than `latest` belong to a future that was abandoned by resuming from an older one.
        older = [path for path in paths if path.name <= newest]
        newer = [path for path in paths if path.name > newest]
        for path in (*reversed(older), *reversed(newer)):
            try:
                checkpoint = read_checkpoint(path)
                fits(checkpoint)
            except CheckpointError as error:
                bad.append(str(error))
            else:
                what = "the older checkpoint" if path.name < newest else "the checkpoint"
                return checkpoint, "\n".join([*bad, f"using {what} {path}"]) if bad else ""
        if bad:
            raise CheckpointError(
                "\n".join(bad) + "\nNo checkpoint of this run is good. Restore one from a backup, or start "
                "again with another output_dir."
            )
        return None, ""

    def rewind(self, checkpoint: Checkpoint, fits: Callable[[Checkpoint], None] = lambda _: None) -> str:
        """Make `checkpoint` the latest: what the run had saved after it is dropped by the next save.

        A best one that came after it, or that is not good, is forgotten at once; the message says the latter.
        """
        if not self.holds(checkpoint.path):
            return ""
        if self.pointer("latest") != checkpoint.path.name:
            self._point("latest", checkpoint.path)
        best = self._pointed("best") or self._best_known_to(checkpoint.path)
        if best is None or best.name > checkpoint.path.name:
            _remove(self.directory / "best")
            return ""
        try:
            fits(read_checkpoint(best))
        except CheckpointError as error:
            _remove(self.directory / "best")
            return f"{error}\nno checkpoint is known to be the best any more: the next evaluation counts as the best"
        if self.pointer("best") != best.name:
            self._point("best", best)
        return ""

    def holds(self, path: Path) -> bool:
        """Whether a checkpoint directory is one of this run."""
        return path.resolve().parent == self.directory.resolve()

    @property
    def has_best(self) -> bool:
        """Whether a checkpoint is marked as the best."""
        return self.pointer("best") is not None

    def pointer(self, which: str) -> str | None:
        """What `latest` or `best` holds; "" where that cannot be read, None where there is no such file."""
        path = self.directory / which
        try:
            if path.is_file():  # a pipe would be waited for
                with path.open(errors="replace") as file:
                    return file.read(100).strip()
        except OSError:
            pass
        return "" if os.path.lexists(path) else None

    def lost_pointers(self) -> dict[str, str]:
        """What is wrong with `latest` or `best`, for each that should name a checkpoint and does not."""
        names = [path.name for path in self.paths()]
        needed = {"latest": bool(names), "best": self._best_known_to(self._pointed("latest")) is not None}
        lost = {}
        for which, is_needed in needed.items():
            held = self.pointer(which)
            if held not in names and (held is not None or is_needed):
                what = "is missing" if held is None else f"names {held!r}"
                lost[which] = f"{self.directory / which} {what}, expected one of {', '.join(names) or 'no checkpoints'}"
        return lost

    def best_or_latest(self) -> Checkpoint:
        """The best checkpoint, or the latest of a run that was never evaluated."""
        return self.load("best" if self.has_best else "latest")

    def named(self, name: str) -> str | Path:
        """What `load` takes for "best", "latest", a step directory's name, or the path of one (CheckpointError)."""
        if name in ("best", "latest"):
            return name
        for path in (self.directory / name, Path(name)):
            if STEP_DIRECTORY.fullmatch(path.name) and path.is_dir():
                return path
        raise CheckpointError(
            f"--checkpoint {name}: no such checkpoint; give best, latest, the path of one, or one of: "
            f"{', '.join(path.name for path in self.paths()) or 'none, the run has saved nothing yet'}"
        )

    def paths(self) -> list[Path]:
        """Every committed checkpoint directory, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(p for p in self.directory.iterdir() if STEP_DIRECTORY.fullmatch(p.name) and p.is_dir())

    def _pointed(self, which: str | Path) -> Path | None:
        """The directory a pointer names. Without a usable `latest`, the newest directory."""
        name = self.pointer(str(which)) or ""  # before the list: what it names is dropped after it names another
        paths = {path.name: path for path in self.paths()}
        newest = next(reversed(paths.values()), None) if which == "latest" else None
        return paths.get(name, newest)

    def _point(self, which: str, checkpoint: Path) -> None:
        if (path := self.directory / which).is_dir():
            _remove(path)
        write_atomic(path, checkpoint.name + "\n")

    def _best_known_to(self, latest: Path | None) -> Path | None:
        """The directory that holds the best value a checkpoint knows of, as far as states can be read."""
        if latest is None or not (known := _best_value(latest)):
            return None
        value, _ = known
        past = (path for path in reversed(self.paths()) if path.name <= latest.name)
        return next((path for path in past if _best_value(path) == (value, True)), None)

    def _retain(self, step: int, keep: int) -> None:
        best = self._pointed("best")
        past = [p for p in self.paths() if int(p.name.removeprefix("step_")) <= step]
        for path in self.paths():
            if path not in past[-keep:] and path != best:
                path.rename(self.directory / f".tmp-dropped-{path.name}")  # whole, or gone: others may be reading it
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Clean up after a save that failed or was killed, restoring a checkpoint it was about to replace."""
        for path in self.directory.glob(".tmp-*"):
            replaced = self.directory / path.name.removeprefix(".tmp-")
            if STEP_DIRECTORY.fullmatch(replaced.name) and not replaced.exists():
                path.rename(replaced)
            else:
                _remove(path)


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], where: str | Path
) -> None:
    """Raise one CheckpointError that lists every missing, extra and misshaped array of `given`."""
    problems = [f"missing: {name} {tuple(shape)}" for name, shape in expected.items() if name not in given]
    for name, shape in given.items():
        if name not in expected:
            problems.append(f"unknown: {name} {tuple(shape)}")
        elif tuple(expected[name]) != tuple(shape):
            problems.append(f"shape: {name} is {tuple(shape)}, expected {tuple(expected[name])}")
    if problems:
        raise CheckpointError(
            f"{where}: its parameters do not fit the model ({len(problems)} of them).\n  "
            + "\n  ".join(problems)
            + "\n"
            "Use the model section of the configuration that made it, or other weights."
        )


def _best_value(checkpoint: Path) -> tuple[float, bool] | None:
    """The best value that a checkpoint knows of, and whether it was found there; None where there is none."""
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_text()) if path.is_file() else {}
        progress = state["progress"]
        was_found_there = progress["evaluated"] == state["step"] and progress["evaluations_without_improvement"] == 0
        return None if progress["best"] is None else (progress["best"], was_found_there)
    except NOT_JSON_OF_OURS:
        return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
