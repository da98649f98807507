"""What this machine can do: float products and copies a second, measured by each framework in a process of its own.

The caller imports no framework. A measurement takes about a second (beside the framework's start) and is kept for an
hour in the user's cache, by framework version, device, precision and thread settings. The best of the repetitions
counts: other jobs can only make a machine look slower.
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_training.environment import installed_backends
from mlx_training.run_directory import write_atomic

MAX_AGE = 3600  # seconds a measurement is believed: it may have been taken while others worked
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MLX_TRAINING_BLAS")
TIMEOUT = 60  # seconds, the framework's import on a busy machine included

_COMMON = """
import json, sys, time
wanted, precision = sys.argv[1:]

def best(run, budget=0.6):
    run()
    times, end = [], time.perf_counter() + budget
    while not times or (time.perf_counter() < end and len(times) < 50):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
"""
_TORCH = """
import torch
usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": wanted != "gpu"}
device = wanted if usable.get(wanted) else next(name for name, ok in usable.items() if ok and wanted in ("auto", "gpu"))
def wait():
    if device != "cpu":
        getattr(torch, device).synchronize()
n = 1024 if device == "cpu" else 4096
a = torch.randn(n, n, device=device, dtype=getattr(torch, precision))
b = torch.empty_like(a)
size = 2**24 if device == "cpu" else 2**27
big = torch.zeros(size, device=device)
other = torch.empty_like(big)
product = best(lambda: (torch.mm(a, a, out=b), wait()))
copied = best(lambda: (other.copy_(big), wait()), 0.3)
threads = torch.get_num_threads()
"""
_MLX = """
from mlx_training.blas import load_fast_blas
load_fast_blas()
import os
import mlx.core as mx
gpu = mx.is_available(mx.Device(mx.gpu))
if wanted not in ("auto", "cpu", "gpu") or (wanted == "gpu" and not gpu):
    sys.exit(f"no device {wanted}")
device = "gpu" if gpu and wanted != "cpu" else "cpu"
mx.set_default_device(mx.Device(getattr(mx, device)))
n = 1024 if device == "cpu" else 4096
a = mx.random.normal((n, n)).astype(getattr(mx, precision))
size = 2**24 if device == "cpu" else 2**27
big = mx.zeros(size)
mx.eval(a, big)
product = best(lambda: mx.eval(a @ a))
copied = best(lambda: mx.eval(big + 1), 0.3)
threads = int(os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or os.cpu_count())
"""
_REPORT = """
rates = {"flops_per_second": 2 * n**3 / product, "bytes_per_second": 8 * size / copied}
print(json.dumps({**rates, "device": device, "threads": threads}))
"""
_SCRIPTS = {"torch": _COMMON + _TORCH + _REPORT, "mlx": _COMMON + _MLX + _REPORT}


@dataclass(frozen=True)
class Machine:
    """One framework on this machine: the best rate of a square product, and of a copy (read and write counted)."""

    backend: str
    device: str
    threads: int
    flops_per_second: float
    bytes_per_second: float


def why_slow(device: str, precision: str) -> list[str]:
    """One sentence on why MLX's products are far slower than PyTorch's on this machine, where they are."""
    mlx, torch = (measure(name, device, precision) for name in ("mlx", "torch"))
    if mlx is None or torch is None or mlx.device != "cpu" or 2 * mlx.flops_per_second > torch.flops_per_second:
        return []
    rates = f"{mlx.flops_per_second / 1e9:.0f} GFLOP/s here, PyTorch's {torch.flops_per_second / 1e9:.0f}"
    return [
        f"MLX's products make {rates}, so that large models take longer: on a CPU it has no fast kernels for bfloat16, "
        "and without another library its Linux wheel has the reference BLAS for float32 (`mlx-training env` says which)"
    ]


def measure(backend: str, device: str = "auto", precision: str = "float32", *, fresh: bool = False) -> Machine | None:
    """The rates of an installed backend, measured now or within the last hour; None where it cannot run.

    Never raises: a plan without times is still a plan.
    """
    version = installed_backends().get(backend)
    if version is None:
        return None
    threads = [os.environ.get(name, "") for name in THREAD_VARIABLES]
    key = "/".join([backend, version, device, precision, platform.node(), str(os.cpu_count()), *threads])
    path = _cache_file()
    known = _read(path)
    entry = known.get(key)
    if entry is None or fresh or not 0 <= time.time() - entry["time"] < MAX_AGE:
        found = _measure(backend, device, precision)
        if found is None:
            return None
        entry = {"time": time.time(), "machine": asdict(found)}
        _write(path, key, entry)
    return Machine(**entry["machine"])


def _measure(backend: str, device: str, precision: str) -> Machine | None:
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", _SCRIPTS[backend], device, precision]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, "PYTHONPATH": path}
        )
        return Machine(backend=backend, **json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return None


def _cache_file() -> Path | None:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-training" / "machine.json"
    except RuntimeError:  # no home directory
        return None


def _read(path: Path | None) -> dict[str, Any]:
    """What is known; an unreadable or foreign file is as good as none."""
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path else {}
        return {key: entry for key, entry in known.items() if {"time", "machine"} <= entry.keys()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(path: Path | None, key: str, entry: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(_read(path) | {key: entry}))
    except OSError:
        pass  # a cache that cannot be written costs a second next time
