"""What this machine has: versions, backends, device, BLAS, and which backend `auto` means here.

`versions()`, `git_state()` and `resolve_backend()` read metadata only. `report()` imports the installed frameworks to
ask them for their devices; only the `env` command calls it.
"""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_training.errors import BackendError

BACKENDS = ("mlx", "torch")
_PACKAGES = (
    *("mlx-training", "numpy", "pydantic", "PyYAML", "safetensors", "tokenizers", "sentencepiece", "pyarrow"),
    *("matplotlib", "rich", "mlx", "mlx-lm", "torch", "transformers", "wandb"),
)


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None. Imports nothing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed_backends() -> dict[str, str]:
    """Backend name -> framework version, for the frameworks that can run here."""
    found = {name: version for name in BACKENDS if (version := package_version(name))}
    # On Linux `pip install mlx` alone brings no compute library; that comes with mlx[cpu] or mlx[cuda].
    if sys.platform == "linux" and not any(map(package_version, ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"))):
        found.pop("mlx", None)
    return found


def is_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def resolve_backend(name: str) -> str:
    """The backend that `name` (mlx, torch or auto) means on this machine.

    `auto` is MLX on Apple silicon, else torch (on CUDA or CPU), else MLX on CPU, among the installed ones. Raises
    BackendError when the name is unknown or the backend is not installed, with the command that installs it.
    """
    if name not in (*BACKENDS, "auto"):
        raise BackendError(f"backend: got {name!r}; choose one of {', '.join(BACKENDS)}, auto")
    installed = installed_backends()
    if name == "auto":
        preference = ("mlx", "torch") if is_apple_silicon() else ("torch", "mlx")
        name = next((candidate for candidate in preference if candidate in installed), "")
        if not name:
            raise BackendError(
                "no backend is installed; install one: pip install 'mlx-training[mlx]' "
                "or pip install 'mlx-training[torch]'"
            )
    if name not in installed:
        others = f" (installed here: {', '.join(installed)})" if installed else ""
        raise BackendError(
            f"backend {name!r} is not installed{others}; install it with: pip install 'mlx-training[{name}]'"
        )
    return name


def versions() -> dict[str, Any]:
    """Python, platform and package versions for a run's env.json."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": _num_cpus(),
        "memory_gb": round(_memory() / 2**30, 1),
        "packages": {name: version for name in _PACKAGES if (version := package_version(name))},
    }


def git_state(path: Path | str = ".") -> dict[str, Any] | None:
    """Commit, branch and whether tracked files differ from it; None where there is no repository or no git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def report() -> dict[str, Any]:
    """Everything `mlx-training env` prints. Imports the installed frameworks (seconds)."""
    describe = {"mlx": _describe_mlx, "torch": _describe_torch}
    backends: dict[str, Any] = {}
    for name, version in installed_backends().items():
        try:
            backends[name] = {"version": version, **describe[name]()}
        except Exception as error:  # noqa: BLE001  a broken installation is what this report is for
            backends[name] = {"version": version, "error": f"{type(error).__name__}: {error}"}
    for name in BACKENDS:
        backends.setdefault(name, {"missing": f"pip install 'mlx-training[{name}]'"})
    try:
        auto = resolve_backend("auto")
    except BackendError:
        auto = "none"
    return {**versions(), "backends": backends, "auto": auto, "git": git_state(Path(__file__).parent)}


def _describe_mlx() -> dict[str, Any]:
    from mlx_training.blas import load_fast_blas

    blas = str(load_fast_blas())
    import mlx.core as mx

    metal = mx.metal.is_available()
    device = "gpu (Metal)" if metal else "gpu (CUDA)" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
    return {"device": device, "blas": blas}


def _describe_torch() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        device = f"cuda ({torch.cuda.get_device_name(0)})"
    else:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
    return {"device": device, "threads": torch.get_num_threads()}


def _num_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes of the machine's (or container's) memory that nobody needs now; where no system says so, all there are."""
    found = [_memory()]
    with suppress(OSError, ValueError):
        (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # "max" where there is no limit
        most, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(0, most - used))
    return min(found)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
