"""Which backend a name means, and what is recorded about a run's surroundings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_training import environment
from mlx_training.errors import BackendError


@pytest.mark.parametrize(
    ("apple", "installed", "expected"),
    [
        (True, ["mlx", "torch"], "mlx"),
        (True, ["torch"], "torch"),
        (False, ["mlx", "torch"], "torch"),
        (False, ["mlx"], "mlx"),
    ],
)
def test_auto_prefers_mlx_on_apple_silicon_only(
    monkeypatch: pytest.MonkeyPatch, apple: bool, installed: list[str], expected: str
) -> None:
    monkeypatch.setattr(environment, "is_apple_silicon", lambda: apple)
    monkeypatch.setattr(environment, "installed_backends", lambda: dict.fromkeys(installed, "1.0"))
    assert environment.resolve_backend("auto") == expected


def test_absent_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_backends", lambda: {"torch": "2.13.0"})
    assert environment.resolve_backend("torch") == "torch"
    with pytest.raises(BackendError, match=r"'mlx' is not installed.*torch.*pip install 'mlx-training\[mlx\]'"):
        environment.resolve_backend("mlx")
    monkeypatch.setattr(environment, "installed_backends", dict)
    with pytest.raises(BackendError, match=r"no backend is installed.*mlx-training\[mlx\].*mlx-training\[torch\]"):
        environment.resolve_backend("auto")


def test_unknown_backend_lists_the_choices() -> None:
    with pytest.raises(BackendError, match=r"'jax'.*mlx, torch, auto"):
        environment.resolve_backend("jax")


@pytest.mark.parametrize(("platform", "usable"), [("linux", False), ("darwin", True)])
def test_mlx_on_linux_needs_its_compute_library(monkeypatch: pytest.MonkeyPatch, platform: str, usable: bool) -> None:
    monkeypatch.setattr(environment, "package_version", {"mlx": "0.32.4"}.get)
    monkeypatch.setattr(sys, "platform", platform)
    assert ("mlx" in environment.installed_backends()) is usable


def test_versions_import_no_framework() -> None:
    code = (
        "import json, sys; from mlx_training import environment as e; e.resolve_backend('auto');"
        "print(json.dumps([e.versions(), [n for n in ('mlx', 'torch', 'transformers') if n in sys.modules]]))"
    )
    repository = Path(environment.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, timeout=60)
    assert done.returncode == 0, done.stderr
    versions, loaded = json.loads(done.stdout)
    assert loaded == []
    assert versions["cpus"] >= 1
    assert versions["memory_gb"] > 0.1
    assert versions["packages"]["numpy"]


def test_git_state_sees_a_change(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert environment.git_state(tmp_path / "absent") is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    state = environment.git_state(tmp_path)
    assert state is not None
    assert (len(state["commit"]), state["branch"], state["dirty"]) == (40, "main", False)
    (tmp_path / "file").write_text("two")
    assert environment.git_state(tmp_path) == {**state, "dirty": True}


def test_report_names_a_broken_backend_instead_of_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr(environment, "installed_backends", lambda: {"mlx": "0.32.4"})
    monkeypatch.setattr(environment, "_describe_mlx", broken)
    backends = environment.report()["backends"]
    assert "libmlx.so" in backends["mlx"]["error"]
    assert backends["torch"] == {"missing": "pip install 'mlx-training[torch]'"}
