"""The `model` section of a configuration, and what every section is made of."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]

as_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


def either(mapping: str, otherwise: str) -> Discriminator:
    """Choose a union's branch by whether a mapping stands there, so that an error speaks of one branch only."""
    return Discriminator(lambda value: mapping if isinstance(value, dict | BaseModel) else otherwise)


class Section(BaseModel):
    """A mapping of known keys; it cannot be changed after it is read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


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
    """timeseries: encoder + projector + frozen LM. decoder: a Llama-shaped LM from scratch."""
    preset: Literal["opentslm-sp"] | None = None
    """Published sizes for the encoder and projector, and its prompt layout; keys given beside it win."""
    layout: Literal["standard", "opentslm"] = "standard"
    """How a row becomes tokens; opentslm reproduces the reference (BOS before every fragment)."""
    llm_id: Text = "builtin/tiny-llama-4bit"
    """The frozen LM: builtin/..., a directory (with a / or .), or a hub id."""
    llm_revision: str | None = None
    """Commit, tag or branch of a hub id."""
    llm_weights: Literal["auto", "dequantized", "resident"] = "auto"
    """Quantised weights: expanded once (auto: the faster way to train), or kept packed (less memory)."""
    train_lm_head: bool = False
    """Train a copy of the LM's output head as well (learning-rate group lm_head)."""
    encoder: EncoderConfig = EncoderConfig()
    projector: ProjectorConfig = ProjectorConfig()

    @property
    def groups(self) -> tuple[str, ...]:
        """Learning-rate groups that train."""
        return ("encoder", "projector", "lm_head") if self.train_lm_head else ("encoder", "projector")


class RopeScalingConfig(Section):
    """Llama 3's frequency scaling."""

    factor: Positive = 8.0
    """Long wavelengths become this much longer."""
    low_freq_factor: Positive = 1.0
    """Wavelengths above original_context_length / this are long."""
    high_freq_factor: Positive = 4.0
    """Wavelengths below original_context_length / this are kept."""
    original_context_length: Count = 8192
    """Tokens the model was pretrained on before its context was extended."""


class DecoderShape(Section):
    hidden_size: Count = 128
    """Width of the model."""
    intermediate_size: Count = 256
    """Width of the SwiGLU layers."""
    num_layers: Count = 3
    """Transformer layers."""
    num_heads: Count = 4
    """Query heads."""
    num_kv_heads: Count | None = None
    """Key/value heads; they divide num_heads. null: as many as num_heads."""
    head_dim: Count | None = None
    """Width of a head, an even number. null: hidden_size / num_heads."""
    context_length: Count = 128
    """Tokens per training window."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Llama 3's frequency scaling; null: none."""
    rms_norm_eps: Positive = 1e-5
    """Epsilon of RMSNorm."""
    tie_word_embeddings: bool = True
    """The output head is the embedding table."""
    init_std: Positive = 0.02
    """Standard deviation of the initial weights."""


class TrainTokenizer(Section):
    """Train a byte-level BPE tokenizer on the training text."""

    train: Annotated[int, Field(ge=259)]
    """Size of its vocabulary: 256 bytes, <bos>, <eos>, <pad> and merges."""


class DecoderConfig(Section):
    """A Llama-shaped language model trained from scratch."""

    family: Literal["decoder"]
    """timeseries: encoder + projector + frozen LM. decoder: a Llama-shaped LM from scratch."""
    decoder: DecoderShape = DecoderShape()
    tokenizer: Annotated[
        Annotated[Text, Tag("<directory>")] | Annotated[TrainTokenizer, Tag("<train>")],
        either("<train>", "<directory>"),
    ] = TrainTokenizer(train=640)
    """Directory of a tokenizer, or {train: vocabulary size}."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Learning-rate groups that train."""
        return ("model",)


FAMILIES = ("timeseries", "decoder")


def _family(value: Any) -> str | None:
    family = value.get("family") if isinstance(value, dict) else getattr(value, "family", None)
    return f"<{family}>" if family in FAMILIES else None


ModelConfig = Annotated[
    Annotated[TimeSeriesConfig, Tag("<timeseries>")] | Annotated[DecoderConfig, Tag("<decoder>")],
    Discriminator(_family, custom_error_type="family", custom_error_message="unknown family"),
]
