"""The training section: defaults that depend on optimiser and schedule, and settings that contradict each other."""

from pathlib import Path

import pytest

from mlx_training.config import load_config, to_yaml
from mlx_training.errors import ConfigError
from mlx_training.optim import SETTINGS as OPTIM
from mlx_training.optim import Optim
from mlx_training.schedule import SETTINGS as SCHEDULE
from mlx_training.schedule import Schedule

BASE = "model: {family: decoder, tokenizer: {train: 300}}\ndataset: {format: corpus}\ntraining: {max_steps: 10}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize("name", OPTIM)
def test_every_optimiser_has_its_own_defaults(name: str, config: Path, tmp_path: Path) -> None:
    loaded = load_config(config, [f"training.optimizer={name}"])
    assert loaded.optim == Optim(**{"name": name, "grad_clip_norm": 1.0} | OPTIM[name])
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(loaded))
    assert load_config(saved) == loaded


def test_given_settings_win(config: Path) -> None:
    given = ["training.optimizer=muon", "training.momentum=0.5", "training.nesterov=false", "training.betas=[0.8, 0.9]"]
    optim = load_config(config, [*given, "training.weight_decay=0.3", "training.muon_lr_factor=10"]).optim
    assert optim == Optim("muon", (0.8, 0.9), 1e-8, 0.3, 1.0, momentum=0.5, nesterov=False, muon_lr_factor=10)


@pytest.mark.parametrize("kind", SCHEDULE)
def test_every_schedule_has_its_own_defaults(kind: str, config: Path) -> None:
    assert load_config(config, [f"training.schedule={kind}"]).schedule == Schedule(kind, 0.03, **SCHEDULE[kind])
    assert load_config(config, [f"training.schedule={kind}", "training.warmup_steps=4"]).schedule.warmup == 4


CONFLICTS = [
    (["optimizer=sgd", "eps=1e-6"], "training.eps", "sgd does not read it"),
    (["optimizer=sgd", "betas=[0.9, 0.99]"], "training.betas", "it reads momentum, nesterov, weight_decay"),
    (["momentum=0.9"], "training.momentum", "adamw does not read it; it reads betas, eps, weight_decay"),
    (["optimizer=lion", "nesterov=true"], "training.nesterov", "lion does not read it"),
    (["optimizer=adagrad", "alpha=0.9"], "training.alpha", "adagrad does not read it"),
    (["optimizer=adam", "muon_lr_factor=2"], "training.muon_lr_factor", "adam does not read it"),
    (["optimizer=sgd", "nesterov=true"], "training.nesterov", "given true without momentum"),
    (["optimizer=adadelta"], "training.optimizer", "adamw"),
    (["schedule=constant", "min_lr_fraction=0.1"], "training.min_lr_fraction", "constant does not read it"),
    (["gamma=0.5"], "training.gamma", "cosine does not read it; it reads min_lr_fraction"),
    (["schedule=step", "milestones=[0.5, 0.4]"], "training.milestones", "they must rise"),
    (["schedule=wsd", "decay_fraction=0.6", "warmup_fraction=0.5"], "training.decay_fraction", "make more than 1"),
    (["warmup_steps=3", "warmup_fraction=0.5"], "training.warmup_steps", "both say how long"),
    (["warmup_steps=11"], "training.warmup_steps", "the run has only 10 steps"),
]


@pytest.mark.parametrize(("overrides", "key", "message"), CONFLICTS, ids=lambda value: str(value))
def test_conflicts(overrides: list[str], key: str, message: str, config: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(config, [f"training.{override}" for override in overrides])
    assert key in str(raised.value) and message in str(raised.value)


def test_gradient_checkpointing_is_for_layers_of_transformers(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE)
    assert load_config(path, ["training.gradient_checkpointing=true"]).training.gradient_checkpointing
    path.write_text("model: {family: timeseries}\ndataset: {format: questions}\ntraining: {max_steps: 10}\n")
    assert load_config(path, ["training.gradient_checkpointing=true"]).training.gradient_checkpointing
    path.write_text("model: {family: recurrent}\ndataset: {format: corpus}\ntraining: {max_steps: 10}\n")
    with pytest.raises(ConfigError, match="it is for decoder, pretrained, timeseries"):
        load_config(path, ["training.gradient_checkpointing=true"])
