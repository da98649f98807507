"""The shape of a configuration: one frozen pydantic model per section, and the checks between keys.

A `RunConfig` is plain data without any framework. Types are strict (the text "8" is not a number), unknown keys are
forbidden, and every key is read by the trainer, the data or the backend it names.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from mlx_training.config_checks import fill_defaults, find_conflicts
from mlx_training.config_dataset import Dataset
from mlx_training.config_model import ModelConfig
from mlx_training.config_performance import Performance
from mlx_training.config_samples import Samples
from mlx_training.config_section import Count, Names, Section, Seed, Text, as_tuple
from mlx_training.config_training import Training
from mlx_training.optim import SETTINGS as OPTIM
from mlx_training.optim import Optim
from mlx_training.schedule import SETTINGS as SCHEDULE
from mlx_training.schedule import Schedule

Split = Literal["train", "validation", "test"]
Factor = Annotated[float, Field(gt=1)]


class Experiment(Section):
    name: Text = "run"
    """Name of the run; the configuration file's own name unless given."""
    seed: Seed = 1337
    """Seed of initialisation, data order, dropout and generated data."""
    tags: Names = ()
    """Labels for the tracker."""
    notes: str = ""
    """Free text, kept with the run."""


class Evaluation(Section):
    every_steps: Count | None = 200
    """Evaluate after this many steps, and at the end; null: after every epoch, and at the end."""
    split: Split = "validation"
    """Rows for evaluation while training; checkpoints are chosen on it."""
    test_split: Split | None = "test"
    """Rows for the final report of the best checkpoint; null: those of evaluation.split."""
    metrics: Annotated[tuple[Literal["loss", "accuracy", "macro_f1"], ...], as_tuple] = ("loss", "accuracy")
    """What evaluation measures while training; a language model has [loss]."""
    max_new_tokens: Count = 16
    """Longest generated answer."""
    batch_size: Count | None = None
    """Rows per batch; null: training.batch_size."""
    max_rows: Count | None = None
    """Most rows per evaluation while training; null: all."""
    save_predictions: bool = True
    """Write every row's prediction of the final report to the run directory."""
    samples: Samples | None = None
    """{prompts: [TEXT, ...], ...}: texts that a language model writes while it is trained; null: none."""


class CheckpointConfig(Section):
    every_steps: Count | None = None
    """Save after this many steps, and at the end; null: whenever the run is evaluated."""
    keep: Count = 3
    """Latest checkpoints to keep, besides the best."""
    best: Literal["eval/loss", "eval/accuracy", "eval/macro_f1"] = "eval/loss"
    """Metric that chooses the best checkpoint; one of evaluation.metrics."""


class Logging(Section):
    every_steps: Count = 10
    """Write metrics after this many steps."""
    events: bool = False
    """Write events.jsonl too: hyperparameters_configured, ..., training_step, validation_step, as mainrun has them."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; the local metrics.jsonl is always written."""
    project: Text = "mlx-training"
    """Its project there."""


class Diagnostics(Section):
    probe_every_steps: Count | None = None
    """Write the norms of gradients, weights and updates to gradients.jsonl after this many steps; null: never."""
    max_skipped_steps: Count = 5
    """A step whose loss or gradient is not finite is skipped; after this many in a row the run stops (exit code 4)."""
    spike_factor: Factor | None = 4.0
    """A logged loss above this many times the median of the last 20 is marked as a spike; null: never."""
    unmoved_after_steps: Count | None = 50
    """Name the parameters that have not moved after this many steps; null: never."""


class RunConfig(Section):
    """Everything a run is made from."""

    experiment: Experiment = Experiment()
    output_dir: Text = "runs/run"
    """Run directory; runs/<experiment.name> unless given."""
    backend: Literal["auto", "mlx", "torch"] = "auto"
    """auto: MLX on Apple silicon, else torch on CUDA, else torch, else MLX, of those installed."""
    device: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """auto: the accelerator if there is one. gpu: Metal on MLX, CUDA or MPS on torch."""
    model: ModelConfig
    dataset: Dataset = Dataset()
    training: Training = Training()
    performance: Performance = Performance()
    evaluation: Evaluation = Evaluation()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: Logging = Logging()
    diagnostics: Diagnostics = Diagnostics()

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate of every group that trains."""
        rate = self.training.learning_rate
        return dict(rate) if isinstance(rate, dict) else dict.fromkeys(self.model.groups, rate)

    @property
    def optim(self) -> Optim:
        """The optimiser and its settings."""
        t = self.training
        settings = {key: getattr(t, key) for key in OPTIM[t.optimizer]}
        return Optim(t.optimizer, grad_clip_norm=t.grad_clip_norm, ema_decay=t.ema_decay, **settings)

    @property
    def schedule(self) -> Schedule:
        """Course of the learning rate."""
        t = self.training
        warmup = t.warmup_fraction if t.warmup_steps is None else t.warmup_steps
        return Schedule(t.schedule, warmup, **{k: getattr(t, k) for k in SCHEDULE[t.schedule]})

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        return fill_defaults(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _agree(self) -> "RunConfig":
        if conflicts := list(find_conflicts(self)):
            text = "; ".join(f"{c.keys[0]}: {c.message}" for c in conflicts)
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "conflicts": conflicts})
        return self
