"""A run that is killed, or asked to stop, at any moment and resumed is the uninterrupted run, bit for bit.

Same backend, one thread on a CPU, in the middle of an epoch, with accumulation, dropout (where the model has it) and
augmented series: parameters, optimiser, logged losses, predictions. What is interrupted is the program, in processes of
its own.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.workbench import Workbench, metrics

STEPS, PARTS = 30, ("model.safetensors", "optimizer.safetensors")
RUN = (
    *(f"training.max_steps={STEPS}", "training.grad_accumulation_steps=2", "training.batch_size=3"),
    *("evaluation.every_steps=9", "checkpoint.every_steps=3", "checkpoint.keep=2"),
)
RANDOM = {
    "timeseries": (
        *("model.encoder.dropout=0.1", "model.projector.dropout=0.1"),
        "dataset.augment={scale: 0.2, jitter: 0.1}",
    ),
    "recurrent": ("model.recurrent.dropout=0.1",),
    "ssm": ("model.ssm.dropout=0.1",),
}


SIGNALS = {
    "timeseries": (signal.SIGKILL, signal.SIGTERM),
    "decoder": (signal.SIGKILL,),
    "recurrent": (signal.SIGTERM,),
    "ssm": (signal.SIGKILL,),
}


@pytest.mark.parametrize("family", SIGNALS)
def test_interrupted_at_random_moments(tiny: Workbench, family: str) -> None:
    if family != "timeseries":
        tiny.use_language(family)
    overrides = RUN + RANDOM.get(family, ())
    tiny.train(*overrides, "output_dir=whole")
    seed = random.SystemRandom().randrange(10**6)
    moments = random.Random(seed)
    said = [interrupt(tiny, overrides, number, moments) for number in SIGNALS[family]]
    tiny.train(*overrides, "--resume", "auto")
    logged = metrics(tiny.run)
    assert [record["step"] for record in logged if "loss" in record] == list(range(1, STEPS + 1)), (seed, said)
    assert [record["step"] for record in logged if "eval/loss" in record] == [9, 18, 27, STEPS], (seed, said)
    expected, found = artefacts(Path("whole")), artefacts(tiny.run)
    assert {name for name in expected if found[name] != expected[name]} == set(), (seed, said)


def interrupt(bench: Workbench, overrides: tuple[str, ...], number: signal.Signals, moments: random.Random) -> str:
    """Start or continue the run, send a signal some steps later, and return what the program said."""
    log = bench.run / "metrics.jsonl"
    before = last_step(log)
    until = before + moments.randint(2, 10)
    command = [sys.executable, "-m", "mlx_training.cli", "train", str(bench.config), *overrides, "--resume", "auto"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    started = time.time()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as it:
        deadline = time.monotonic() + 60
        while it.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.stat().st_mtime > started and last_step(log) >= until:
                break
            time.sleep(0.001)
        time.sleep(moments.random() * 0.02)
        it.send_signal(number)
        said, _ = it.communicate(timeout=60)
    assert it.returncode == (-9 if number == signal.SIGKILL else 143), said
    return said


def last_step(log: Path) -> int:
    """The last optimiser step in a log that is being written."""
    lines = log.read_text().splitlines() if log.exists() else []
    return sum('"loss"' in line for line in lines)


def artefacts(run: Path) -> dict[str, object]:
    """Everything that must not depend on how often a run was interrupted."""
    best = (run / "checkpoints/best").read_text().strip()
    names = [f"checkpoints/{step}/{part}" for step in (best, f"step_{STEPS:08d}") for part in PARTS]
    names += [path.name for path in run.glob("predictions_*")]
    return {"metrics": metrics(run), "best": best, **{name: (run / name).read_bytes() for name in names}}
