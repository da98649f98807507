"""Training by two processes, as each backend's own launcher starts them."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.e2e.workbench import Workbench, metrics

PROGRAM = """
import os, signal, sys
from mlx_training import cli, trainer

def rates(config, step, total):
    if f"{os.environ.get('MLX_RANK', os.environ.get('RANK'))} {step}" == os.environ["WHO_AND_WHEN"]:
        signal.raise_signal(int(os.environ["SIGNAL"]))
    return learning_rates(config, step, total)

learning_rates, trainer.learning_rates = trainer.learning_rates, rates
if "MLX_RANK" in os.environ:
    from mlx_training.mlx_backend import group
    group.GRACE = 2
sys.exit(cli.main(sys.argv[1:]))
"""
# 16 rows in batches of 5: shares of 3 and 2, and of 1 and 0
UNEVEN = ("training.max_steps=6", "training.batch_size=5", "evaluation.every_steps=3", "checkpoint.keep=9")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(bench: Workbench, *overrides: object, moment: str = "", number: int = 0) -> tuple[int, str]:
    """Exit code and stderr of a training by two processes; `moment`: the rank and step that get a signal."""
    program = bench.folder / "program.py"
    program.write_text(PROGRAM)
    ring = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "-p", str(free_port()), "--", sys.executable]
    if bench.backend == "mlx" and not Path(ring[0]).exists():
        pytest.skip(f"no {ring[0]}")
    command = [*(TORCHRUN if bench.backend == "torch" else ring), program, "train", bench.config, *overrides]
    return run(command, WHO_AND_WHEN=moment, SIGNAL=str(int(number)))


def run(command: Sequence[object], **variables: str) -> tuple[int, str]:
    """Exit code and everything that a command said."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    return done.returncode, done.stdout + done.stderr


def free_port() -> int:
    """A port that is free, and very likely the next one too."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def expect_equal(found: Path, expected: Path) -> float:
    """The largest relative difference of two runs' losses, whose other records agree."""
    pairs = list(zip(metrics(found), metrics(expected), strict=True))
    assert [(a["step"], a.keys()) for a, _ in pairs] == [(b["step"], b.keys()) for _, b in pairs]
    names = ("loss", "grad_norm", "eval/loss")
    return max(abs(a[name] / b[name] - 1) for a, b in pairs for name in names if name in a)
