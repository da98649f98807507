"""State-space models through the command line: they learn, and the plan knows them before the data is there."""

import pytest

from mlx_training.json_lines import read_metrics
from tests.e2e.tiny import language_config
from tests.e2e.workbench import Workbench

NO_LOCAL = "num_heads: 4, window: 256"  # the defaults: a key that no mixer reads is refused
NO_STU = f"num_filters: 24, {NO_LOCAL}"


@pytest.mark.parametrize(
    "ssm",
    [
        f"mixers: [mamba, mamba2], {NO_STU}",
        f"mixers: [s4d], head_dim: 64, {NO_STU}",
        "mixers: [stu, local], head_dim: 64, state_size: 16",
    ],
)
def test_the_loss_falls(tiny: Workbench, ssm: str) -> None:
    """50 steps on the generated corpus, from a uniform guess to what follows what."""
    tiny.write(language_config(tiny.run, "ssm"))
    tiny.train(
        f"model.ssm={{{ssm}, num_layers: 2, hidden_size: 32}}",
        *("training.max_steps=50", "training.batch_size=8", "training.learning_rate=2e-2", "evaluation.every_steps=50"),
    )
    losses = [record["loss"] for record in read_metrics(tiny.run / "metrics.jsonl") if "loss" in record]
    assert losses[0] == pytest.approx(5.7, abs=0.3)
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]


def test_the_plan_needs_no_data(bench: Workbench) -> None:
    plan = bench.json("plan", "language/mamba", "model.ssm.context_length=64", "dataset.path=absent.txt")
    assert plan["parameters"]["trainable"] == 102_808_320
    assert plan["batch_shape"]["tokens"] == 64 and plan["steps"] == "unknown"
