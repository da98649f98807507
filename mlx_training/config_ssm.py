"""The `model` section of the state-space family."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from mlx_training.config_language import LanguageConfig
from mlx_training.config_section import Count, Dropout, Positive, Section, as_tuple
from mlx_training.spec.ssm import SSMMixer, SSMSpec

READERS: dict[str, tuple[SSMMixer, ...]] = {  # which mixers read a key
    "expand": ("mamba", "mamba2", "s4d"),
    "state_size": ("mamba", "mamba2", "s4d"),
    "conv_kernel": ("mamba", "mamba2"),
    "dt_rank": ("mamba",),
    "head_dim": ("mamba2",),
    "num_groups": ("mamba2",),
    "chunk_size": ("mamba2",),
    "num_filters": ("stu",),
    "num_heads": ("local",),
    "window": ("local",),
}


class SSMShape(Section):
    hidden_size: Count = 128
    """Width of the model."""
    num_layers: Count = 4
    """Layers."""
    mixers: Annotated[tuple[SSMMixer, ...], as_tuple, Field(min_length=1)] = ("mamba",)
    """What each layer mixes time with, repeated over the layers: mamba, mamba2, s4d, stu, local."""
    context_length: Count = 128
    """Tokens per training window; stu looks back so far and no further."""
    intermediate_size: Count | None = None
    """Width of a SwiGLU after every mixer; null: none, as in Mamba."""
    expand: Count = 2
    """mamba, mamba2, s4d: a mixer is this many times hidden_size wide."""
    state_size: Count = 16
    """mamba, mamba2, s4d: numbers a channel remembers (s4d: half as many complex ones)."""
    conv_kernel: Count = 4
    """mamba, mamba2: tokens that the short convolution sees."""
    dt_rank: Count | None = None
    """mamba: width of what makes the time steps; null: hidden_size / 16, rounded up."""
    head_dim: Count = 64
    """mamba2: width of a head; it divides expand * hidden_size."""
    num_groups: Count = 1
    """mamba2: groups of heads that share B and C."""
    chunk_size: Count = 64
    """mamba2: tokens within which products replace the recurrence; changes speed and memory only."""
    num_filters: Count = 24
    """stu: spectral filters; at most context_length."""
    num_heads: Count = 4
    """local: attention heads; they divide hidden_size."""
    window: Count = 256
    """local: the last so many tokens, itself included."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """RMSNorm, or LayerNorm with a bias, before every mixer and SwiGLU."""
    norm_eps: Positive = 1e-5
    """Epsilon of the norms."""
    tie_word_embeddings: bool = True
    """The output head is the embedding table."""
    dropout: Dropout = 0.0
    """Dropout on the embeddings, and on what mixers and SwiGLUs return."""
    init_std: Positive = 0.02
    """Standard deviation of the initial embeddings, attention and SwiGLUs; mixers start as published."""

    def broken_rules(self) -> Iterator[tuple[str, str]]:
        """(key, what was given, what is allowed) of sizes that do not go together, and of keys that nothing reads."""
        inner = self.expand * self.hidden_size
        for key, readers in READERS.items():
            if not {*readers} & {*self.mixers} and getattr(self, key) != type(self).model_fields[key].default:
                yield key, f"mixers: {', '.join(self.mixers)} do not read it; remove it, or add {' or '.join(readers)}"
        if "mamba2" in self.mixers:
            if inner % self.head_dim:
                near = _nearest(inner, self.head_dim)
                yield "head_dim", f"given {self.head_dim}; it must divide expand * hidden_size, {inner}: {near}"
            elif (heads := inner // self.head_dim) % self.num_groups:
                near = _nearest(heads, self.num_groups)
                yield "num_groups", f"given {self.num_groups}; it must divide the {heads} heads: {near}"
        if "s4d" in self.mixers and self.state_size % 2:
            message = f"given {self.state_size}; s4d pairs them to complex numbers: give {self.state_size + 1}"
            yield "state_size", message
        if "stu" in self.mixers and self.num_filters > self.context_length:
            message = f"given {self.num_filters}; a window of {self.context_length} has no more filters than tokens"
            yield "num_filters", message
        if "local" in self.mixers:
            if self.hidden_size % self.num_heads:
                near = _nearest(self.hidden_size, self.num_heads)
                yield "num_heads", f"given {self.num_heads}; it must divide hidden_size {self.hidden_size}: {near}"
            elif self.hidden_size // self.num_heads % 2:
                width = self.hidden_size // self.num_heads
                yield "num_heads", f"a head is {width} wide; rotary positions need an even number"


class SSMConfig(LanguageConfig):
    """A state-space language model trained from scratch: Mamba, Mamba-2, S4D, STU, alone or alternating."""

    family: Literal["ssm"]
    """ssm: a state-space LM from scratch."""
    preset: Literal["mamba-130m", "stu-small"] | None = None
    """Sizes by name (docs/ssm.md); keys given beside it win."""
    ssm: SSMShape = SSMShape()

    @property
    def context_length(self) -> int:
        return self.ssm.context_length

    def spec(self, vocab_size: int) -> SSMSpec:
        shape = self.ssm.model_dump()
        shape["dt_rank"] = shape["dt_rank"] or -(-shape["hidden_size"] // 16)
        return SSMSpec(vocab_size, **shape)


def _nearest(number: int, given: int) -> str:
    """The divisors of a number next to one that is none."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < given], [d for d in divisors if d > given]
    return " or ".join(map(str, [*below[-1:], *above[:1]]))
