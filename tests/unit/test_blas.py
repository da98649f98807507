"""MLX's products on Linux go through a fast BLAS, and every way that fails leaves the stock one and a reason."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_training.blas import load_fast_blas
from mlx_training.environment import installed_backends

REPOSITORY = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only MLX's Linux wheel carries a reference BLAS")
PRODUCT = """
import json, sys, time
{before}
from mlx_training.blas import load_fast_blas
report = load_fast_blas()
result = dict(name=report.name, how=report.how, reason=report.reason)
if {measure}:
    import numpy as np, mlx.core as mx
    mx.set_default_device(mx.cpu)
    a, b = np.random.default_rng(0).standard_normal((2, 512, 512), dtype=np.float32)
    def error(given, expected):
        return float(np.abs(np.array(given) - expected).max() / np.abs(expected).max())

    a_mlx, b_mlx, times = mx.array(a), mx.array(b), []
    for _ in range(4):
        start = time.perf_counter()
        mx.eval(product := a_mlx @ b_mlx)
        times.append(time.perf_counter() - start)
    result |= dict(seconds=min(times), float32=error(product, a @ b))
    result["float64"] = error(mx.array(a.astype(float), mx.float64) @ mx.array(b.astype(float), mx.float64), a @ b)
    result["complex64"] = error(mx.array(a + 1j * b) @ mx.array(b + 1j * a), (a + 1j * b) @ (b + 1j * a))
    result["transposed"] = error(a_mlx.T[:, :100] @ b_mlx.T[:100, 7:], a.T[:, :100] @ b.T[:100, 7:])
print(json.dumps(result))
"""

NARROW = """
import json, time
from mlx_training.blas import load_fast_blas
load_fast_blas()
import mlx.core as mx
mx.set_default_device(mx.cpu)
def seconds_a_column(columns):
    a, b, times = mx.ones((2048, 256)), mx.ones((256, columns)), []
    mx.eval(a, b)
    for _ in range(5):
        start = time.process_time()
        mx.eval(a @ b)
        times.append(time.process_time() - start)
    return min(times) / columns
print(json.dumps(dict(narrow=seconds_a_column(256), wide=seconds_a_column(512))))
"""


def in_fresh_process(*, before: str = "", measure: bool = False, **environment: str) -> dict[str, Any]:
    return run_fresh(PRODUCT.format(before=before, measure=measure), environment)


def run_fresh(code: str, environment: dict[str, str]) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@LINUX
@pytest.mark.skipif("mlx" not in installed_backends(), reason="MLX is not installed")
def test_product_is_several_times_faster_and_equal_to_numpy() -> None:
    fast = in_fresh_process(measure=True, MLX_TRAINING_BLAS="")
    if fast["how"] == "stock":
        pytest.skip(f"no BLAS to load here: {fast['reason']}")
    stock = in_fresh_process(measure=True, MLX_TRAINING_BLAS="off")
    assert stock["how"] == "stock"
    assert fast["seconds"] * 3 < stock["seconds"], (fast, stock)
    for kind in ("float32", "float64", "complex64", "transposed"):
        assert fast[kind] < 1e-4, (kind, fast)


@LINUX
@pytest.mark.skipif("mlx" not in installed_backends(), reason="MLX is not installed")
def test_the_first_products_are_as_fast_as_later_ones() -> None:
    seconds = run_fresh(NARROW, {"MLX_TRAINING_BLAS": ""})
    assert seconds["narrow"] < 2 * seconds["wide"], seconds  # it was 3.7 times before the workspace was written


@LINUX
def test_a_forwarder_is_compiled_once(tmp_path: Path) -> None:
    first = in_fresh_process(XDG_CACHE_HOME=str(tmp_path), MLX_TRAINING_BLAS="")
    if first["how"] != "forwarder":
        pytest.skip(f"no forwarder here: {first}")
    (library,) = (tmp_path / "mlx-training").iterdir()  # and no build folder left behind
    compiled_at = library.stat().st_mtime_ns
    assert in_fresh_process(XDG_CACHE_HOME=str(tmp_path), PATH="", MLX_TRAINING_BLAS="") == first
    assert library.stat().st_mtime_ns == compiled_at


@LINUX
@pytest.mark.parametrize("damage", ["", "import mlx.core"])
def test_every_failure_has_its_reason(tmp_path: Path, damage: str) -> None:
    if damage and "mlx" not in installed_backends():
        pytest.skip("MLX is not installed")
    library = tmp_path / "libnothing.so"
    library.write_text("not a library")
    report = in_fresh_process(before=damage, MLX_TRAINING_BLAS=str(library))
    assert report["how"] == "stock"
    assert ("imported first" if damage else "libnothing.so") in report["reason"]


@LINUX
def test_no_compiler_and_no_cache_fall_back(tmp_path: Path) -> None:
    without_compiler = in_fresh_process(XDG_CACHE_HOME=str(tmp_path), PATH="", MLX_TRAINING_BLAS="")
    assert "compiler" in without_compiler["reason"] or "brings no OpenBLAS" in without_compiler["reason"]
    (tmp_path / "file").write_text("")
    without_cache = in_fresh_process(XDG_CACHE_HOME=str(tmp_path / "file"), MLX_TRAINING_BLAS="")
    assert "XDG_CACHE_HOME" in without_cache["reason"] or "brings no OpenBLAS" in without_cache["reason"]


@pytest.mark.skipif(sys.platform == "linux", reason="elsewhere nothing is replaced")
def test_nothing_to_do_elsewhere() -> None:
    assert load_fast_blas().how == "stock"
