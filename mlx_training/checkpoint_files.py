"""The files of one checkpoint directory: written, verified, and read only when every one of them is good.

`manifest.json` holds size and SHA-256 of the other files. Arrays are float32 under canonical parameter names.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from mlx_training.errors import CheckpointError
from mlx_training.json_text import parse_json
from mlx_training.run_directory import naming, sync

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
CONTENTS = (MODEL, OPTIMIZER, STATE)
STEP_DIRECTORY = re.compile(r"step_(\d{8,})")
NOT_JSON_OF_OURS = (OSError, ValueError, KeyError, TypeError, RecursionError)  # what reading JSON of another may raise
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """What one step directory holds; `state` is the trainer's JSON (data position, best value, ...)."""

    step: int
    model: Arrays
    optimizer: Arrays
    state: dict[str, Any]
    path: Path


def write_checkpoint(directory: Path, step: int, model: Arrays, optimizer: Arrays, state: Mapping[str, Any]) -> None:
    """Write every file of a checkpoint, and flush them to the disk. Raises OSError naming the file that was refused."""
    for name, arrays in ((MODEL, model), (OPTIMIZER, optimizer)):
        try:
            save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, directory / name)
        except SafetensorError as error:
            raise OSError(f"{name}: {error}") from error
    with naming(directory / STATE):
        (directory / STATE).write_text(json.dumps({"step": step, **state}, indent=1, allow_nan=False))
    with naming(directory / MANIFEST):
        (directory / MANIFEST).write_text(manifest_of(directory))
    for name in (*CONTENTS, MANIFEST):
        sync(directory / name)
    sync(directory)


def verify(path: Path) -> list[str]:
    """Everything wrong with a checkpoint directory, one sentence per file; empty when it is good."""
    if not path.is_dir():
        return [f"{path}: no such directory"]
    missing = [name for name in (*CONTENTS, MANIFEST) if not (path / name).is_file()]
    if missing:
        return [f"{name}: missing" for name in missing]
    try:
        found = manifest_of(path)
        written = (path / MANIFEST).read_bytes()
    except OSError as error:
        return [f"{Path(error.filename or path).name}: cannot be read: {error.strerror}"]
    problems = []
    if written != found.encode():
        try:
            files = parse_json(written)["files"]
            for name, given in json.loads(found)["files"].items():
                for key in ("size", "sha256"):
                    if files[name][key] != given[key]:
                        problems.append(f"{name}: {key} is {given[key]}, {MANIFEST} expects {files[name][key]}")
                        break
        except NOT_JSON_OF_OURS:
            problems = []
        return problems or [f"{MANIFEST}: damaged: it is not what this program writes for these files"]
    return [*_wrong_arrays(path / MODEL), *_wrong_arrays(path / OPTIMIZER), *_wrong_state(path)]


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify and read a checkpoint directory. Raises CheckpointError naming every bad file."""
    problems = verify(path)
    if problems:
        raise CheckpointError(f"{path}: damaged checkpoint.\n  " + "\n  ".join(problems))
    state = parse_json((path / STATE).read_bytes())
    step = state.pop("step")
    return Checkpoint(step, load_file(path / MODEL), load_file(path / OPTIMIZER), state, path)


def manifest_of(directory: Path) -> str:
    """The manifest's text: a function of the files alone, so that any change to it shows too."""
    files = {}
    for name in CONTENTS:
        with (directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[name] = {"sha256": digest, "size": (directory / name).stat().st_size}
    return json.dumps({"format": 1, "files": files}, indent=1) + "\n"


def _wrong_arrays(file: Path) -> list[str]:
    """What is wrong with a safetensors file of ours; only its header is read."""
    try:
        with safe_open(file, "numpy") as arrays:
            types = {name: arrays.get_slice(name).get_dtype() for name in arrays.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return [f"{file.name}: not a safetensors file: {error}"]
    return [f"{file.name}: {name} is {given}, expected F32" for name, given in types.items() if given != "F32"]


def _wrong_state(path: Path) -> list[str]:
    """What is wrong with the part of `state.json` that every checkpoint has."""
    named = STEP_DIRECTORY.fullmatch(path.name)
    try:
        state = parse_json((path / STATE).read_bytes())
        step, llm = state["step"], state.get("llm_sha256")
    except (AttributeError, *NOT_JSON_OF_OURS) as error:
        return [f"{STATE}: damaged: {type(error).__name__}: {error}"]
    if type(step) is not int or (named and int(named[1]) != step):
        return [f"{STATE}: holds step {step!r}, the directory's name expects {int(named[1]) if named else 'a number'}"]
    if llm is not None and not isinstance(llm, str):
        return [f"{STATE}: llm_sha256 is {llm!r}, expected text"]
    return []
