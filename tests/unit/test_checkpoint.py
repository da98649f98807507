"""Checkpoints: whole or absent, verified, retained; and clear words when something is wrong."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_training import checkpoint, checkpoint_files
from mlx_training.checkpoint import CheckpointStore, check_shapes
from mlx_training.checkpoint_files import CONTENTS, MANIFEST, STATE, Checkpoint, manifest_of, verify
from mlx_training.checkpoint_writer import CheckpointWriter
from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.run_directory import claim_run_directory, full_disk_explained

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"a.weight": (3, 2), "b": ()}


def save(
    store: CheckpointStore, step: int, *, best: bool = False, keep: int = 3, state: dict[str, object] | None = None
) -> Path:
    model = {"a.weight": np.full((3, 2), step, np.float32), "b": np.array(step, np.float32)}
    optimizer = {"a.weight.m": np.ones((3, 2), np.float32), "step": np.array(step, np.float32)}
    return store.save(step, model, optimizer, state or {"position": step * 4}, best=best, keep=keep)


def steps(store: CheckpointStore) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in store.paths()]


def test_round_trip_keeps_values_types_and_scalars(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    model = {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T, "gain": np.array(2.5, np.float32)}
    store.save(7, model, {"step": np.array(7, np.float32)}, {"best": None, "rows": [1, 2]}, best=False, keep=1)
    loaded = store.load()
    assert loaded.step == 7 and loaded.state == {"best": None, "rows": [1, 2]}
    assert loaded.model["gain"].shape == () and loaded.optimizer["step"].dtype == np.float32
    np.testing.assert_array_equal(loaded.model["w"], model["w"])  # a transposed view: memory order must not matter
    assert sorted(p.name for p in loaded.path.iterdir()) == sorted([*CONTENTS, MANIFEST])
    assert not list(store.directory.glob(".tmp*"))


def test_retention_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30, 40):
        save(store, step, best=step == 10, keep=2)
    assert steps(store) == [10, 30, 40]
    assert store.load("best").step == 10 and store.load("latest").step == 40
    save(store, 50, best=True, keep=1)
    assert steps(store) == [50]


def test_resuming_from_an_older_checkpoint_abandons_the_newer_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30):
        save(store, step)
    store.rewind(store.load(store.directory / "step_00000010"))
    assert store.load().step == 10
    save(store, 20)  # trained again: replaces the old 20
    assert steps(store) == [10, 20] and store.load().step == 20


@pytest.mark.parametrize("name", [*CONTENTS, MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "foreign"])
def test_every_damage_is_found_and_the_previous_checkpoint_named(tmp_path: Path, name: str, damage: str) -> None:
    store = CheckpointStore(tmp_path)
    good, bad = save(store, 10), save(store, 20)
    data = bytearray((bad / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        (bad / name).write_bytes(data)
    elif damage == "truncate":
        (bad / name).write_bytes(data[:-3])
    elif damage == "remove":
        (bad / name).unlink()
    else:
        (bad / name).write_bytes((good / name).read_bytes())
    with pytest.raises(CheckpointError) as error:
        store.load()
    message = str(error.value)
    assert str(bad) in message and f"--resume {good}" in message
    assert (name if damage != "foreign" else MANIFEST) in message
    loaded, message = store.latest_valid()
    assert loaded is not None and loaded.step == 10 and str(bad) in message


def test_every_single_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 1) / MANIFEST
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert verify(path.parent), position


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10).rename(store.directory / "step_00000020")
    with pytest.raises(CheckpointError, match=r"state.json: holds step 10, .* expects 20"):
        store.load()


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[1]",
        "[" * 100_000,
        '{"step": "20"}',
        '{"step": 1e999}',
        '{"step": 20, "llm_sha256": 1}',
    ],
)
def test_a_state_that_is_believed_must_be_one(tmp_path: Path, state: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10)
    path = save(store, 20)
    (path / STATE).write_text(state)
    (path / MANIFEST).write_text(manifest_of(path))  # sums of what is there now
    (problem,) = verify(path)
    assert problem.startswith(f"{STATE}: ")
    assert store.latest_valid()[0].step == 10


def test_a_manifest_of_any_kind_is_only_damaged(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 20)
    (path / MANIFEST).write_text("[" * 100_000)
    assert "manifest.json: damaged" in verify(path)[0]


def test_all_damaged_is_an_error_and_none_saved_is_not(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.latest_valid() == (None, "")
    with pytest.raises(CheckpointError, match="saved nothing"):
        store.load("best")
    (save(store, 10) / STATE).unlink()
    with pytest.raises(CheckpointError, match="No checkpoint of this run is good"):
        store.latest_valid()


def test_a_lost_pointer_means_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        save(store, step)
    (store.directory / "latest").write_bytes(b"step_0\xff")
    assert store.load().step == 20


def refuse(*steps: int) -> Callable[[Checkpoint], None]:
    """Checkpoints of these steps do not fit."""

    def fits(checkpoint: Checkpoint) -> None:
        if checkpoint.step in steps:
            raise CheckpointError(f"{checkpoint.path}: misfit")

    return fits


def test_a_checkpoint_that_does_not_fit_gives_way_to_the_one_before(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    paths = [save(store, step, best=step == 10) for step in (10, 20, 30)]
    loaded, message = store.latest_valid(refuse(30))
    assert loaded is not None and loaded.step == 20
    assert message == f"{paths[2]}: misfit\nusing the older checkpoint {paths[1]}"
    assert store.rewind(loaded, refuse(30)) == "" and store.latest_valid(refuse(30))[1] == ""
    assert store.has_best
    with pytest.raises(CheckpointError, match=r"(?s)00010: misfit.*00030: misfit\nNo checkpoint of this run is good"):
        store.latest_valid(refuse(10, 20, 30))
    assert "00010: misfit\nno checkpoint is known to be the best" in store.rewind(loaded, refuse(10))
    assert not store.has_best, "the next evaluation makes one"


@pytest.mark.parametrize("which", ["latest", "best"])
@pytest.mark.parametrize("thing", ["text", "absent", "missing", "directory", "pipe", "loop"])
def test_a_lost_pointer_is_told_and_repaired(tmp_path: Path, which: str, thing: str) -> None:
    store = CheckpointStore(tmp_path)
    progress = {"best": 0.5, "evaluated": 20, "evaluations_without_improvement": 0}
    for step in (10, 20, 30):
        save(store, step, best=step == 20, state={"progress": progress} if step > 10 else {})
    path = store.directory / which
    path.unlink()
    put: dict[str, Callable[[], object]] = {
        "text": lambda: path.write_text("garbage"),
        "absent": lambda: path.write_text("step_00000031"),
        "missing": lambda: None,
        "directory": lambda: (path / "inner").mkdir(parents=True),
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path.name),
    }
    put[thing]()
    assert list(store.lost_pointers()) == [which]
    loaded, message = store.latest_valid()
    assert loaded is not None and loaded.step == 30
    assert message.startswith(str(path)) and f"the checkpoint {loaded.path}" in message.replace("older ", "")
    store.rewind(loaded)
    assert not store.lost_pointers() and store.load("best").step == 20 and store.load("latest").step == 30


def test_every_checkpoint_gone_is_no_new_start(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    shutil.rmtree(save(store, 10))
    with pytest.raises(CheckpointError, match=r"latest names 'step_00000010', expected one of no checkpoints"):
        store.latest_valid()


@pytest.mark.parametrize("content", [b"[]", b"{}", b"[" * 100_000, b'{"step": 20.0}', b'{"step": 20, "llm_sha256": 1}'])
def test_a_state_with_a_manifest_that_fits(tmp_path: Path, content: bytes) -> None:
    path = save(CheckpointStore(tmp_path), 20)
    (path / STATE).write_bytes(content)
    (path / MANIFEST).write_text(checkpoint_files.manifest_of(path))
    with pytest.raises(CheckpointError, match=r"damaged checkpoint.\n  state.json: "):
        CheckpointStore(tmp_path).load()


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\2\0\0\0\0\0\0\0[]"])
def test_arrays_with_a_manifest_that_fits(tmp_path: Path, content: bytes) -> None:
    path = save(CheckpointStore(tmp_path), 20)
    (path / "model.safetensors").write_bytes(content)
    save_file({"step": np.zeros(1, np.int8)}, path / "optimizer.safetensors")
    (path / MANIFEST).write_text(checkpoint_files.manifest_of(path))
    problems = verify(path)
    assert "model.safetensors: not a safetensors file: " in problems[0]
    assert problems[1:] == ["optimizer.safetensors: step is I8, expected F32"]


@pytest.mark.parametrize("thing", ["file", "dangling"])
def test_what_is_in_the_place_of_a_checkpoint_gives_way(tmp_path: Path, thing: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10)
    place = store.directory / "step_00000020"
    place.write_text("text") if thing == "file" else place.symlink_to("nowhere")
    save(store, 20)
    assert steps(store) == [10, 20] and not list(store.directory.glob(".tmp*"))


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10)
    for failing in ("fsync", "rename"):

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os if failing == "fsync" else Path, failing, refuse)
            with pytest.raises(CheckpointError, match=r"No space left .* MB are free.* output_dir"):
                save(store, 20)
        assert steps(store) == [10] and store.load().step == 10
        assert not list(store.directory.glob(".tmp*"))


def test_a_disk_with_too_little_space_is_not_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10)
    usage = shutil.disk_usage(tmp_path)
    needed = sum(a.nbytes for part in (store.load().model, store.load().optimizer) for a in part.values())
    needed += checkpoint.MARGIN
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    monkeypatch.setattr(checkpoint_files, "save_file", lambda *_: pytest.fail("written"))
    with pytest.raises(CheckpointError, match=r"needs 1.0 MB. 1.0 MB are free. Remove files .* intact; .*--resume"):
        save(store, 20)
    assert steps(store) == [10] and not list(store.directory.glob(".tmp*"))
    monkeypatch.undo()
    save(store, 20)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_directory_that_refuses(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 10)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "save_file", refuse)
        with pytest.raises(CheckpointError, match=os.strerror(code)) as error:
            save(store, 20)
    assert error.value.exit_code == 3 and steps(store) == [10] and not list(store.directory.glob(".tmp*"))


def test_other_writes_to_a_full_disk_are_explained(tmp_path: Path) -> None:
    message = r"x.json: cannot be written: No space left .* MB are free"
    with pytest.raises(CheckpointError, match=message), full_disk_explained(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.json")
    with pytest.raises(FileNotFoundError), full_disk_explained(tmp_path):
        (tmp_path / "absent").read_text()


def test_writing_does_not_hold_up_and_a_failure_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, arrays = CheckpointStore(tmp_path), {"w": np.ones(4, np.float32)}
    release, save_now = threading.Event(), CheckpointStore.save

    def slow(*given: object, **options: object) -> Path:
        assert release.wait(20)
        return save_now(*given, **options)  # type: ignore[arg-type]

    writer = CheckpointWriter(store)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", slow)
        writer.save(10, arrays, arrays, {}, best=True, keep=1)
        assert not store.paths()
        release.set()
        writer.save(20, arrays, arrays, {}, best=False, keep=1)  # waits for the first
        writer.wait()
    assert steps(store) == [10, 20] and store.load("best").step == 10
    again = partial(writer.save, 40, arrays, arrays, {}, best=False, keep=1)
    for surfaces in (writer.wait, again, writer.close):
        writer.save(30, arrays, arrays, {"bad": float("nan")}, best=False, keep=1)
        with pytest.raises(ValueError, match="JSON"):
            surfaces()
        writer.wait()  # it was raised once
    assert steps(store) == [10, 20]


KILLED = """
import os, signal, sys
import numpy as np
from mlx_training.checkpoint import CheckpointStore

COUNTED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
arrays = {"w": np.full(4, 20, np.float32)}
for moment, run in enumerate(sys.argv[1:]):
    if (child := os.fork()) == 0:
        store, left = CheckpointStore(run), [moment]

        def count(event, _):
            if event in COUNTED:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        store.save(20, arrays, arrays, {}, best=True, keep=1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_of_a_save_leaves_a_good_latest(tmp_path: Path) -> None:
    store, arrays = CheckpointStore(tmp_path / "start"), {"w": np.full(4, 10, np.float32)}
    first = store.save(10, arrays, arrays, {}, best=False, keep=2)
    store.save(20, arrays, arrays, {}, best=False, keep=2)  # the killed save replaces this one
    store.rewind(store.load(first))
    runs = [tmp_path / str(moment) for moment in range(44)]  # a save makes about 40 calls that can be interrupted
    for run in runs:
        shutil.copytree(tmp_path / "start", run)
    result = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, runs)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    codes = [int(line) for line in result.stdout.split()]
    assert len(codes) == len(runs) and set(codes) == {0, -9}, "some moments must fall inside the save, some after it"
    found = []
    for run in runs:
        checkpoint, _ = CheckpointStore(run).latest_valid()
        assert checkpoint is not None and checkpoint.model["w"][0] == checkpoint.step
        assert not list((run / "checkpoints").glob(".tmp*"))
        found.append(checkpoint.step)
    assert found == sorted(found) and set(found) == {10, 20}


def test_check_shapes_lists_everything_at_once() -> None:
    given = {"a.weight": (2, 3), "c": (1,)}
    with pytest.raises(CheckpointError) as error:
        check_shapes(SHAPES, given, "run/x")
    message = str(error.value)
    for part in ("run/x", "3 of them", "missing: b ()", "unknown: c (1,)", "a.weight is (2, 3), expected (3, 2)"):
        assert part in message
    check_shapes(SHAPES, dict(SHAPES), "fine")


def test_a_run_directory_is_claimed_once(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    assert claim_run_directory(run, resume=False) == run and run.is_dir()
    (run / "notes.txt").touch()
    claim_run_directory(run, resume=False)  # not a run yet
    (run / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"already holds a run .*--resume auto.*output_dir"):
        claim_run_directory(run, resume=False)
    claim_run_directory(run, resume=True)
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "notes.txt"]


def test_an_unwritable_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = [tmp_path / "file", tmp_path / "file" / "run"]
    if sys.platform == "linux":
        places.append(Path("/proc/self"))  # exists, and refuses new files even to root
    for directory in places:
        with pytest.raises(ConfigError, match=r"output_dir: .* cannot be written"):
            claim_run_directory(directory, resume=False)


def test_state_must_be_plain_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        CheckpointStore(tmp_path).save(1, {}, {}, {"best": float("nan")}, best=False, keep=1)
    path = save(CheckpointStore(tmp_path), 1)
    assert json.loads((path / STATE).read_text()) == {"step": 1, "position": 4}
