"""TimeSeriesSpec: an encoder and projector (soft prompt) in front of a frozen language model.

Source: OpenTSLM "SoftPrompt" (StanfordBDHG/OpenTSLM). Conv1d patches + learned positions -> LayerNorm ->
post-norm Transformer encoder (exact GELU, no final norm) -> LayerNorm -> Linear -> GELU -> the LM's embedding space.
Ours adds two things that the published layout leaves off: the scale of each series as numbers, and a projector
output normalised to the size of the LM's own embeddings.
"""

from dataclasses import dataclass, field

from mlx_training.spec.param import Param, layer_norm, linear
from mlx_training.spec.pretrained import PretrainedSpec


@dataclass(frozen=True)
class EncoderSpec:
    """Time-series encoder. The defaults are the published sizes: 2,110,976 parameters."""

    patch_size: int = 4
    hidden_size: int = 128
    num_layers: int = 6
    num_heads: int = 8
    ffn_size: int = 1024
    max_patches: int = 1024
    pos_init_std: float = 1.0  # of the learned positions; smaller did better on HAR (docs/experiments.md)
    max_series: int = 0  # learned embedding of a series' place in its row (which axis, which lead); 0: none
    dropout: float = 0.0
    numeric_scale: bool = False  # mean and log std of the raw series enter as numbers, through an MLP

    def params(self) -> dict[str, Param]:
        """Names as in torch.nn.TransformerEncoderLayer; initialised as PyTorch does."""
        d, group = self.hidden_size, "encoder"
        # (out, in = 1, kernel); fan-in is the patch
        table = {
            "encoder.patch_embed.weight": Param((d, 1, self.patch_size), "uniform", self.patch_size**-0.5, True, group),
            "encoder.pos_embed": Param((1, self.max_patches, d), "normal", self.pos_init_std, False, group),
        }
        if self.max_series:
            shape = (self.max_series, d)
            table["encoder.series_embed"] = Param(shape, "normal", self.pos_init_std, False, group)
        if self.numeric_scale:
            table |= linear("encoder.scale_in", d, 2, group=group, hidden=False)
            table |= linear("encoder.scale_out", d, d, group=group)
        table |= layer_norm("encoder.input_norm", d, group=group)
        xavier = (6 / (d + 3 * d)) ** 0.5  # nn.MultiheadAttention: xavier_uniform_ over the fused (3d, d)
        for i in range(self.num_layers):
            layer = f"encoder.layers.{i}"
            table[f"{layer}.self_attn.in_proj_weight"] = Param((3 * d, d), "uniform", xavier, True, group, True)
            table[f"{layer}.self_attn.in_proj_bias"] = Param((3 * d,), "zeros", 0.0, False, group)
            table[f"{layer}.self_attn.out_proj.weight"] = Param((d, d), "uniform", d**-0.5, True, group, True)
            table[f"{layer}.self_attn.out_proj.bias"] = Param((d,), "zeros", 0.0, False, group)
            table |= linear(f"{layer}.linear1", self.ffn_size, d, group=group)
            table |= linear(f"{layer}.linear2", d, self.ffn_size, group=group)
            table |= layer_norm(f"{layer}.norm1", d, group=group)
            table |= layer_norm(f"{layer}.norm2", d, group=group)
        return table


@dataclass(frozen=True)
class ProjectorSpec:
    """Encoder space -> embedding space of the LM: LayerNorm, Linear, GELU."""

    dropout: float = 0.0
    norm_output: bool = False  # RMSNorm at the end, whose weight starts at the RMS of the LM's own embeddings

    def params(self, in_size: int, out_size: int) -> dict[str, Param]:
        """264,448 parameters at 128 -> 2048 without `norm_output`."""
        group = "projector"
        table = dict(layer_norm("projector.norm", in_size, group=group))
        table |= linear("projector.linear", out_size, in_size, group=group)
        if self.norm_output:
            table["projector.output_norm.weight"] = Param((out_size,), "pretrained", 0.0, False, group)
        return table


@dataclass(frozen=True)
class TimeSeriesSpec(PretrainedSpec):
    """Encoder + projector + frozen LM, and optionally adapters of the LM and a trainable copy of its head."""

    encoder: EncoderSpec = field(default_factory=EncoderSpec)
    projector: ProjectorSpec = field(default_factory=ProjectorSpec)
    train_lm_head: bool = False

    def params(self) -> dict[str, Param]:
        """Encoder, projector, the head if it trains (it starts as the LM's own), and adapters."""
        table = self.encoder.params() | self.projector.params(self.encoder.hidden_size, self.llm.hidden_size)
        if self.train_lm_head:
            shape = (self.llm.vocab_size, self.llm.hidden_size)
            table["lm_head.weight"] = Param(shape, "pretrained", 0.0, True, "lm_head")
        return table | super().params()

    def zero_gradients(self) -> dict[str, slice]:
        """The key third of every fused attention bias."""
        d = self.encoder.hidden_size
        return {f"encoder.layers.{i}.self_attn.in_proj_bias": slice(d, 2 * d) for i in range(self.encoder.num_layers)}
