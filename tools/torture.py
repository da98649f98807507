"""Kill, damage, fill up, confuse and exhaust training runs, and see that nothing is lost.

python tools/torture.py                                     every trial in its short form, some minutes
python tools/torture.py --kills 200                         this one only, at this size
python tools/torture.py --kills 200 --soak 20000 --write    ... and keep the results, in docs/torture/

Each trial is a module of tools/trials and says there what it does and what it demands. Exits with 1 on any failure.
"""

import argparse
import importlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.trials.report import Report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "torture"
# Trial -> its size in the short form, and what is counted.
TRIALS: dict[str, tuple[int, str]] = {
    "kills": (8, "kill -9 at random moments, in all"),
    "damage": (60, "injected damages, in all"),
    "disk": (22, "disks that are full or read-only, in all"),
    "relay": (5, "steps of each of four legs, MLX, torch, MLX, torch"),
    "locks": (6, "rounds of processes started together, and of readers"),
    "soak": (400, "steps of every family on every backend"),
    "fuzz": (300, "spoilt configurations, rows and checkpoints"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials that were asked for; 1 when anything failed."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # two threads under load: 100 times slower
    sys.path.insert(0, str(ROOT))  # so that `python tools/torture.py` finds its trials and this checkout
    from mlx_training.environment import installed_backends
    from tools.evidence import header

    args = arguments(argv)
    sizes = {name: getattr(args, name) for name in TRIALS if getattr(args, name) is not None}
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    backends = [args.backend] if args.backend else list(installed_backends())
    failed = False
    for name, size in (sizes or {name: size for name, (size, _) in TRIALS.items()}).items():
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"torture-{name}-") as folder:
            report = importlib.import_module(f"tools.trials.{name}").run(size, backends, seed, Path(folder))
        text = told(name, size, seed, report, time.monotonic() - started)
        print(text, flush=True)
        failed |= bool(report.failures)
        if args.write and not report.skipped:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.txt").write_text(header() + text + "\n")
    return int(failed)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """One flag for the size of every trial."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, (size, counted) in TRIALS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{counted} (short form: {size})")
    parser.add_argument("--seed", type=int, help="of everything random; default: another one every time")
    parser.add_argument("--backend", choices=("mlx", "torch"), help="default: every installed one")
    parser.add_argument("--write", action="store_true", help="keep the results in docs/torture/TRIAL.txt")
    return parser.parse_args(argv)


def told(name: str, size: int, seed: int, report: "Report", seconds: float) -> str:
    """A trial's report as text."""
    verdict = f"skipped: {report.skipped}" if report.skipped else f"{len(report.failures)} failures"
    lines = [f"{name} {size}, seed {seed}: {verdict} ({seconds:.0f} s)", *(f"  {line}" for line in report.lines)]
    return "\n".join([*lines, *(f"  FAILED: {failure}" for failure in report.failures)])


if __name__ == "__main__":
    sys.exit(main())
