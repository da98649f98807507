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
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mlx_training.errors import CheckpointError
from mlx_training.run_directory import disk_advice, sync, write_atomic

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
CONTENTS = (MODEL, OPTIMIZER, STATE)
STEP_DIRECTORY = re.compile(r"step_(\d{8,})")
MARGIN = 2**20  # bytes that must be free beside the arrays of a checkpoint: headers, its JSON, the other files of a run
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """What one step directory holds; `state` is the trainer's JSON (data position, best value, ...)."""

    step: int
    model: Arrays
    optimizer: Arrays
    state: dict[str, Any]
    path: Path


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
            save_file({name: np.asarray(array, order="C") for name, array in model.items()}, temporary / MODEL)
            save_file({name: np.asarray(array, order="C") for name, array in optimizer.items()}, temporary / OPTIMIZER)
            (temporary / STATE).write_text(json.dumps({"step": step, **state}, indent=1, allow_nan=False))
            (temporary / MANIFEST).write_text(_manifest(temporary))
            for name in (*CONTENTS, MANIFEST):
                sync(temporary / name)
            sync(temporary)
            if final.exists():  # the step was trained again after resuming from an older one
                final.rename(self.directory / f".tmp-{final.name}")
            temporary.rename(final)
            sync(self.directory)
            write_atomic(self.directory / "latest", final.name + "\n")
            if best:
                write_atomic(self.directory / "best", final.name + "\n")
            self._retain(step, keep)
        except (OSError, SafetensorError) as error:
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
        path = self._pointed(which) if which in ("latest", "best") else Path(which)
        if path is None:
            raise CheckpointError(
                f"{self.directory}: there is no '{which}' checkpoint. Expected {self.directory / str(which)} to name "
                f"one of: {', '.join(p.name for p in self.paths()) or 'none, the run has saved nothing yet'}."
            )
        problems = verify(path)
        if problems:
            others = [other for other in self.paths() if other != path]
            good = next((other for other in reversed(others) if not verify(other)), None)
            advice = f"The newest good one is {good}: --resume {good}" if good else "No other checkpoint here is good"
            raise CheckpointError(f"{path}: damaged checkpoint.\n  " + "\n  ".join(problems) + f"\n{advice}.")
        return read_checkpoint(path)

    def latest_valid(self) -> tuple[Checkpoint | None, str]:
        """The newest checkpoint that verifies, and a message ("" when that is the one `latest` names).

        For the process that goes on with the run. (None, "") when it has saved nothing; CheckpointError when it
        has and every checkpoint is damaged.
        """
        self._remove_leftovers()
        paths = self.paths()
        latest = self._pointed("latest")
        # Directories newer than `latest` belong to a future that was abandoned by resuming from an older one.
        older = [p for p in paths if latest is not None and p.name <= latest.name]
        newer = [p for p in paths if p not in older]
        damage: list[str] = []
        for path in (*reversed(older), *reversed(newer)):
            problems = verify(path)
            if not problems:
                message = "\n".join([*damage, f"using the older checkpoint {path}"]) if damage else ""
                return read_checkpoint(path), message
            damage.append(f"{path}: damaged checkpoint: {'; '.join(problems)}")
        if damage:
            raise CheckpointError(
                "\n".join(damage) + "\nNo checkpoint of this run is good. Restore one from a backup, or start "
                "again with another output_dir."
            )
        return None, ""

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Make `checkpoint` the latest: what the run had saved after it is dropped by the next save.

        A best one that came after it is forgotten at once.
        """
        if self.holds(checkpoint.path):
            if self._pointed("latest") != self.directory / checkpoint.path.name:
                write_atomic(self.directory / "latest", checkpoint.path.name + "\n")
            best = self._pointed("best")
            if best is None or best.name > checkpoint.path.name:
                (self.directory / "best").unlink(missing_ok=True)

    def holds(self, path: Path) -> bool:
        """Whether a checkpoint directory is one of this run."""
        return path.resolve().parent == self.directory.resolve()

    @property
    def has_best(self) -> bool:
        """Whether a checkpoint is marked as the best."""
        return (self.directory / "best").exists()

    def best_or_latest(self) -> Checkpoint:
        """The best checkpoint, or the latest of a run that was never evaluated."""
        return self.load("best" if self.has_best else "latest")

    def paths(self) -> list[Path]:
        """Every committed checkpoint directory, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(p for p in self.directory.iterdir() if STEP_DIRECTORY.fullmatch(p.name) and p.is_dir())

    def _pointed(self, which: str | Path) -> Path | None:
        """The directory a pointer names. Without a usable `latest`, the newest directory."""
        paths = {path.name: path for path in self.paths()}
        try:
            name = (self.directory / which).read_text(errors="replace").strip()
        except OSError:
            name = ""
        newest = next(reversed(paths.values()), None) if which == "latest" else None
        return paths.get(name, newest)

    def _retain(self, step: int, keep: int) -> None:
        best = self._pointed("best")
        past = [p for p in self.paths() if int(p.name.removeprefix("step_")) <= step]
        for path in self.paths():
            if path not in past[-keep:] and path != best:
                shutil.rmtree(path)
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Clean up after a save that failed or was killed, restoring a checkpoint it was about to replace."""
        for path in self.directory.glob(".tmp-*"):
            replaced = self.directory / path.name.removeprefix(".tmp-")
            if STEP_DIRECTORY.fullmatch(replaced.name) and not replaced.exists():
                path.rename(replaced)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def verify(path: Path) -> list[str]:
    """Everything wrong with a checkpoint directory, one sentence per file; empty when it is good."""
    if not path.is_dir():
        return [f"{path}: no such directory"]
    missing = [name for name in (*CONTENTS, MANIFEST) if not (path / name).is_file()]
    if missing:
        return [f"{name}: missing" for name in missing]
    found = _manifest(path)
    written = (path / MANIFEST).read_bytes()
    problems = []
    if written != found.encode():
        try:
            files = json.loads(written)["files"]
            for name, given in json.loads(found)["files"].items():
                for key in ("size", "sha256"):
                    if files[name][key] != given[key]:
                        problems.append(f"{name}: {key} is {given[key]}, {MANIFEST} expects {files[name][key]}")
                        break
        except (ValueError, KeyError, TypeError):
            problems = []
        return problems or [f"{MANIFEST}: damaged: it is not what this program writes for these files"]
    step = STEP_DIRECTORY.fullmatch(path.name)
    held = json.loads((path / STATE).read_text())["step"]
    if step and int(step[1]) != held:
        problems.append(f"{STATE}: holds step {held}, the directory's name expects {int(step[1])}")
    return problems


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a directory that `verify` found good."""
    state = json.loads((path / STATE).read_text())
    step = state.pop("step")
    return Checkpoint(step, load_file(path / MODEL), load_file(path / OPTIMIZER), state, path)


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


def _manifest(directory: Path) -> str:
    """The manifest's text: a function of the files alone, so that any change to it shows too."""
    files = {}
    for name in CONTENTS:
        with (directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[name] = {"sha256": digest, "size": (directory / name).stat().st_size}
    return json.dumps({"format": 1, "files": files}, indent=1) + "\n"
