"""The `training` section of a configuration."""

from typing import Annotated, Literal

from pydantic import Field, Tag

from mlx_training.config_section import Beta, Count, Fraction, Positive, Rate, Section, Share, as_tuple, either
from mlx_training.optim import Name
from mlx_training.schedule import Kind


class Training(Section):
    max_steps: Count | None = None
    """Optimiser steps; exactly one of max_steps and num_epochs."""
    num_epochs: Count | None = None
    """Passes over the training rows."""
    batch_size: Count = 8
    """Rows per micro-batch."""
    batch_by: Literal["rows", "tokens"] = "rows"
    """tokens: rows of one length make batches of about equal tokens; batch_size is then the mean number of rows."""
    grad_accumulation_steps: Count = 1
    """Micro-batches per optimiser step."""
    objective: Literal["causal", "fill_in_the_middle", "masked"] = "causal"
    """Predict the next token, also in documents turned around (fill_in_the_middle); masked: tell hidden tokens."""
    fim_rate: Fraction = 0.5
    """fill_in_the_middle: share of the documents that are turned around, drawn anew each epoch."""
    fim_spm_rate: Fraction = 0.5
    """fill_in_the_middle: share of those with the suffix first (SPM), not the prefix (PSM)."""
    mask_rate: Share = 0.15
    """masked: share of a row's tokens that are hidden and told, chosen anew each epoch."""
    optimizer: Name = "adamw"
    """Its state is float32. muon: hidden matrices; all else is AdamW's. docs/optimizers.md has the definitions."""
    betas: Annotated[tuple[Beta, Beta], as_tuple] | None = None
    """Decay of the two means; null: [0.9, 0.999], lion [0.9, 0.99]. sgd, adagrad, rmsprop, adafactor have none."""
    eps: Positive | None = None
    """Keeps a division finite; null: 1e-8, adafactor 1e-30. sgd and lion have none."""
    momentum: Beta | None = None
    """sgd, rmsprop, muon; null: 0, muon 0.95."""
    nesterov: bool | None = None
    """sgd, muon: Nesterov's form of momentum; null: false, muon true."""
    alpha: Beta | None = None
    """rmsprop: decay of the mean square; null: 0.99."""
    muon_lr_factor: Positive | None = None
    """muon: hidden matrices learn at this many times the learning rate of their group; null: 1."""
    learning_rate: Annotated[
        Annotated[Rate, Tag("<number>")] | Annotated[dict[str, Rate], Tag("<groups>")],
        either("<groups>", "<number>"),
    ] = 1e-3
    """Peak rate: one number, or one per group (encoder, projector, lm_head, lora; models from scratch: model)."""
    schedule: Kind = "cosine"
    """Course of the rate after warm-up; wsd: stable, then a decay."""
    warmup_fraction: Fraction = 0.03
    """Share of all steps in which the rate rises to its peak."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """The same as a number of steps, instead of warmup_fraction."""
    min_lr_fraction: Fraction = 0.0
    """cosine, linear, wsd: where the schedule ends, as a share of the peak."""
    milestones: Annotated[tuple[Share, ...], as_tuple] | None = None
    """step: shares of all steps after which the rate is multiplied by gamma; null: [0.5, 0.75]."""
    gamma: Positive | None = None
    """step: factor at a milestone; null: 0.1."""
    decay_fraction: Share | None = None
    """wsd: share of all steps, at the end, in which the rate falls; null: 0.2."""
    decay_shape: Literal["linear", "sqrt"] | None = None
    """wsd: falls in a line (null), or as 1 - sqrt."""
    weight_decay: Rate | None = None
    """Decay of matrices, by the parameter table; how: docs/optimizers.md. null: 0.01 with adamw, lion, muon."""
    grad_clip_norm: Positive | None = 1.0
    """Global gradient norm is clipped to this; null: not clipped."""
    ema_decay: Share | None = None
    """The weights' mean over about 1 / (1 - ema_decay) steps is what is evaluated, saved, exported; null: no mean."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Activations of the language model; trained weights, losses, norms and optimiser state are always float32."""
    gradient_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them: less memory, more time."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations in a row without a better checkpoint.best; null: never."""
    early_stopping_min_delta: Rate = 0.0
    """The least improvement that counts as better."""
    init_from: str | None = None
    """A run, checkpoint, adapter or Hugging Face directory with this run's first weights: strict, a fresh optimiser."""
