"""A fast BLAS for MLX on Linux, loaded before `mlx.core` is imported.

MLX's Linux wheel carries the *reference* BLAS: 270 ms for a 1024x1024x1024 float32 product where OpenBLAS takes 10-20.
libmlx.so looks up `cblas_sgemm`, `cblas_dgemm` and `cblas_cgemm` by name, so a library that exports them and is already
loaded with global symbols is used instead. In this order:

1. A forwarder of three functions, compiled once into the user's cache, to the OpenBLAS inside NumPy's wheel. It comes
   first because it exports nothing else. A whole BLAS would also replace the Fortran routines of PyTorch in the same
   process, which then ignores `torch.set_num_threads` (measured: three threads where one was asked for).
2. A BLAS installed on the machine (OpenBLAS, BLIS, MKL), when NumPy brings none or there is no C compiler.

`MLX_TRAINING_BLAS=off` keeps the stock library, `MLX_TRAINING_BLAS=PATH` loads that one. Threads follow
`OPENBLAS_NUM_THREADS` or `OMP_NUM_THREADS` as the library itself reads them. Nothing here ever fails a run: what went
wrong is in the report. Half precision and `quantized_matmul` do not go through BLAS.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

# NumPy's OpenBLAS has 64-bit integers and prefixed names. The targets are set at run time, so that the compiled file
# depends on no path and a moved or upgraded NumPy needs no new one.
_FORWARDER_SOURCE = """
#include <stdint.h>
typedef int64_t I;
static void (*sgemm)(int, int, int, I, I, I, float, const float *, I, const float *, I, float, float *, I);
static void (*dgemm)(int, int, int, I, I, I, double, const double *, I, const double *, I, double, double *, I);
static void (*cgemm)(int, int, int, I, I, I, const void *, const void *, I, const void *, I, const void *, void *, I);
void mlx_training_set_gemm(void *s, void *d, void *c) { sgemm = s; dgemm = d; cgemm = c; }
void cblas_sgemm(int o, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc) {
    sgemm(o, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
void cblas_dgemm(int o, int ta, int tb, int m, int n, int k, double alpha, const double *a, int lda, const double *b,
                 int ldb, double beta, double *c, int ldc) {
    dgemm(o, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
void cblas_cgemm(int o, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int lda, const void *b,
                 int ldb, const void *beta, void *c, int ldc) {
    cgemm(o, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
"""

# Only names that stand for an optimised library: libblas.so.3 and libcblas.so.3 are often the reference BLAS.
_MACHINE_NAMES = (
    "libopenblas.so.0",
    "libopenblas.so",
    "libopenblasp.so.0",
    "libopenblaso.so.0",
    "libblis.so.4",
    "libblis.so",
    "libmkl_rt.so.2",
    "libmkl_rt.so",
)
_MACHINE_DIRECTORIES = ("/opt/OpenBLAS/lib", "/usr/lib64", "/usr/local/lib", "/opt/intel/oneapi/mkl/latest/lib")


@dataclass(frozen=True)
class BlasReport:
    """Which BLAS MLX uses in this process: `name` may be a path, `reason` says why, or what to do."""

    name: str
    how: Literal["forwarder", "loaded", "stock"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.how}{': ' + self.reason if self.reason else ''})"


class _Unusable(Exception):
    """A candidate that cannot serve; its message becomes part of the reason."""


@functools.cache
def load_fast_blas() -> BlasReport:
    """Make MLX's float32 products fast; call it before `import mlx.core`. Later calls return the first report."""
    if sys.platform != "linux":
        return BlasReport("Accelerate" if sys.platform == "darwin" else "stock", "stock", "nothing to replace")
    stock = functools.partial(BlasReport, "MLX's reference BLAS", "stock")
    choice = os.environ.get("MLX_TRAINING_BLAS", "").strip()
    if choice.lower() == "off":
        return stock("MLX_TRAINING_BLAS=off")
    if "mlx.core" in sys.modules:  # its symbols were bound when it was loaded
        return stock("mlx.core was imported first; import mlx_training.mlx_backend before it")
    try:
        if choice:
            _load_globally(choice)
            return BlasReport(choice, "loaded", "MLX_TRAINING_BLAS")
        return BlasReport(_load_forwarder(), "forwarder")
    except _Unusable as problem:
        if choice:
            return stock(f"MLX_TRAINING_BLAS: {problem}")
        problems = [str(problem)]
    for candidate in _machine_candidates():
        try:
            _load_globally(candidate)
            return BlasReport(candidate, "loaded", "; ".join(problems))
        except _Unusable as problem:
            if os.path.isabs(candidate):  # a bare name that the loader does not find says nothing
                problems.append(str(problem))
    advice = "no OpenBLAS, BLIS or MKL on this machine: install a C compiler or libopenblas; products are ~15x slower"
    return stock("; ".join([*problems, advice]))


def _machine_candidates() -> Iterator[str]:
    yield from _MACHINE_NAMES  # wherever the loader finds them
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    folders = [f"{sys.prefix}/lib", f"{sys.base_prefix}/lib", f"/usr/lib/{multiarch}"]
    folders += [f"/usr/lib/{multiarch}/openblas-{threads}" for threads in ("pthread", "openmp", "serial")]
    for folder in [*folders, *_MACHINE_DIRECTORIES]:
        yield from (path for name in _MACHINE_NAMES if os.path.exists(path := os.path.join(folder, name)))


def _load_globally(name: str) -> None:
    """Load a whole BLAS with global symbols, after checking that its `cblas_sgemm` is the one MLX expects."""
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise _Unusable(f"cannot load {name} ({error})") from error
    if not all(hasattr(library, f"cblas_{kind}gemm") for kind in "sdc"):
        raise _Unusable(f"{name} exports no cblas_sgemm, cblas_dgemm and cblas_cgemm")
    if hasattr(library, "openblas_get_config"):
        library.openblas_get_config.restype = ctypes.c_char_p
        if b"USE64BITINT" in library.openblas_get_config():
            raise _Unusable(f"{name} is built for 64-bit integers, MLX passes 32-bit ones")
    _check_product(library, name)
    ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)  # the same library again: now its symbols are global


def _load_forwarder() -> str:
    """Compile (once), connect and load the forwarder. Returns the path of the library that does the work."""
    folder = Path(np.__file__).parent.parent / "numpy.libs"
    target = next(iter(sorted(folder.glob("libscipy_openblas64_*.so"))), None)
    if target is None:
        raise _Unusable("NumPy brings no OpenBLAS of its own")
    path = _compiled_forwarder()
    try:
        blas, forwarder = ctypes.CDLL(str(target)), ctypes.CDLL(str(path))
        functions = [ctypes.cast(blas[f"scipy_cblas_{kind}gemm64_"], ctypes.c_void_p) for kind in "sdc"]
        forwarder.mlx_training_set_gemm(*functions)
    except (OSError, AttributeError) as error:
        raise _Unusable(f"the forwarder {path} does not work ({error}); delete it to have it compiled again") from error
    _check_product(forwarder, str(path))
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return str(target)


def _compiled_forwarder() -> Path:
    """The forwarder in the user's cache, compiled when missing. Concurrent processes each rename a complete file."""
    key = hashlib.sha256(f"{platform.machine()} {_FORWARDER_SOURCE}".encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-training"
        path = cache / f"blas_forwarder_{key}.so"
        if path.exists():
            return path
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler is None:
            raise _Unusable("no C compiler (cc, gcc or clang) to build the forwarder to NumPy's OpenBLAS")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="build_") as build:
            source, library = Path(build, "forwarder.c"), Path(build, "forwarder.so")
            source.write_text(_FORWARDER_SOURCE)
            command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode:
                raise _Unusable(f"{compiler} cannot compile the forwarder: {done.stderr.strip()[-200:]}")
            library.replace(path)
        return path
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: Path.home() without a home
        raise _Unusable(f"cannot keep a forwarder ({error}); set XDG_CACHE_HOME to a writable folder") from error


def _check_product(library: ctypes.CDLL, name: str) -> None:
    """One product through `cblas_sgemm`, against NumPy.

    It has more columns than OpenBLAS computes at once (320 with AVX2), so that it writes all of the workspace. Until
    one does, smaller products take up to 3.7 times as long: pages that were never written are fetched ahead in vain.
    """
    m, n, k = 32, 384, 256
    a_MK, b_KN = (np.arange(size, dtype=np.float32) % 8 for size in (m * k, k * n))
    c_MN = np.zeros(m * n, np.float32)
    row_major, no_transpose = 101, 111
    pointer = [array.ctypes.data_as(ctypes.c_void_p) for array in (a_MK, b_KN, c_MN)]
    one, zero, integer = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_int
    library.cblas_sgemm.restype = None
    library.cblas_sgemm(
        *(integer(value) for value in (row_major, no_transpose, no_transpose, m, n, k)),
        *(one, pointer[0], integer(k), pointer[1], integer(n), zero, pointer[2], integer(n)),
    )
    if not np.array_equal(c_MN.reshape(m, n), a_MK.reshape(m, k) @ b_KN.reshape(k, n)):
        raise _Unusable(f"{name} computes a wrong product")
