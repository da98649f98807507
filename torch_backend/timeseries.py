"""Time-series LM: the PyTorch realisation of TimeSeriesSpec.

Shape suffixes: B rows, L tokens, S series, T samples, P patches a series, p patch_size, d encoder hidden,
N heads, D head_dim, H hidden size of the LM.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_training.backend import Runtime, encoder_chunks
from mlx_training.data.batch import Batch
from mlx_training.spec import EncoderSpec, ProjectorSpec, TimeSeriesSpec
from torch_backend.decoder import Decoder
from torch_backend.frozen import head_weight
from torch_backend.layers import RMSNorm, attention
from torch_backend.pretrained import PretrainedLM, PretrainedModel


class SelfAttention(nn.Module):
    """Bidirectional self-attention with torch.nn.MultiheadAttention's fused parameters."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        d = spec.hidden_size
        self.num_heads = spec.num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d, d))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * d))
        self.out_proj = nn.Linear(d, d)

    def forward(self, x_SPd: Tensor, mask_S11P: Tensor) -> Tensor:
        S, P, d = x_SPd.shape
        qkv = F.linear(x_SPd, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (y.view(S, P, self.num_heads, -1).transpose(1, 2) for y in qkv.chunk(3, dim=-1))
        return self.out_proj(attention(q, k, v, mask_S11P).transpose(1, 2).reshape(S, P, d))


class EncoderLayer(nn.Module):
    """Post-norm: norm(x + attention(x)), then norm(x + ffn(x)) (Vaswani et al. 2017)."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        d = spec.hidden_size
        self.self_attn = SelfAttention(spec)
        self.linear1 = nn.Linear(d, spec.ffn_size)
        self.linear2 = nn.Linear(spec.ffn_size, d)
        self.norm1 = nn.LayerNorm(d, eps=1e-5)
        self.norm2 = nn.LayerNorm(d, eps=1e-5)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x_SPd: Tensor, mask_S11P: Tensor) -> Tensor:
        x_SPd = self.norm1(x_SPd + self.dropout(self.self_attn(x_SPd, mask_S11P)))
        ffn = self.linear2(self.dropout(F.gelu(self.linear1(x_SPd))))
        return self.norm2(x_SPd + self.dropout(ffn))


class PatchEmbedding(nn.Module):
    """Conv1d(1 -> d, kernel = stride = patch, no bias), which is one product a patch; layout (d, 1, p)."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.hidden_size, 1, spec.patch_size))

    def forward(self, series_ST: Tensor) -> Tensor:
        d, _, p = self.weight.shape
        return F.linear(series_ST.view(series_ST.shape[0], -1, p), self.weight.view(d, p))


class Encoder(nn.Module):
    """Series -> patch representations. Padding patches are never attended."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        d = spec.hidden_size
        self.spec = spec
        self.patch_embed = PatchEmbedding(spec)
        self.pos_embed = nn.Parameter(torch.empty(1, spec.max_patches, d))
        if spec.max_series:
            self.series_embed = nn.Parameter(torch.empty(spec.max_series, d))
        if spec.numeric_scale:
            self.scale_in = nn.Linear(2, d)
            self.scale_out = nn.Linear(d, d)
        self.input_norm = nn.LayerNorm(d, eps=1e-5)
        self.dropout = nn.Dropout(spec.dropout)
        self.layers = nn.ModuleList([EncoderLayer(spec) for _ in range(spec.num_layers)])

    def forward(self, series_ST: Tensor, scale_S2: Tensor, num_patches_S: Tensor, place_S: Tensor) -> Tensor:
        x_SPd = self.patch_embed(series_ST)
        P = x_SPd.shape[1]
        x_SPd = x_SPd + self.pos_embed[:, :P]
        if self.spec.max_series:
            x_SPd = x_SPd + self.series_embed[place_S][:, None]
        if self.spec.numeric_scale:
            x_SPd = x_SPd + self.scale_out(F.gelu(self.scale_in(scale_S2)))[:, None]
        x_SPd = self.dropout(self.input_norm(x_SPd))
        real_S11P = (torch.arange(P, device=x_SPd.device) < num_patches_S[:, None])[:, None, None]
        for layer in self.layers:
            x_SPd = layer(x_SPd, real_S11P)
        return x_SPd


class Projector(nn.Module):
    """Patch representations -> embedding space of the LM."""

    def __init__(self, spec: ProjectorSpec, in_size: int, out_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_size, eps=1e-5)
        self.linear = nn.Linear(in_size, out_size)
        self.dropout = nn.Dropout(spec.dropout)
        self.output_norm = RMSNorm(out_size, eps=1e-6) if spec.norm_output else None

    def forward(self, x_SPd: Tensor) -> Tensor:
        y_SPH = self.dropout(F.gelu(self.linear(self.norm(x_SPd))))
        return y_SPH if self.output_norm is None else self.output_norm(y_SPH)


class TimeSeriesLM(PretrainedModel):
    """A frozen LM that reads patches where a row's series stand."""

    def __init__(self, spec: TimeSeriesSpec, lm: PretrainedLM | Decoder, runtime: Runtime) -> None:
        super().__init__(spec, lm, runtime)
        self.encoder = Encoder(spec.encoder)
        self.projector = Projector(spec.projector, spec.encoder.hidden_size, spec.llm.hidden_size)
        self.encoder_chunks = encoder_chunks(runtime)
        self.train_lm_head = spec.train_lm_head
        if self.projector.output_norm is not None:
            nn.init.constant_(self.projector.output_norm.weight, embedding_rms(lm, spec.llm.vocab_size))
        if spec.train_lm_head:
            self.lm_head = nn.Linear(spec.llm.hidden_size, spec.llm.vocab_size, bias=False)
            self.lm_head.weight = nn.Parameter(torch.tensor(head_weight(lm)))

    def inputs(self, batch: Batch) -> Tensor:
        """Token embeddings with projected patches in their places (B, L, H)."""
        x_BLH = super().inputs(batch)
        if batch.series is None:
            return x_BLH
        patches_SPH = self.patches(batch)
        H = patches_SPH.shape[-1]
        table = torch.cat([patches_SPH.new_zeros(1, H), patches_SPH.view(-1, H)])  # row 0: text
        placed_BLH = F.embedding(batch.patch_index, table).to(x_BLH.dtype)
        return torch.where((batch.patch_index > 0)[..., None], placed_BLH, x_BLH)

    def patches(self, batch: Batch) -> Tensor:
        """All series of a batch in the LM's space (S, P, H); where they are many, a chunk of them at a time."""
        S, T = batch.series.shape
        size = self.encoder_chunks.of(S, T // self.encoder.spec.patch_size)
        arrays = (batch.series, batch.scale, batch.num_patches, batch.series_place)
        chunks = zip(*(x.split(size) for x in arrays), strict=True)
        return torch.cat([self.projector(self.encoder(*chunk)) for chunk in chunks])

    @property
    def head_layer(self) -> nn.Module:
        return self.lm_head if self.train_lm_head else super().head_layer

    def head(self, h: Tensor) -> Tensor:
        if self.train_lm_head:
            return self.lm_head(h.float())
        return super().head(h)


def embedding_rms(lm: PretrainedLM | Decoder, vocab_size: int) -> float:
    """Root mean square of the LM's token embeddings; of a large vocabulary the first 4,096."""
    embeddings = lm.embed(torch.arange(min(vocab_size, 4096), device=next(iter(lm.state_dict().values())).device))
    return float(np.sqrt(np.square(embeddings.float().cpu().numpy(), dtype=np.float64).mean()))
