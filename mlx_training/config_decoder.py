"""The `model` section of family decoder."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mlx_training.config_language import LanguageConfig
from mlx_training.config_section import Count, Dropout, Positive, Rate, Section, as_tuple
from mlx_training.spec import DecoderSpec, ExpertsSpec, FixedPattern, RopeScaling
from mlx_training.spec.mixers import Mixer


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


class FixedConfig(Section):
    """`fixed` sparse attention: a query sees its segment and the summary blocks of earlier ones."""

    block_size: Count = 16
    """Tokens a block."""
    local_context: Count = 64
    """Tokens a segment, a multiple of block_size."""
    num_verts: Count = 1
    """Choices of summary blocks that heads take turns with; it divides num_heads."""
    vert_size: Count = 1
    """Summary blocks a segment; it divides the blocks of a segment."""


class ExpertsConfig(Section):
    """A mixture of experts in every layer."""

    num_experts: Annotated[int, Field(ge=2)] = 8
    """Feed-forward layers to choose from, each of intermediate_size."""
    num_active: Count = 2
    """Experts a token goes to."""
    balance: Rate = 0.01
    """Weight of the balancing loss in training."""


class DecoderShape(Section):
    hidden_size: Count = 128
    """Width of the model."""
    intermediate_size: Count = 256
    """Width of the feed-forward layers."""
    num_layers: Count = 3
    """Transformer layers."""
    widths: Annotated[tuple[Count, ...], as_tuple, Field(min_length=2)] | None = None
    """U-Net: width of each layer, e.g. [256, 128, 256]; mirrored, and hidden_size at both ends. null: hidden_size."""
    num_heads: Count = 4
    """Query heads."""
    num_kv_heads: Count | None = None
    """Key/value heads; they divide num_heads. null: as many as num_heads."""
    head_dim: Count | None = None
    """Width of a head. null: intermediate_dim (else hidden_size) / num_heads."""
    intermediate_dim: Count | None = None
    """Bottleneck attention: width of all query heads together. null: hidden_size."""
    context_length: Count = 128
    """Tokens per training window."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """RMSNorm, or LayerNorm with a bias."""
    norm_position: Literal["pre", "post"] = "pre"
    """Normalise what enters attention and feed-forward layers, or (post) the sum with what they return."""
    norm_eps: Positive = 1e-5
    """Epsilon of the norms."""
    activation: Literal["swiglu", "gelu", "gelu_tanh", "gelu_quick", "relu2"] = "swiglu"
    """Feed-forward layers: SwiGLU, or up, GELU (exact, tanh, or x sigmoid(1.702 x)) or squared ReLU, down."""
    mlp_bias: bool = False
    """Biases in the feed-forward layers."""
    attention_bias: bool = False
    """Biases of queries, keys, values and attention's output."""
    positions: Literal["rope", "learned", "alibi", "none"] = "rope"
    """Rotary, learned (then no text may be longer than context_length), ALiBi (causal mixers only), or none."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Llama 3's frequency scaling; null: none."""
    qk_norm: bool = False
    """RMSNorm of every query and key head, before positions."""
    mixers: Annotated[tuple[Mixer, ...], as_tuple, Field(min_length=1)] = ("causal",)
    """What a layer sees, repeated over the layers: causal (the past), local, strided, fixed, sparsek, bidirectional."""
    window: Count = 256
    """local, sparsek: the last so many tokens, itself included."""
    stride: Annotated[int, Field(ge=2)] = 16
    """strided: every so-manieth token of the past, itself included."""
    num_selected: Count = 64
    """sparsek: tokens before the window that a query sees, those with the best learned scores."""
    fixed: FixedConfig = FixedConfig()
    """fixed: sizes of the pattern (Child et al. 2019)."""
    num_sinks: Annotated[int, Field(ge=0)] = 0
    """Learned keys and values of each layer that every query sees, at the same distance from everywhere."""
    experts: ExpertsConfig | None = None
    """A mixture of experts in the place of the feed-forward layers; null: none."""
    logit_softcap: Positive | None = None
    """Logits become c tanh(logits / c); null: as they are."""
    tie_word_embeddings: bool = True
    """The output head is the embedding table."""
    dropout: Dropout = 0.0
    """Dropout on the embeddings, and on what attention and feed-forward layers return."""
    init: Literal["normal", "xavier", "kaiming", "uniform"] = "normal"
    """Of the matrices: N(0, init_std), Glorot's or He's by fan, or uniform within init_std. Embeddings are normal."""
    init_std: Positive = 0.02
    """Standard deviation of the initial weights."""
    position_init_std: Rate = 0.02
    """Standard deviation of learned positions; 0: they start at zero."""


class DecoderConfig(LanguageConfig):
    """A GPT- or Llama-shaped language model trained from scratch."""

    reads_segments: ClassVar[bool] = True

    family: Literal["decoder"]
    """decoder: a GPT- or Llama-shaped LM from scratch."""
    preset: (
        Literal["mainrun", "modern-llm-253m", "lm-max-12gb", "mingpt", "gpt2-small-8", "gpt-oss-small", "llama3-lite"]
        | None
    ) = None
    """Sizes by name (docs/language_models.md); keys given beside it win."""
    decoder: DecoderShape = DecoderShape()

    @property
    def context_length(self) -> int:
        return self.decoder.context_length

    def spec(self, vocab_size: int) -> DecoderSpec:
        shape = self.decoder.model_dump(exclude={"intermediate_dim"})
        shape["num_kv_heads"] = shape["num_kv_heads"] or shape["num_heads"]
        width = self.decoder.intermediate_dim or shape["hidden_size"]
        shape["head_dim"] = shape["head_dim"] or width // shape["num_heads"]
        shape["widths"] = shape["widths"] or ()
        shape["fixed"] = FixedPattern(**shape["fixed"])
        for key, part in {"rope_scaling": RopeScaling, "experts": ExpertsSpec}.items():
            shape[key] = part(**shape[key]) if shape[key] else None
        return DecoderSpec(vocab_size, **shape)
