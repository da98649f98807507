"""Two processes take the steps of one: uneven shares of every batch, runs that go from one to two and back, and a
process that is killed, on each backend's own launcher."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_training import trainer
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import load_config
from mlx_training.errors import BackendError
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


def launch(bench: Workbench, *overrides: object, moment: str = "", number: int = 0) -> tuple[int, str]:
    """Exit code and stderr of a training by two processes; `moment`: the rank and step that get a signal."""
    program = bench.folder / "program.py"
    program.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ring = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "-p", str(free_port()), "--", sys.executable]
    if bench.backend == "mlx" and not Path(ring[0]).exists():
        pytest.skip(f"no {ring[0]}")
    command = [*(torchrun if bench.backend == "torch" else ring), program, "train", bench.config, *overrides]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    environment |= {"WHO_AND_WHEN": moment, "SIGNAL": str(int(number))}
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


def tokens(run: Path) -> int:
    return CheckpointStore(run).load("latest").state["progress"]["tokens"]


def test_one_process_then_two_then_one(tiny: Workbench) -> None:
    whole = tiny.train(*UNEVEN, "output_dir=whole")
    shutil.copytree("whole", tiny.run)
    from_two = tiny.run / "checkpoints/step_00000002"
    code, said = launch(tiny, *UNEVEN, "--resume", from_two, moment="1 5", number=signal.SIGKILL)
    assert "2 processes, resumed from step 2" in said, said
    assert code or tiny.backend == "mlx", said  # mlx.launch exits with 0, whatever happens
    assert not (tiny.run / "result.json").exists() and not (tiny.run / ".tmp-result.json").exists()
    assert CheckpointStore(tiny.run).load("latest").step == 4, said
    assert tiny.json("checkpoint", "verify", tiny.run)["ok"]
    result = tiny.train(*UNEVEN, "--resume", "auto")
    assert expect_equal(tiny.run, Path("whole")) <= 1e-5
    assert tokens(tiny.run) == tokens(Path("whole"))
    assert result["eval"] == whole["eval"]


@pytest.mark.proof
def test_twenty_steps(tiny: Workbench) -> None:
    """From step 0, with a stop that one process is asked for: both stop, saved, at the same step."""
    twenty = (*UNEVEN, "training.max_steps=20")
    tiny.train(*twenty, "output_dir=whole")
    _, said = launch(tiny, *twenty, moment="1 11", number=signal.SIGTERM)
    assert said.count("interrupted: saved at step 11") == 2, said
    code, said = launch(tiny, *twenty, "--resume", "auto")
    assert code == 0 and "2 processes, resumed from step 11" in said, said
    difference = expect_equal(tiny.run, Path("whole"))
    print(f"{tiny.backend}: largest relative difference of loss, gradient norm and eval/loss: {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.parametrize(("backend", "variable"), [("torch", "MLX_RANK"), ("mlx", "TORCHELASTIC_RUN_ID")])
def test_the_other_backends_launcher(
    bench: Workbench, both_backends: list[str], backend: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(BackendError, match=rf"starts processes of the \w+ backend; this run's is {backend}"):
        trainer.train(load_config(bench.config, [f"backend={backend}"]))
    assert bench.no_step_was_taken
