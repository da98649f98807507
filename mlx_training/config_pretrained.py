"""The `model` section of family pretrained, and the adapters of any frozen language model."""

from typing import Annotated, Literal

from pydantic import Field

from mlx_training.config_section import Count, Dropout, Positive, Section, Text, as_tuple


class LoRAConfig(Section):
    """Adapters on Linears of the frozen LM (learning-rate group lora)."""

    rank: Count = 16
    """Rank of the change of every matrix."""
    alpha: Positive = 32.0
    """The change is multiplied by alpha / rank."""
    dropout: Dropout = 0.0
    """Dropout on what enters an adapter."""
    targets: Annotated[tuple[Text, ...], as_tuple, Field(min_length=1)] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    """Linears that get one, by the end of their path, as in PEFT."""
    dora: bool = False
    """DoRA: a learned magnitude of every output beside the change of its direction."""


class PretrainedConfig(Section):
    """A frozen language model with adapters, on text or on rows without series."""

    family: Literal["pretrained"]
    """pretrained: LoRA or DoRA on a frozen LM."""
    llm_id: Text
    """Frozen LM: builtin/..., a directory (with a / or .), a run of family decoder (or its checkpoint), or a hub id."""
    llm_revision: str | None = None
    """Commit, tag or branch of a hub id."""
    llm_weights: Literal["auto", "dequantized", "resident"] = "auto"
    """Quantised weights: expanded once, which is faster, or kept packed; auto expands them where that takes at
    most half of the memory that is free when the model is loaded."""
    lora: LoRAConfig = LoRAConfig()
    context_length: Count = 128
    """Tokens per training window of text; rows have dataset.max_length."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Learning-rate groups that train."""
        return ("lora",)
