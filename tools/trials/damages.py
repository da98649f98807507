"""What `damage` does to the newest checkpoint of a run: every kind of damage, with what must be said about it."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_training.checkpoint_files import CONTENTS, MANIFEST, MODEL, OPTIMIZER, STATE, Arrays, manifest_of

FILES = (*CONTENTS, MANIFEST)


@dataclass(frozen=True)
class Place:
    """A copy of a run that may be damaged: its newest checkpoint, the one before, and one of another model."""

    newest: Path
    previous: Path
    foreign: Path
    draw: random.Random

    @property
    def checkpoints(self) -> Path:
        return self.newest.parent

    def file(self) -> Path:
        """Any file of the newest checkpoint."""
        return self.newest / self.draw.choice(FILES)

    def sign(self) -> None:
        """Make a manifest that fits, as somebody would who means it."""
        (self.newest / MANIFEST).write_text(manifest_of(self.newest))


@dataclass(frozen=True)
class Damage:
    """What was done, and what every message about it must name."""

    what: str
    named: str
    is_pointer: bool = False  # no checkpoint is damaged: the newest must be used
    concerns_evaluation: bool = True  # else weights and step are right, and only going on would fail


def truncated(place: Place) -> Damage:
    path = place.file()
    content = path.read_bytes()
    end = place.draw.choice((0, 1, 7, 8, 9, len(content) - 1, place.draw.randrange(len(content))))
    path.write_bytes(content[:end])
    return Damage(f"{path.name} cut off at {end} of {len(content)}", path.name)


def flipped(place: Place) -> Damage:
    path = place.file()
    content = bytearray(path.read_bytes())
    bits = place.draw.sample(range(8 * len(content)), place.draw.choice((1, 1, 1, 2, 3, 8, 64)))
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return Damage(f"{path.name} with bits {bits[:3]} flipped, of {len(bits)}", path.name)


def overwritten(place: Place) -> Damage:
    """As after a loss of power: the right size, a part of it zeros; or bytes that were not there."""
    path = place.file()
    content = path.read_bytes()
    start = place.draw.randrange(len(content))
    zeros = content[:start] + bytes(len(content) - start)
    longer = content + place.draw.randbytes(place.draw.choice((1, 8, 4096)))
    path.write_bytes(zeros if zeros != content and place.draw.random() < 0.5 else longer)
    return Damage(f"{path.name} with zeros from {start}, or longer", path.name)


def missing(place: Place) -> Damage:
    path = place.file()
    path.unlink()
    return Damage(f"{path.name} missing", path.name)


def emptied(place: Place) -> Damage:
    shutil.rmtree(place.newest)
    place.newest.mkdir()
    return Damage("an empty directory", place.newest.name)


def vanished(place: Place) -> Damage:
    """The whole directory; a file, a pipe or a link to nothing may be in its place."""
    shutil.rmtree(place.newest)
    what = put_something(place.newest, place.draw.choice(("nothing", "file", "pipe", "loop", "dangling")))
    return Damage(f"{what} in place of the directory", place.newest.name)


def replaced(place: Place) -> Damage:
    path = place.file()
    path.unlink()
    what = put_something(path, place.draw.choice(("directory", "pipe", "loop", "dangling", "device")))
    return Damage(f"{what} in place of {path.name}", path.name)


def foreign_manifest(place: Place) -> Damage:
    source = place.draw.choice((place.previous, place.foreign))
    shutil.copyfile(source / MANIFEST, place.newest / MANIFEST)
    return Damage(f"{MANIFEST} of {source}", place.newest.name)


def foreign_file(place: Place) -> Damage:
    """One file of another checkpoint, its manifest made anew or not."""
    name, source = place.draw.choice(CONTENTS), place.foreign
    shutil.copyfile(source / name, place.newest / name)
    if is_signed := name != STATE and place.draw.random() < 0.5:  # a signed state of another run is not to be told
        place.sign()
    return Damage(
        f"{name} of {source}{', signed' * is_signed}", name, concerns_evaluation=name == MODEL or not is_signed
    )


def foreign_directory(place: Place) -> Damage:
    """A whole checkpoint of another model, or the previous one under the newest one's name."""
    source = place.draw.choice((place.previous, place.foreign))
    shutil.rmtree(place.newest)
    shutil.copytree(source, place.newest)
    return Damage(f"{source} as {place.newest.name}", place.newest.name)


def misfit(place: Place) -> Damage:
    """Arrays of another shape, name or type, in a file that is as it should be."""
    name = place.draw.choice((MODEL, OPTIMIZER))
    arrays = load_file(place.newest / name)
    key = place.draw.choice(list(arrays))
    change = place.draw.choice(list(MISFITS))
    MISFITS[change](arrays, key)
    save_file(arrays, place.newest / name)
    place.sign()
    # Evaluation never looks at moments, but float32 every array must be.
    return Damage(f"{change}: {key} of {name}", name, concerns_evaluation=name == MODEL or change == "type")


def _change(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays, str], None]:
    def apply(arrays: Arrays, key: str) -> None:
        arrays[key] = np.ascontiguousarray(change(arrays[key]))

    return apply


MISFITS: dict[str, Callable[[Arrays, str], Any]] = {
    "missing": lambda arrays, key: arrays.pop(key),
    "renamed": lambda arrays, key: arrays.update({key + "x": arrays.pop(key)}),
    "extra": lambda arrays, key: arrays.update({"stranger": np.zeros(3, np.float32)}),
    "flat": _change(lambda array: array.reshape(-1, 1)),
    "longer": _change(lambda array: np.concatenate([array.reshape(-1), np.zeros(1, np.float32)])),
    "empty": _change(lambda array: np.zeros((0, 2), np.float32)),
    "none": lambda arrays, key: arrays.clear(),
    "type": lambda arrays, key: arrays.update({key: arrays[key].astype(np.float64)}),
    "integers": lambda arrays, key: arrays.update({key: arrays[key].astype(np.int32)}),
}


def bad_header(place: Place) -> Damage:
    """What is no safetensors file, though the manifest fits it."""
    path = place.newest / place.draw.choice((MODEL, OPTIMIZER))
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    huge = place.draw.choice((2**64 - 1, 2**63, 2**40, 100_000_001, len(content), 0))
    wrong: dict[str, bytes] = {
        f"length {huge}": huge.to_bytes(8, "little") + content[8:],
        "a nested header": len(content).to_bytes(8, "little") + b"[" * len(content),
        "a list as header": with_header(b"[]", data),
        "text as header": with_header(b'"text"', data),
        "no data": content[: 8 + size],
        "half the data": content[: 8 + size + len(data) // 2],
        "other offsets": with_header(header.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1), data),
        "an endless shape": with_header(header.replace(b'"shape":[', b'"shape":[9223372036854775807,', 1), data),
        "an unknown type": with_header(header.replace(b'"F32"', b'"F33"', 1), data),
        "bfloat16": with_header(header.replace(b'"F32"', b'"BF16"', 1), data),
        "a pickle": b"\x80\x04\x95" + data,
        "nothing": b"",
    }
    what = place.draw.choice(list(wrong))
    path.write_bytes(wrong[what])
    place.sign()
    return Damage(f"{path.name}: {what}, signed", path.name)


def with_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def bad_state(place: Place) -> Damage:
    """A `state.json` that is not JSON, or not a state, though the manifest fits it."""
    path = place.newest / STATE
    texts = ("", "[]", "null", "7", '"text"', "{", "[" * 100_000, '{"a":' * 100_000, "{}", '{"step": 1e999}', "\x00")
    path.write_bytes(place.draw.choice((*(text.encode() for text in texts), b"\xff\xfe{}", b'{"step": ' + b"9" * 5000)))
    place.sign()
    return Damage(f"{STATE}: {path.read_bytes()[:20]!r}, signed", STATE)


def hostile_state(place: Place) -> Damage:
    """One value of `state.json` that cannot be right."""
    state: dict[str, Any] = json.loads((place.newest / STATE).read_text())
    step, progress = state["step"], state["progress"]
    numbers: tuple[Any, ...] = (-1, 2.5, True, "8", None, [], {}, 10**30, float("nan"), float("inf"))
    wrong: dict[str, tuple[Any, ...]] = {
        "step": (step + 1, step - 1, -step, float(step), str(step), None, [step], 10**30, True),
        "llm_sha256": (5, "0" * 64, [], {}, True, "gone"),
        "backend": (None, 5, ["mlx"], "gone"),
        "progress": (None, 5, [], {}, "text", list(progress), "gone"),
        "evaluated": (*numbers, step + 1, "gone"),
        "tokens": (*numbers, "gone"),
        "skipped": (*numbers, "gone"),
        "evaluations_without_improvement": (*numbers, "gone"),
        "best": ("8", [], {}, True, float("nan"), float("-inf"), 10**400, "gone"),
        "loss": ("8", [], {}, True, None, float("nan"), "gone"),
        "seconds": ("8", [], {}, True, None, -1.5, float("inf"), "gone"),
        "stopped_early": (0, 1, "false", None, [], "gone"),
        "unknown": (1,),
    }
    key = place.draw.choice(list(wrong))
    value = place.draw.choice(wrong[key])
    target = state if key in state else progress
    if value == "gone":
        del target[key]
    else:
        target[key] = value
    (place.newest / STATE).write_text(json.dumps(state))
    place.sign()
    concerns = key == "step" or (key == "llm_sha256" and value != "gone")
    return Damage(f"{STATE}: {key} is {str(value)[:40]}, signed", STATE, concerns_evaluation=concerns)


def lost_pointer(place: Place) -> Damage:
    """`latest` or `best` that names no checkpoint; none is damaged."""
    path = place.checkpoints / place.draw.choice(("latest", "best"))
    texts = ("", "\n", "garbage", "step_00000099\n", "../../elsewhere", "/", ".", "..", "step_", "x" * 10_000, "\x00")
    what = place.draw.choice(("missing", "binary", "directory", "pipe", "loop", "dangling", "device", *["text"] * 6))
    path.unlink()
    if what == "text":
        path.write_text(place.draw.choice((*texts, str(place.foreign), f"{place.newest.name}/{MODEL}")))
    elif what == "binary":
        path.write_bytes(place.draw.randbytes(200))
    elif what != "missing":
        put_something(path, what)
    return Damage(f"{path.name}: {what}", path.name, is_pointer=True)


def put_something(path: Path, what: str) -> str:
    """Something of this kind at a path where nothing is."""
    put: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "file": lambda: path.write_text("text"),
        "directory": lambda: (path / "inner").mkdir(parents=True),
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path.name),
        "dangling": lambda: path.symlink_to("nowhere"),
        "device": lambda: path.symlink_to("/dev/zero"),
    }
    put[what]()
    return what


KINDS: tuple[Callable[[Place], Damage], ...] = (
    *(truncated, flipped, overwritten, missing, emptied, vanished, replaced),
    *(foreign_manifest, foreign_file, foreign_directory, misfit, bad_header, bad_state, hostile_state, lost_pointer),
)
