"""DecoderSpec: a Llama-shaped decoder (RMSNorm, SwiGLU, RoPE, GQA), names as in Hugging Face's LlamaForCausalLM."""

from dataclasses import dataclass

import numpy as np

from mlx_training.spec.param import Param, Spec


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling (Hugging Face `rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


@dataclass(frozen=True)
class DecoderSpec(Spec):
    """Sizes of a Llama-shaped language model trained from scratch."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    context_length: int = 128
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    init_std: float = 0.02

    def params(self) -> dict[str, Param]:
        """HF Llama's names; matrices N(0, init_std), norms one and not decayed."""
        H, F = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim

        def matrix(*shape: int) -> Param:
            return Param(shape, "normal", self.init_std)

        norm = Param((H,), "ones", decay=False)
        table = {"model.embed_tokens.weight": matrix(self.vocab_size, H)}
        for i in range(self.num_layers):
            layer = f"model.layers.{i}"
            table |= {
                f"{layer}.input_layernorm.weight": norm,
                f"{layer}.self_attn.q_proj.weight": matrix(q, H),
                f"{layer}.self_attn.k_proj.weight": matrix(kv, H),
                f"{layer}.self_attn.v_proj.weight": matrix(kv, H),
                f"{layer}.self_attn.o_proj.weight": matrix(H, q),
                f"{layer}.post_attention_layernorm.weight": norm,
                f"{layer}.mlp.gate_proj.weight": matrix(F, H),
                f"{layer}.mlp.up_proj.weight": matrix(F, H),
                f"{layer}.mlp.down_proj.weight": matrix(H, F),
            }
        table["model.norm.weight"] = norm
        if not self.tie_word_embeddings:
            table["lm_head.weight"] = matrix(self.vocab_size, H)
        return table

    def rope_frequencies(self) -> np.ndarray:
        """Angles per position, float32 (head_dim / 2,); both backends take these so that they agree to the bit.

        With `rope_scaling`, Llama 3.1's rule: long wavelengths are divided by `factor`, short ones kept, and
        those between are interpolated.
        """
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        frequencies = self.rope_theta**-exponents
        if s := self.rope_scaling:
            wavelengths = 2 * np.pi / frequencies
            smooth = (s.original_context_length / wavelengths - s.low_freq_factor) / (
                s.high_freq_factor - s.low_freq_factor
            )
            keep = np.clip(smooth, 0.0, 1.0)
            frequencies = keep * frequencies + (1 - keep) * frequencies / s.factor
        return frequencies.astype(np.float32)

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
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
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
