"""The `evaluation.samples` section: texts that a language model writes while it is trained."""

from typing import Annotated

from pydantic import Field

from mlx_training.config_section import Count, Fraction, Positive, Rate, Section, Text, as_tuple


class Samples(Section):
    """Prompts, how they are continued, and when; the texts are kept in samples.jsonl."""

    prompts: Annotated[tuple[str, ...], as_tuple, Field(min_length=1)]
    """Texts to continue."""
    every_steps: Count = 200
    """Write samples after this many steps."""
    max_new_tokens: Count = 128
    """Longest text, in tokens."""
    temperature: Rate = 0.0
    """0: the most probable token always."""
    top_k: Count | None = None
    """Only the k most probable tokens; null: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Only the fewest tokens that have this probability together; null: all."""
    min_p: Fraction | None = None
    """Only tokens at least this times as probable as the most probable one; null: all."""
    repetition_penalty: Positive = 1.0
    """Logits of tokens that are there already are divided by this (multiplied, where below 0); 1: none."""
    stop: Annotated[tuple[Text, ...], as_tuple] = ()
    """A text ends before the first of these would appear."""
