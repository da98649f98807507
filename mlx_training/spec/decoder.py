"""DecoderSpec: a GPT- or Llama-shaped decoder, names as in Hugging Face's LlamaForCausalLM.

The defaults are Llama's: pre-RMSNorm, SwiGLU, RoPE, grouped key/value heads, no biases. GPT's parts stand beside them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from mlx_training.spec.mixers import FixedPattern, Mixer
from mlx_training.spec.param import Param, Spec, matrix


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling (Hugging Face `rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


@dataclass(frozen=True)
class ExpertsSpec:
    """Mixture of experts in the place of every feed-forward layer (Shazeer et al. 2017; Mixtral's routing).

    A token goes to the `num_active` experts that its router likes best, weighted by a softmax over those.
    """

    num_experts: int = 8
    num_active: int = 2
    balance: float = 0.01  # weight of the balancing loss E * sum(share of tokens * mean probability); 1 when balanced


@dataclass(frozen=True)
class DecoderSpec(Spec):
    """Sizes and parts of a language model trained from scratch."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32  # below hidden_size / num_heads: bottleneck attention
    context_length: int = 128
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-5
    activation: Literal["swiglu", "gelu", "gelu_tanh", "gelu_quick", "relu2"] = "swiglu"
    mlp_bias: bool = False
    attention_bias: bool = False
    positions: Literal["rope", "learned", "alibi", "none"] = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    mixers: tuple[Mixer, ...] = ("causal",)  # one a layer, repeated
    window: int = 256
    stride: int = 16
    num_selected: int = 64
    fixed: FixedPattern = field(default_factory=FixedPattern)
    num_sinks: int = 0
    experts: ExpertsSpec | None = None
    widths: tuple[int, ...] = ()  # of each layer's residual stream, a U that begins and ends at hidden_size
    logit_softcap: float | None = None
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    init: Literal["normal", "xavier", "kaiming", "uniform"] = "normal"
    init_std: float = 0.02
    position_init_std: float = 0.02

    def params(self) -> dict[str, Param]:
        """HF Llama's names; matrices by `init`, embeddings N(0, init_std), norms one; norms and biases not decayed."""
        embedding = Param((self.vocab_size, self.hidden_size), "normal", self.init_std)
        table = {"model.embed_tokens.weight": embedding}
        if self.positions == "learned":
            shape = (self.context_length, self.hidden_size)
            table["model.embed_positions.weight"] = Param(shape, "normal", self.position_init_std)
        for i in range(self.num_layers):
            layer, one = f"model.layers.{i}", self.of_layer(i)
            H, F = one.hidden_size, one.intermediate_size
            q, kv = one.num_heads * one.head_dim, one.num_kv_heads * one.head_dim
            if i and (before := self.of_layer(i - 1).hidden_size) != H:
                table[f"{layer}.resize.weight"] = matrix(self.init, self.init_std, H, before)
            table |= self._norm(f"{layer}.input_layernorm", H)
            for name, out in (("q", q), ("k", kv), ("v", kv)):
                table |= self._linear(f"{layer}.self_attn.{name}_proj", out, H, self.attention_bias)
            table |= self._linear(f"{layer}.self_attn.o_proj", H, q, self.attention_bias)
            if self.mixer(i) == "sparsek":
                scores = matrix(self.init, self.init_std, self.num_kv_heads, H)
                table[f"{layer}.self_attn.score_proj.weight"] = scores
            if self.qk_norm:
                for name in ("q_norm", "k_norm"):
                    table[f"{layer}.self_attn.{name}.weight"] = Param((one.head_dim,), "ones", decay=False)
            if self.num_sinks:
                sinks = (self.num_kv_heads, self.num_sinks, one.head_dim)
                table[f"{layer}.self_attn.sink_k"] = Param(sinks, "normal", 1.0, decay=False)
                table[f"{layer}.self_attn.sink_v"] = Param(sinks, "zeros", decay=False)
            table |= self._norm(f"{layer}.post_attention_layernorm", H)
            table |= self._mlp(f"{layer}.mlp", H, F)
        if self.norm_position == "pre":
            table |= self._norm("model.norm", self.hidden_size)
        if not self.tie_word_embeddings:
            table["lm_head.weight"] = embedding
        return table

    @property
    def is_causal(self) -> bool:
        return "bidirectional" not in self.mixers

    def of_layer(self, layer: int) -> "DecoderSpec":
        """The sizes of one layer; with `widths` its feed-forward layer and its heads are narrow as it is."""
        if not self.widths:
            return self
        width = self.widths[layer]
        inner = max(1, self.intermediate_size * width // self.hidden_size)
        return replace(self, hidden_size=width, intermediate_size=inner, head_dim=width // self.num_heads)

    def skip_from(self, layer: int) -> int | None:
        """With `widths`: the layer of the way down whose output is added to what enters this one on the way up."""
        mirrored = self.num_layers - 1 - layer
        return mirrored if self.widths and mirrored < layer - 1 else None

    def mixer(self, layer: int) -> Mixer:
        """How far a layer's attention looks."""
        return self.mixers[layer % len(self.mixers)]

    def _mlp(self, name: str, H: int, F: int) -> Iterator[tuple[str, Param]]:
        shapes = {"gate_proj": (F, H), "up_proj": (F, H), "down_proj": (H, F)}
        if self.activation != "swiglu":
            del shapes["gate_proj"]
        if not self.experts:
            for part, shape in shapes.items():
                yield from self._linear(f"{name}.{part}", *shape, self.mlp_bias)
            return
        yield f"{name}.router.weight", matrix(self.init, self.init_std, self.experts.num_experts, H)
        for part, shape in shapes.items():
            one = matrix(self.init, self.init_std, *shape)
            yield f"{name}.{part}.weight", one._replace(shape=(self.experts.num_experts, *shape))

    def _linear(self, name: str, out_size: int, in_size: int, bias: bool) -> Iterator[tuple[str, Param]]:
        yield f"{name}.weight", matrix(self.init, self.init_std, out_size, in_size)
        if bias:
            yield f"{name}.bias", Param((out_size,), "zeros", decay=False)

    def _norm(self, name: str, size: int) -> Iterator[tuple[str, Param]]:
        yield f"{name}.weight", Param((size,), "ones", decay=False)
        if self.norm == "layernorm":
            yield f"{name}.bias", Param((size,), "zeros", decay=False)

    def zero_gradients(self) -> dict[str, slice]:
        """Key biases, unless they are rotated or normalised, or stand beside sinks, which have none."""
        if not self.attention_bias or self.positions == "rope" or self.qk_norm or self.num_sinks:
            return {}
        return {f"model.layers.{i}.self_attn.k_proj.bias": slice(None) for i in range(self.num_layers)}

    @property
    def max_length(self) -> int | None:
        """Learned positions end there."""
        return self.context_length if self.positions == "learned" else None

    def alibi_slopes(self) -> np.ndarray:
        """float32 (num_heads,): how fast each head's attention falls with distance (Press et al. 2022).

        2^(-8 i / n) for n heads, a power of two; for other counts those of the power below, and every second one of
        the power above.
        """
        n = 2 ** int(np.log2(self.num_heads))
        slopes = 2.0 ** (-8 * np.arange(1, n + 1) / n)
        between = 2.0 ** (-4 * np.arange(1, 2 * n + 1, 2) / n)
        return np.concatenate([slopes, between])[: self.num_heads].astype(np.float32)

    def rope_frequencies(self) -> np.ndarray:
        """Angles per position, float32 (head_dim / 2,); both backends take these so that they agree to the bit.

        With `rope_scaling`, Llama 3.1's rule: long wavelengths are divided by `factor`, short ones kept, and
        those between are interpolated. With `widths` those of every width of head, one after another (`rope_slice`).
        """
        exponents = np.concatenate([np.arange(0, D, 2, dtype=np.float64) / D for D in self._head_dims])
        frequencies = self.rope_theta**-exponents
        if s := self.rope_scaling:
            wavelengths = 2 * np.pi / frequencies
            smooth = (s.original_context_length / wavelengths - s.low_freq_factor) / (
                s.high_freq_factor - s.low_freq_factor
            )
            keep = np.clip(smooth, 0.0, 1.0)
            frequencies = keep * frequencies + (1 - keep) * frequencies / s.factor
        return frequencies.astype(np.float32)

    def rope_slice(self, layer: int) -> slice:
        """Where the frequencies of a layer's heads stand."""
        index = self._head_dims.index(self.of_layer(layer).head_dim)
        start = sum(D // 2 for D in self._head_dims[:index])
        return slice(start, start + self._head_dims[index] // 2)

    @property
    def _head_dims(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.of_layer(i).head_dim for i in range(self.num_layers)))

    def not_llama(self) -> list[str]:
        """The parts that Hugging Face's Llama does not have, as `key: value`."""
        llama: dict[str, Any] = {
            "widths": (),
            "norm": "rmsnorm",
            "norm_position": "pre",
            "activation": "swiglu",
            "positions": "rope",
            "qk_norm": False,
            "mixers": ("causal",),
            "num_sinks": 0,
            "experts": None,
            "logit_softcap": None,
        }
        return [f"{key}: {getattr(self, key)}" for key, value in llama.items() if getattr(self, key) != value]

    def hf_config(self, *, bos_token_id: int | None, eos_token_id: int) -> dict:
        """`config.json` of the exported model: Hugging Face Llama, with the keys mlx-lm reads."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "torch_dtype": "float32",
        }
        if s := self.rope_scaling:
            config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_context_length,
            }
        return config
