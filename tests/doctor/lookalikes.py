"""Unusual and healthy: what a doctor must not call a fault."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.diagnostics.subject import Subject
from mlx_training.init import initialise
from mlx_training.objectives.lm import lm
from mlx_training.spec import Param, TimeSeriesSpec
from tests.doctor.faults.base import (
    LOOKALIKES,
    change_parameters,
    framework,
    freeze,
    is_torch,
    lookalike,
    override,
    rebuilt,
    rows_of,
    train_rows,
    with_encoder,
    with_rows,
)
from tests.e2e.tiny import save_tiny_llama

__all__ = ["LOOKALIKES"]


@dataclass(frozen=True)
class ZeroLast(TimeSeriesSpec):
    """A projector whose last layer starts at zero."""

    def params(self) -> dict[str, Param]:
        table = super().params()
        zero = {name: table[name]._replace(init="zeros", scale=0.0) for name in table if "projector.linear" in name}
        return table | zero


@dataclass(frozen=True)
class FrozenInputNorm(TimeSeriesSpec):
    """An encoder whose first norm keeps its initial values."""

    def params(self) -> dict[str, Param]:
        return {name: param for name, param in super().params().items() if "input_norm" not in name}


def with_spec(subject: Subject, kind: type[TimeSeriesSpec]) -> None:
    """The same sizes with another parameter table."""
    subject.spec = subject.model.spec = kind(**vars(subject.spec))


@lookalike
def zero_last_projector_layer(subject: Subject) -> Subject:
    """The last projector layer starts at zero, as the table says: the encoder has no gradient at step 0 only."""
    subject = rebuilt(subject, {"model.projector.norm_output": False})
    with_spec(subject, ZeroLast)
    arrays = subject.backend.export(subject.model) | initialise(subject.spec, subject.seed)
    subject.backend.load(subject.model, arrays)
    return subject


@lookalike
def attention_key_bias(subject: Subject) -> None:
    """After some training the key bias holds numbers; its gradient is zero by nature."""
    change_parameters(subject, lambda bias: bias + 0.1 * np.cos(np.arange(bias.size)), "in_proj_bias")
    subject.fresh = False


@lookalike
def slice_assigned_soft_prompt(subject: Subject) -> None:
    """The soft prompt is written into slices of the embeddings; gradients pass through slice assignment."""

    def inputs(original: Any, batch: Any) -> Any:
        placed = original(batch)
        x = subject.model.lm.embed(batch.tokens)
        x = x.clone() if is_torch(x) else x + 0
        for start in range(0, x.shape[1], 16):
            x[:, start : start + 16] = placed[:, start : start + 16]
        return x

    override(subject.model, inputs, "inputs")


@lookalike
def tiny_gradient_norm(subject: Subject) -> None:
    """The loss is given a weight of 1e-4: the norm prints as 0.00, and AdamW does not care."""
    subject.objective = lambda model, batch: {**lm(model, batch), "loss": 1e-4 * lm(model, batch)["loss"]}


@lookalike
def constant_second_channel(subject: Subject) -> None:
    """The second sensor of some rows stands still, which is what it measured."""
    rows = [
        replace(row, series=(*row.series[:1], *(np.full_like(v, 3.0) for v in row.series[1:]))) if i % 5 == 0 else row
        for i, row in enumerate(train_rows(subject))
    ]
    with_rows(subject, train=rows)


@lookalike
def unbalanced_answers(subject: Subject) -> None:
    """One answer has 70 % of the rows, as in many a real data set."""
    rows = train_rows(subject)
    most = [row for row in rows if row.answer == rows[0].answer]
    rest = [row for row in rows if row.answer != rows[0].answer]
    with_rows(subject, train=[*most, *rest[: max(1, round(len(most) * 3 / 7))]])


@lookalike
def same_series_other_question(subject: Subject) -> None:
    """One series serves two questions with different answers."""
    rows = train_rows(subject)
    more = [
        replace(row, pre_prompt="How many series?", answer=("one", "two")[len(row.series) - 1], options=("one", "two"))
        for row in rows[:12]
    ]
    with_rows(subject, train=[*rows, *(replace(row, id=f"n{row.id}", type="count") for row in more)])


@lookalike
def same_words_other_series(subject: Subject) -> None:
    """All prompts read the same; the series differ."""
    rows = [replace(row, pre_prompt="Which way?", type="short") for row in train_rows(subject)]
    with_rows(subject, train=rows)


@lookalike
def begin_token_is_end_token(subject: Subject) -> None:
    """Some tokenizers (GPT-2's) have one token for both."""
    tokenizer = copy.copy(subject.data.tokenizer)  # type: ignore[union-attr]
    tokenizer.bos_id = tokenizer.eos_id
    with_encoder(subject, tokenizer)


@lookalike
def empty_pre_prompt(subject: Subject) -> None:
    """Some rows begin with their series."""
    with_rows(
        subject, train=[replace(r, pre_prompt="") if i % 6 == 0 else r for i, r in enumerate(train_rows(subject))]
    )


@lookalike
def very_long_warm_up(subject: Subject) -> None:
    """The first learning rates are tiny and not zero."""
    rates = subject.rates
    subject.rates = lambda step: {group: 1e-2 * min(1.0, step / 5000) for group in rates(step)}
    subject.total_steps = 20000


@lookalike
def one_group_much_slower(subject: Subject) -> None:
    """The encoder was pretrained and is fine-tuned at a rate of 1e-6."""
    rates = subject.rates
    subject.rates = lambda step: {**rates(step), "encoder": 1e-6}


@lookalike
def no_clipping(subject: Subject) -> Subject:
    """No clipping is configured."""
    return rebuilt(subject, {"training.grad_clip_norm": None})


@lookalike
def no_weight_decay(subject: Subject) -> Subject:
    """No weight decay is configured."""
    return rebuilt(subject, {"training.weight_decay": 0.0})


@lookalike
def no_accumulation(subject: Subject) -> Subject:
    """One micro-batch a step."""
    return rebuilt(subject, {"training.grad_accumulation_steps": 1})


@lookalike
def one_row_a_batch(subject: Subject) -> Subject:
    """Batches of one row."""
    return rebuilt(subject, {"training.batch_size": 1})


@lookalike
def no_dropout(subject: Subject) -> Subject:
    """No dropout: training and evaluation are the same function."""
    return rebuilt(subject, {"model.encoder.dropout": 0.0})


@lookalike
def no_numeric_scale(subject: Subject) -> Subject:
    """The scale of a series does not enter as numbers."""
    return rebuilt(subject, {"model.encoder.numeric_scale": False})


@lookalike
def augmented_series(subject: Subject) -> Subject:
    """Training rows are scaled and disturbed, so that they show and state other series than the file's."""
    return rebuilt(subject, {"dataset.augment": {"scale": 0.3, "jitter": 0.2}, "dataset.stats_in_text": True})


@lookalike
def raw_series_on_purpose(subject: Subject) -> Subject:
    """dataset.normalize is none, and the rows are of moderate size."""
    subject = rebuilt(subject, {"dataset.normalize": "none"})
    scaled = {
        split: [
            replace(row, series=tuple(((v - v.mean()) / v.std()).astype(np.float32) for v in row.series))
            for row in rows_of(subject, split)
        ]
        for split in ("train", "validation", "test")
    }
    with_rows(subject, **scaled)
    return subject


@lookalike
def training_mode_beforehand(subject: Subject) -> None:
    """The model is handed over in training mode."""
    subject.model.train()


@lookalike
def frozen_on_purpose(subject: Subject) -> None:
    """The table leaves the encoder's first norm out, and the model keeps it frozen."""
    with_spec(subject, FrozenInputNorm)
    freeze(subject.model.encoder.input_norm)


@lookalike
def one_type_has_one_answer(subject: Subject) -> None:
    """Of two question types one has a single answer in the training rows."""
    rows = train_rows(subject)
    with_rows(subject, train=[r for r in rows if r.type == rows[0].type or r.answer == rows[0].answer])


@lookalike
def large_vocabulary(subject: Subject) -> Subject:
    """The first loss is large because ln V is: the vocabulary has 8,192 tokens, of which the tokenizer uses few."""
    assert subject.config is not None
    folder = Path(str(subject.config.dataset.path)).parent / "large-4bit"
    return rebuilt(subject, {"model.llm_id": str(save_tiny_llama(folder, vocab_size=8192))})


@lookalike(case="trained")
def first_loss_far_below_guessing(subject: Subject) -> None:
    """It starts from a checkpoint that has learnt already, with a fresh optimiser."""


@lookalike(case="decoder")
def untied_head(subject: Subject) -> Subject:
    """The head is a matrix of its own."""
    return rebuilt(subject, {"model.decoder.tie_word_embeddings": False})


@lookalike(case="decoder")
def learnt_by_heart(subject: Subject) -> None:
    """A language model that has learnt one batch by heart: it overfits, and nothing about it is broken."""
    step, rates = subject.new_step(), dict.fromkeys(subject.spec.groups, 3e-2)
    for number in range(1, 31):
        step([subject.batch(0)], step=number, lr=rates)
    subject.fresh, subject.trained = False, True


@lookalike(case="sparse")
def unequal_experts(subject: Subject) -> None:
    """One expert is chosen for nearly every token; the others have their chance."""
    router = subject.model.model.layers[0].mlp.router
    override(router, lambda original, x: original(x) + 3.0 * (framework(x).arange(3) == 2))
