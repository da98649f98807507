"""The `model` section of family timeseries."""

from typing import Annotated, Literal

from pydantic import Field

from mlx_training.config_pretrained import LoRAConfig
from mlx_training.config_section import Count, Dropout, Positive, Section, Text


class EncoderConfig(Section):
    patch_size: Count = 4
    """Samples per patch."""
    hidden_size: Count = 64
    """Width of the encoder."""
    num_layers: Count = 2
    """Transformer layers."""
    num_heads: Count = 4
    """Attention heads; they divide hidden_size."""
    ffn_size: Count = 256
    """Width of the feed-forward layers."""
    max_patches: Annotated[int, Field(ge=4, multiple_of=4)] = 256
    """Learned positions, a multiple of 4: the longest series is max_patches * patch_size samples."""
    max_series: Annotated[int, Field(ge=0)] = 0
    """Most series a row, each place with a learned embedding that tells axes or leads apart; 0: no embedding."""
    pos_init_std: Positive = 0.1
    """Standard deviation of the initial positions (1.0 in the published preset)."""
    dropout: Dropout = 0.0
    """Dropout inside the encoder."""
    numeric_scale: bool = True
    """Mean and log standard deviation of each series enter as numbers (off in layout: opentslm)."""


class ProjectorConfig(Section):
    norm_output: bool = True
    """RMS-normalise the output, times a learned gain that starts at the size of the LM's own embeddings."""
    dropout: Dropout = 0.0
    """Dropout on the projector's output."""


class TimeSeriesConfig(Section):
    """A trained encoder and projector in front of a frozen language model."""

    family: Literal["timeseries"]
    """timeseries: encoder + projector + frozen LM. Others: an LM from scratch."""
    preset: Literal["opentslm-sp"] | None = None
    """Published sizes for the encoder and projector, and its prompt layout; keys given beside it win."""
    layout: Literal["standard", "opentslm"] = "standard"
    """How a row becomes tokens; opentslm reproduces the reference (BOS before every fragment)."""
    llm_id: Text = "builtin/tiny-llama-4bit"
    """Frozen LM: builtin/..., a directory (with a / or .), a run of family decoder (or its checkpoint), or a hub id."""
    llm_revision: str | None = None
    """Commit, tag or branch of a hub id."""
    llm_weights: Literal["auto", "dequantized", "resident"] = "auto"
    """Quantised weights: expanded once, which is faster, or kept packed; auto expands them where that takes at
    most half of the memory that is free when the model is loaded."""
    train_lm_head: bool = False
    """Train a copy of the LM's output head as well (learning-rate group lm_head)."""
    lora: LoRAConfig | None = None
    """Adapters on the frozen LM; null: none."""
    encoder: EncoderConfig = EncoderConfig()
    projector: ProjectorConfig = ProjectorConfig()

    @property
    def groups(self) -> tuple[str, ...]:
        """Learning-rate groups that train."""
        more = {"lm_head": self.train_lm_head, "lora": self.lora is not None}
        return ("encoder", "projector", *(group for group, trains in more.items() if trains))
