"""The shape of a configuration: one frozen pydantic model per section, and the checks between keys.

A `RunConfig` is plain data without any framework. Types are strict (the text "8" is not a number), unknown keys are
forbidden, and every key is read by the trainer, the data or the backend it names.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mlx_training.config_checks import fill_defaults, find_conflicts
from mlx_training.config_model import ModelConfig
from mlx_training.config_samples import Samples
from mlx_training.config_section import Beta, Count, Fraction, Positive, Rate, Section, Seed, Text, as_tuple, either

Split = Literal["train", "validation", "test"]
Names = Annotated[tuple[str, ...], as_tuple]
Groups = Annotated[tuple[str | int, ...], as_tuple]
Share = Annotated[float, Field(gt=0, lt=1)]
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


class SplitFiles(Section):
    """One file per split, beside dataset.path (or in it, where it is a folder)."""

    train: str
    validation: str | None = None
    test: str | None = None


class SplitGroups(Section):
    """Whole groups (subjects, recordings) by name. Without `train`, every group that is not named trains."""

    train: Groups | None = None
    validation: Groups | None = None
    test: Groups | None = None


class SplitFractions(Section):
    """Shares of the rows; what is left of 1 trains."""

    validation: Share | None = None
    test: Share | None = None


class Splits(Section):
    """How rows are divided: by file, then by group, then by fraction; each split is named once."""

    file: SplitFiles | None = None
    """{train: FILE, validation: FILE, test: FILE}."""
    group: SplitGroups | None = None
    """{validation: [names], test: [names]}: no group is in two splits."""
    fraction: SplitFractions | None = None
    """{validation: 0.1, test: 0.1} of what files and groups leave, drawn by `seed` (text: cut in order)."""
    by_group: bool = False
    """Draw fractions of the groups instead of the rows."""
    seed: Seed = 0
    """Which rows a fraction draws; apart from experiment.seed, so that runs with other seeds share their test."""


class DatasetOptions(Section):
    """What an importer cannot know from the file: names of arrays and columns, and the words of the prompt."""

    question: str | None = None
    """ts, npz, csv: text before the series."""
    post_prompt: str | None = None
    """ts, npz, csv: text after the series; "{options}" in it becomes the list of answers."""
    channel_names: Names | None = None
    """ts, npz, csv: one text per channel, before its series."""
    label_names: dict[str, str] | None = None
    """ts, npz, csv: class label -> answer text."""
    x: str | None = None
    """npz: array of windows, (n, T) or (n, T, C); null: X."""
    y: str | None = None
    """npz: array of labels; null: y."""
    labels: str | None = None
    """npz: array of label names that y indexes; null: labels, where present."""
    group: str | None = None
    """npz: array of groups for splits; null: subject, where present."""
    series_columns: Names | None = None
    """csv: columns that each hold a series as a list; null: [series]."""
    value_columns: Names | None = None
    """csv: [first, last] of a range of columns with one number each, instead of series_columns."""
    answer_column: str | None = None
    """csv: null: label."""
    question_column: str | None = None
    """csv: column of the text before the series."""
    id_column: str | None = None
    """csv: column that names the row."""
    group_column: str | None = None
    """csv: column of groups for splits."""
    type_column: str | None = None
    """csv: column of question types; chance and accuracy are reported per type."""
    answer_with: Literal["text", "letter"] | None = None
    """timeseriesexam: the option's text (null), or its letter."""
    captions: str | None = None
    """m4: file of the captions."""
    records: str | None = None
    """ecg_qa_cot: folder of the PTB-XL records."""
    template_answers: str | None = None
    """ecg_qa_cot: table of the answers that each question template allows."""
    text_column: str | None = None
    """text: field of a .jsonl file; null: text."""
    separator: str | None = None
    """text: what stands between documents in a text file; null: a file is one document."""


class Dataset(Section):
    path: str | None = None
    """File or directory; null for generated formats."""
    format: Literal[
        "auto", "jsonl", "parquet", "tsqa", "timeseriesexam", "m4", "har_cot", "sleep_cot", "ecg_qa_cot", "ts", "npz",
        "csv", "questions", "corpus", "text",
    ] = "auto"  # fmt: skip
    """How the file is read; auto goes by its suffix. questions and corpus are generated."""
    splits: Splits | None = None
    """How rows are divided; null: {fraction: {validation: 0.1, test: 0.1}}. Generated data has its own splits."""
    num_samples_train: Count | None = None
    """Rows (documents) to generate, or the most to use of a file; null: 100000 generated, or the whole file."""
    num_samples_validation: Count | None = None
    """The same for validation; null: 500 generated, or the whole split."""
    num_samples_test: Count | None = None
    """The same for the test; null: 1000 generated, or the whole split."""
    normalize: Literal["zscore", "none"] = "zscore"
    """Each series to mean 0 and standard deviation 1, or left as it is."""
    stats_in_text: bool = True
    """Say each series' mean and standard deviation in its text."""
    max_length: Count | None = None
    """Most tokens a row may have, patches and answer included; null: what the LM allows."""
    options: DatasetOptions = DatasetOptions()


class Training(Section):
    max_steps: Count | None = None
    """Optimiser steps; exactly one of max_steps and num_epochs."""
    num_epochs: Count | None = None
    """Passes over the training rows."""
    batch_size: Count = 8
    """Rows per micro-batch."""
    grad_accumulation_steps: Count = 1
    """Micro-batches per optimiser step."""
    optimizer: Literal["adamw"] = "adamw"
    """AdamW with bias correction; its state is float32."""
    betas: Annotated[tuple[Beta, Beta], as_tuple] = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    learning_rate: Annotated[
        Annotated[Rate, Tag("<number>")] | Annotated[dict[str, Rate], Tag("<groups>")],
        either("<groups>", "<number>"),
    ] = 1e-3
    """Peak rate: one number, or one per group (timeseries: encoder, projector, lm_head; others: model)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the rate after warm-up."""
    warmup_fraction: Fraction = 0.03
    """Share of all steps in which the rate rises to its peak."""
    min_lr_fraction: Fraction = 0.0
    """Where the schedule ends, as a share of the peak."""
    weight_decay: Rate = 0.01
    """AdamW's decoupled decay (matrices only, by the parameter table)."""
    grad_clip_norm: Positive | None = 1.0
    """Global gradient norm is clipped to this; null: not clipped."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Activations of the language model; trained weights, losses, norms and optimiser state are always float32."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations in a row without a better checkpoint.best; null: never."""
    early_stopping_min_delta: Rate = 0.0
    """The least improvement that counts as better."""
    init_from: str | None = None
    """A run (or checkpoint) whose weights this run starts from: strict names and shapes, a fresh optimiser."""


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
    evaluation: Evaluation = Evaluation()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: Logging = Logging()
    diagnostics: Diagnostics = Diagnostics()

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate of every group that trains."""
        rate = self.training.learning_rate
        return dict(rate) if isinstance(rate, dict) else dict.fromkeys(self.model.groups, rate)

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
