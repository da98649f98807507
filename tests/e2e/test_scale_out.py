"""Two processes take the steps of one: uneven shares of every batch, runs that go from one to two and back, and a
process that is killed, on each backend's own launcher."""

import shutil
import signal
from pathlib import Path

import pytest

from mlx_training import trainer
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import load_config
from mlx_training.errors import BackendError
from tests.e2e.processes import UNEVEN, expect_equal, launch
from tests.e2e.workbench import Workbench


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
