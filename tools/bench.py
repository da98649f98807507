"""Milliseconds an optimiser step of a shipped configuration takes on each installed backend.

    python tools/bench.py [--config quick_test] [--steps 100] [key=value ...]

Each backend trains twice in a fresh process, a short and a long run that are otherwise alike: the difference of their
times holds neither start-up, compilation, evaluation nor saving. For MLX on Linux also the float32 product behind it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from mlx_training.environment import installed_backends

PRODUCT = """
import time
from mlx_training.blas import load_fast_blas
report = load_fast_blas()
import mlx.core as mx
a = mx.random.normal((1024, 1024))
mx.eval(a, a @ a)
times = []
for _ in range(5):
    start = time.perf_counter()
    mx.eval(a @ a)
    times.append(time.perf_counter() - start)
print(f"{min(times) * 1e3:.1f} ms  {report}")
"""


def seconds(backend: str, config: str, steps: int, overrides: Sequence[str]) -> float:
    """Seconds that `train` reports for a run of so many steps."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        command = [sys.executable, "-m", "mlx_training.cli", "train", config, "--backend", backend, "--json"]
        command += [f"output_dir={folder}/run", f"training.max_steps={steps}", f"evaluation.every_steps={steps}"]
        command += ["evaluation.max_rows=8", "evaluation.test_split=null", "training.schedule=constant", *overrides]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr[-3000:]}\n{backend}: exit code {done.returncode}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quick_test")
    parser.add_argument("--steps", type=int, default=100, help="steps that are timed, after 20 that are not")
    parser.add_argument("overrides", nargs="*", help="key=value, as for train")
    given = parser.parse_args()
    for backend, version in installed_backends().items():
        if backend == "mlx" and sys.platform == "linux":
            for choice in ("off", ""):
                environment = {**os.environ, "MLX_TRAINING_BLAS": choice}
                done = subprocess.run([sys.executable, "-c", PRODUCT], env=environment, capture_output=True, text=True)
                print(
                    f"mlx: 1024 x 1024 x 1024 float32 product {done.stdout.strip() or done.stderr.strip()}", flush=True
                )
        short = seconds(backend, given.config, 20, given.overrides)
        long = seconds(backend, given.config, 20 + given.steps, given.overrides)
        print(f"{backend} {version}: {given.config} {(long - short) / given.steps * 1e3:.1f} ms a step", flush=True)


if __name__ == "__main__":
    main()
