"""Ways of ending and of going on that are easily got wrong: a reader that leaves, a closed terminal, a lost file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mlx_training.checkpoint import CheckpointStore
from tests.e2e.workbench import Workbench, contents

COMMAND = (sys.executable, "-m", "mlx_training.cli", "train")


def start(bench: Workbench, *overrides: str, **streams: int) -> subprocess.Popen[str]:
    """The program, with its own streams."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, str(bench.config), *overrides], text=True, env=environment, **streams)


def test_a_reader_that_leaves_does_not_make_a_run_look_finished(bench: Workbench) -> None:
    with start(bench, "training.max_steps=4000", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as program:
        assert program.stderr is not None
        program.stderr.readline()
        program.stderr.close()
        assert program.wait(60) == 141
    assert not (bench.run / "result.json").exists()


def test_a_closed_terminal_is_a_signal_to_stop(bench: Workbench) -> None:
    with start(bench, "training.max_steps=100000", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as program:
        assert program.stderr is not None
        while " loss " not in program.stderr.readline():
            time.sleep(0.001)
        program.send_signal(signal.SIGHUP)
        _, said = program.communicate(timeout=60)
    assert program.returncode == 129 and "continue with --resume auto" in said
    saved = CheckpointStore(bench.run).load().step
    assert f"saved at step {saved}" in said


def test_another_optimiser_cannot_go_on(tiny: Workbench) -> None:
    tiny.train()
    before = contents(tiny.run)
    for flags in ((), ("--allow-change", "training.optimizer")):
        message = tiny.refused(
            2, "train", tiny.config, "--resume", "auto", "training.max_steps=6", "training.optimizer=lion", *flags
        )
        assert "training.optimizer: adamw -> lion" in message and "training.init_from=" in message
    assert contents(tiny.run) == before


def test_a_lost_configuration_is_said_to_be_lost(tiny: Workbench) -> None:
    tiny.train()
    (tiny.run / "config.yaml").unlink()
    code, _, err = tiny.main("train", tiny.config, "--resume", "auto", "training.max_steps=6")
    assert code == 0 and "config.yaml is gone: nothing tells what has changed since" in err
