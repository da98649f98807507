"""SSMSpec: state-space language models, names as in Hugging Face's MambaForCausalLM where it has them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from mlx_training.spec.decoder import DecoderSpec
from mlx_training.spec.param import Param, Spec

SSMMixer = Literal["mamba", "mamba2", "s4d", "stu", "local"]


@dataclass(frozen=True)
class SSMSpec(Spec):
    """Sizes and parts of a state-space language model; `mixers` names what each layer mixes time with.

    - mamba: selective scan (Gu & Dao 2023).
    - mamba2: state-space duality, heads that share one decay (Dao & Gu 2024).
    - s4d: a diagonal state-space convolution (Gu et al. 2022) in the gated block of BiGS (Wang et al. 2022), of which
      only the forward half is kept: its backward half looks into the future.
    - stu: spectral filters (Agarwal et al. 2023) in the factored form of Flash STU (Liu et al. 2024).
    - local: the decoder's sliding-window attention with rotary positions.
    """

    vocab_size: int
    hidden_size: int = 128
    num_layers: int = 4
    mixers: tuple[SSMMixer, ...] = ("mamba",)  # one a layer, repeated
    context_length: int = 128
    intermediate_size: int | None = None  # of a SwiGLU after every mixer
    expand: int = 2
    state_size: int = 16
    conv_kernel: int = 4
    dt_rank: int = 8
    head_dim: int = 64
    num_groups: int = 1
    chunk_size: int = 64
    num_filters: int = 24
    num_heads: int = 4
    window: int = 256
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    init_std: float = 0.02

    @property
    def inner_size(self) -> int:
        """Width inside a mixer."""
        return self.expand * self.hidden_size

    @property
    def num_ssd_heads(self) -> int:
        """Heads of a mamba2 mixer."""
        return self.inner_size // self.head_dim

    def mixer(self, layer: int) -> SSMMixer:
        """What a layer mixes time with."""
        return self.mixers[layer % len(self.mixers)]

    def params(self) -> dict[str, Param]:
        """HF Mamba's names; A, D, dt, norms and biases not decayed."""
        embedding = Param((self.vocab_size, self.hidden_size), "normal", self.init_std)
        table = {"backbone.embeddings.weight": embedding}
        makers = {
            "mamba": self._mamba,
            "mamba2": self._mamba2,
            "s4d": self._s4d,
            "stu": self._stu,
            "local": self._local,
        }
        for i in range(self.num_layers):
            layer = f"backbone.layers.{i}"
            table |= self._norm(f"{layer}.norm")
            table |= {f"{layer}.mixer.{name}": param for name, param in makers[self.mixer(i)]()}
            if self.intermediate_size:
                table |= self._norm(f"{layer}.mlp_norm")
                table |= {f"{layer}.mlp.{name}": param for name, param in self._mlp(self.intermediate_size)}
        table |= self._norm("backbone.norm_f")
        if not self.tie_word_embeddings:
            table["lm_head.weight"] = embedding
        return table

    def _mamba(self) -> Iterator[tuple[str, Param]]:
        H, D, N, R = self.hidden_size, self.inner_size, self.state_size, self.dt_rank
        yield "A_log", Param((D, N), "log_counts", decay=False)
        yield "D", Param((D,), "ones", decay=False)
        yield from self._conv(D)
        yield "in_proj.weight", _uniform(2 * D, H)
        yield "x_proj.weight", _uniform(R + 2 * N, D)
        yield "dt_proj.weight", _uniform(D, R)
        yield "dt_proj.bias", Param((D,), "time_steps", decay=False)
        yield "out_proj.weight", self._residual(H, D)

    def _mamba2(self) -> Iterator[tuple[str, Param]]:
        H, D, heads, states = self.hidden_size, self.inner_size, self.num_ssd_heads, self.num_groups * self.state_size
        yield "dt_bias", Param((heads,), "time_steps", decay=False)
        yield "A_log", Param((heads,), "log_counts", decay=False)
        yield "D", Param((heads,), "ones", decay=False)
        yield from self._conv(D + 2 * states)
        yield "in_proj.weight", _uniform(2 * D + 2 * states + heads, H)
        yield "norm.weight", Param((D,), "ones", decay=False)
        yield "out_proj.weight", self._residual(H, D)

    def _s4d(self) -> Iterator[tuple[str, Param]]:
        H, D, pairs = self.hidden_size, self.inner_size, self.state_size // 2
        yield "A_log", Param((H, pairs), "zeros", decay=False)  # A = -exp(A_log) / 2 + i A_imag: S4D-Lin
        yield "A_imag", Param((H, pairs), "counts", np.pi, decay=False)
        yield "C", Param((H, pairs, 2), "normal", 0.5**0.5)
        yield "D", Param((H,), "ones", decay=False)
        yield "dt_bias", Param((H,), "time_steps", decay=False)
        yield "in_proj.weight", _uniform(H, H)
        yield "gate_proj.weight", _uniform(D, H)
        yield "up_proj.weight", _uniform(D, H)
        yield "out_proj.weight", self._residual(H, D)

    def _stu(self) -> Iterator[tuple[str, Param]]:
        H, K = self.hidden_size, self.num_filters
        yield "in_proj.weight", _uniform(H, H)
        yield "filters", Param((2 * K, H), "normal", (2 * K) ** -0.5)

    def _local(self) -> Iterator[tuple[str, Param]]:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{name}.weight", Param((self.hidden_size, self.hidden_size), "normal", self.init_std)

    def _mlp(self, width: int) -> Iterator[tuple[str, Param]]:
        for name in ("gate_proj", "up_proj"):
            yield f"{name}.weight", Param((width, self.hidden_size), "normal", self.init_std)
        yield "down_proj.weight", Param((self.hidden_size, width), "normal", self.init_std)

    def _conv(self, channels: int) -> Iterator[tuple[str, Param]]:
        bound = self.conv_kernel**-0.5
        yield "conv1d.weight", Param((channels, 1, self.conv_kernel), "uniform", bound)
        yield "conv1d.bias", Param((channels,), "uniform", bound, decay=False)

    def _residual(self, out_size: int, in_size: int) -> Param:
        """What returns to the residual stream: smaller in deeper models (GPT-2's rule, as Mamba takes it)."""
        return Param((out_size, in_size), "uniform", (in_size * self.num_layers) ** -0.5)

    def _norm(self, name: str) -> Iterator[tuple[str, Param]]:
        yield f"{name}.weight", Param((self.hidden_size,), "ones", decay=False)
        if self.norm == "layernorm":
            yield f"{name}.bias", Param((self.hidden_size,), "zeros", decay=False)

    def block(self) -> DecoderSpec:
        """The decoder whose attention and feed-forward layers stand in this model."""
        return DecoderSpec(
            self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size or self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            context_length=self.context_length,
            mixers=("local",),
            window=self.window,
        )

    def spectral_filters(self) -> np.ndarray:
        """float32 (context_length, 2 * num_filters): the filters, and the same with every second sign turned."""
        filters = _spectral_filters(self.context_length, self.num_filters)
        signs = np.where(np.arange(self.context_length) % 2, -1.0, 1.0)[:, None]
        return np.concatenate([filters, signs * filters], axis=1).astype(np.float32)

    def not_mamba(self) -> list[str]:
        """The parts that Hugging Face's Mamba and Mamba-2 do not have, as `key: value`."""
        found = [] if set(self.mixers) in ({"mamba"}, {"mamba2"}) else [f"mixers: {', '.join(self.mixers)}"]
        found += [f"intermediate_size: {self.intermediate_size}"] if self.intermediate_size else []
        return found + ([f"norm: {self.norm}"] if self.norm != "rmsnorm" else [])

    def hf_config(self, *, bos_token_id: int | None, eos_token_id: int) -> dict[str, Any]:
        """`config.json` of the exported model: Hugging Face's Mamba or Mamba-2."""
        is_first = self.mixer(0) == "mamba"
        config: dict[str, Any] = {
            "architectures": ["MambaForCausalLM" if is_first else "Mamba2ForCausalLM"],
            "model_type": "mamba" if is_first else "mamba2",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.inner_size,
            "num_hidden_layers": self.num_layers,
            "state_size": self.state_size,
            "expand": self.expand,
            "conv_kernel": self.conv_kernel,
            "layer_norm_epsilon": self.norm_eps,
            "use_bias": False,
            "use_conv_bias": True,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_word_embeddings,
            "pad_token_id": eos_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "torch_dtype": "float32",
        }
        if is_first:
            return config | {"time_step_rank": self.dt_rank}
        heads = {"num_heads": self.num_ssd_heads, "head_dim": self.head_dim, "n_groups": self.num_groups}
        return config | heads | {"chunk_size": self.chunk_size}


def _uniform(out_size: int, in_size: int) -> Param:
    """A matrix as PyTorch initialises it: uniform within 1/sqrt(in)."""
    return Param((out_size, in_size), "uniform", in_size**-0.5)


@cache
def _spectral_filters(length: int, count: int) -> np.ndarray:
    """float64 (length, count): the top eigenvectors of Z_ij = 2 / ((i + j)^3 - (i + j)), each times sigma^(1/4).

    Z is the integral of (1 - a)^2 a^(i + j - 2) over [0, 1], so Z = W W^T with W from Gauss-Legendre nodes. The
    singular values of W are sigma^(1/2): they keep their digits where an eigensolver of Z returns rounding noise, which
    differs between machines (at length 128 from the 18th filter on). The largest entry of a filter is positive.
    """
    nodes, weights = np.polynomial.legendre.leggauss(min(length + 2, 384))
    places, weights = (nodes + 1) / 2, weights / 2
    W = places ** np.arange(length)[:, None] * (1 - places) * np.sqrt(weights)
    vectors, roots, _ = np.linalg.svd(W, full_matrices=False)
    vectors, roots = vectors[:, :count], roots[:count]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(count)])
    return vectors * np.sqrt(roots)
