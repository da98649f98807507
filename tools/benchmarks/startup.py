"""From the start of the command to the first step that was taken."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tools.benchmarks.listing import Listing
from tools.benchmarks.measure import PeerError

if TYPE_CHECKING:
    from tools.benchmarks.tables import Bench

TARGET = 5.0  # seconds of wall time, files cached
FIRST_STEP = re.compile(r"step +1/")
CODE = "import sys; from mlx_training.cli import main; sys.exit(main())"  # what the installed command does


def startup(bench: "Bench") -> list[Listing]:
    """`mlx-training train quick_test`, from nothing to its first optimiser step, files cached; medians."""
    found = []
    for backend in bench.backends:
        first_step(backend)  # fills the file cache
        samples = [first_step(backend) for _ in range(min(bench.repetitions, 5))]
        wall, cpu = (median(sample[i] for sample in samples) for i in (0, 1))
        said = [f"{backend:5} {wall:5.2f} s, of which {cpu:5.2f} s of CPU  (aim <= {TARGET:.0f} s)"]
        found.append(Listing("first step of quick_test", said, {"backend": backend, "wall": wall, "cpu": cpu}))
        print("\n".join(found[-1].lines()), flush=True)
    return found


def first_step(backend: str) -> tuple[float, float]:
    """Seconds, and seconds of CPU, until the command logs its first step, where it is killed. Raises PeerError."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        words = ["train", "quick_test", "--backend", backend, f"output_dir={Path(folder) / 'run'}"]
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", CODE, *words], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if FIRST_STEP.search(line):
                break
        seconds = time.perf_counter() - started
        process.kill()
        _, process.returncode, usage = os.wait4(process.pid, 0)
        process.stderr.close()
    if not (said and FIRST_STEP.search(said[-1])):
        raise PeerError(f"mlx-training {' '.join(words)} took no step:\n{''.join(said)}")
    return seconds, usage.ru_utime + usage.ru_stime
