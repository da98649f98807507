"""What reads a run while another process trains in it finds whole checkpoints, and the right name in the lock."""

import fcntl
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training import checkpoint, checkpoint_tools, run_lock
from mlx_training.checkpoint import CheckpointStore
from mlx_training.errors import CheckpointError, ConfigError


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A run with one checkpoint."""
    store = CheckpointStore(tmp_path)
    save(store, 1)
    return store


def save(store: CheckpointStore, step: int) -> None:
    """Save the best so far, keeping no other."""
    store.save(step, {"w": np.zeros(3, np.float32)}, {"step": np.float32(step)}, {}, best=True, keep=1)


def save_before_first(owner: Any, name: str, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the run save, and drop what it had, right before `owner.name` is first called."""
    steps, original = iter([2]), getattr(owner, name)

    def saving(*args: Any) -> Any:
        for step in steps:
            save(store, step)
        return original(*args)

    monkeypatch.setattr(owner, name, saving)


@pytest.mark.parametrize("which", ["latest", "best"])
def test_a_pointer_moves_while_it_is_read(which: str, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save_before_first(checkpoint, "read_checkpoint", store, monkeypatch)
    assert store.load(which).step == 2


def test_a_checkpoint_that_is_gone_for_good_is_said_to_be(store: CheckpointStore) -> None:
    shutil.rmtree(store.directory / "step_00000001")
    with pytest.raises(CheckpointError, match="there is no 'best' checkpoint"):
        store.load("best")


@pytest.mark.parametrize(
    ("moment", "read"), [("_problems", "verify_checkpoints"), ("_is_complete", "list_checkpoints")]
)
def test_checkpoints_dropped_while_they_are_looked_at(
    moment: str, read: str, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_before_first(checkpoint_tools, moment, store, monkeypatch)
    result = getattr(checkpoint_tools, read)(store.directory.parent)
    (entry,) = result["checkpoints"]
    assert entry["step"] == 2 and entry.get("ok", True) and entry.get("complete", True) and entry.get("latest", True)
    assert not result.get("pointers")


def test_a_pointer_that_moves_is_not_lost(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save_before_first(CheckpointStore, "paths", store, monkeypatch)
    assert checkpoint_tools._lost_pointers(store) == []


def test_a_checkpoint_is_never_listed_while_it_is_removed(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[list[str]] = []
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path: (listed.append([p.name for p in store.paths()]), remove(path)))
    save(store, 2)
    assert listed == [["step_00000002"]]
    assert not list(store.directory.glob(".tmp-*"))


def test_a_lock_names_its_holder_who_has_only_just_begun(tmp_path: Path) -> None:
    path = tmp_path / run_lock.LOCK
    path.write_text(json.dumps({"pid": 1, "host": "old", "started": "then"}))
    with path.open("r+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        later = threading.Timer(0.05, path.write_text, [json.dumps({"pid": 2, "host": "new", "started": "now"})])
        later.start()
        with pytest.raises(ConfigError, match="by process 2 on new, since now"), run_lock.locked(tmp_path):
            pass
        later.join()


def test_a_lock_that_holds_noise(tmp_path: Path) -> None:
    path = tmp_path / run_lock.LOCK
    path.write_bytes(b"\xff\xfe{")
    with path.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="by another process"), run_lock.locked(tmp_path):
            pass
    with run_lock.locked(tmp_path):
        assert json.loads(path.read_text())["pid"]
    assert not path.exists()
