"""The speed of light in PyTorch: the time-series LM's step written out by hand, with the levers that ours has."""
# Shapes: B rows, L tokens, K labels, S series, P patches, H hidden, N heads, D head_dim

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mlx_training.data.batch import Batch
from mlx_training.data.collate import common_prefix
from mlx_training.init import initialise
from tools.benchmarks.ours import RATES, over, prepared, timeseries_spec
from tools.benchmarks.worker import Run

KeysValues = list[tuple[Tensor, Tensor]]


def rotate(x_BNLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_BNLD.chunk(2, dim=-1)
    return x_BNLD * cos + torch.cat([-b, a], dim=-1) * sin


class Llama:
    """A frozen Llama: keys and values of a prefix, or hidden states at labels after one."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: str) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.w = {name: w.to(device, dtype) for name, w in load_file(directory / "model.safetensors").items()}
        D = self.D = self.config["head_dim"]
        frequency = self.config["rope_theta"] ** (-torch.arange(0, D, 2) / D)
        angles_LD = torch.outer(torch.arange(self.config["max_position_embeddings"]), frequency).repeat(1, 2)
        self.cos, self.sin = angles_LD.cos().to(device, dtype), angles_LD.sin().to(device, dtype)

    def project(self, layer: int, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"model.layers.{layer}.{name}.weight"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.w[f"model.{name}.weight"], 1e-5)

    def heads(self, layer: int, name: str, x_BLH: Tensor) -> Tensor:
        return self.project(layer, f"self_attn.{name}", x_BLH).unflatten(-1, (-1, self.D)).transpose(1, 2)

    def run(self, x_BLH: Tensor, past: KeysValues, places_BK: Tensor | None) -> tuple[Tensor, KeysValues]:
        """Hidden states (at `places` of x, if given) and the keys and values of x."""
        B, L, _ = x_BLH.shape
        start, last = past[0][0].shape[2] if past else 0, self.config["num_hidden_layers"] - 1
        place_L, kept = torch.arange(start, start + L, device=x_BLH.device), []
        mask = torch.arange(start + L, device=x_BLH.device) <= place_L[:, None] if past else None
        cos, sin = self.cos[place_L], self.sin[place_L]
        for i in range(last + 1):
            n_BLH = self.norm(x_BLH, f"layers.{i}.input_layernorm")
            k, v = rotate(self.heads(i, "k_proj", n_BLH), cos, sin), self.heads(i, "v_proj", n_BLH)
            kept.append((k, v))
            if past:
                k = torch.cat([past[i][0].expand(B, -1, -1, -1), k], dim=2)
                v = torch.cat([past[i][1].expand(B, -1, -1, -1), v], dim=2)
            if i == last and places_BK is not None:
                at = places_BK[..., None].expand(-1, -1, x_BLH.shape[-1])
                x_BLH, n_BLH = x_BLH.gather(1, at), n_BLH.gather(1, at)
                cos, sin = (t[start + places_BK][:, None] for t in (self.cos, self.sin))
                mask = (torch.arange(start + L, device=x_BLH.device) <= start + places_BK[..., None])[:, None]
            q = rotate(self.heads(i, "q_proj", n_BLH), cos, sin)
            if q.is_cuda and mask is not None:  # grouped heads under a mask have no fused kernel there
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
            x_BLH = x_BLH + self.project(i, "self_attn.o_proj", out.transpose(1, 2).flatten(2))
            n_BLH = self.norm(x_BLH, f"layers.{i}.post_attention_layernorm")
            inner = F.silu(self.project(i, "mlp.gate_proj", n_BLH)) * self.project(i, "mlp.up_proj", n_BLH)
            x_BLH = x_BLH + self.project(i, "mlp.down_proj", inner)
        return self.norm(x_BLH, "norm"), kept


def encode(p: dict[str, Tensor], batch: dict[str, Tensor], num_layers: int = 6, num_heads: int = 8) -> Tensor:
    """Series (S, T) -> patches in the LM's space (S, P, H)."""

    def linear(x: Tensor, name: str, dot: str = ".") -> Tensor:
        return F.linear(x, p[f"{name}{dot}weight"], p[f"{name}{dot}bias"])

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    d, _, size = p["encoder.patch_embed.weight"].shape
    x = F.linear(batch["series"].unflatten(1, (-1, size)), p["encoder.patch_embed.weight"].view(d, size))
    S, P, _ = x.shape
    x = layer_norm(x + p["encoder.pos_embed"][:, :P], "encoder.input_norm")
    mask = (torch.arange(P, device=x.device) < batch["num_patches"][:, None])[:, None, None]
    for i in range(num_layers):
        at = f"encoder.layers.{i}"
        q, k, v = linear(x, f"{at}.self_attn.in_proj", "_").view(S, P, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = layer_norm(x + linear(out, f"{at}.self_attn.out_proj"), f"{at}.norm1")
        x = layer_norm(x + linear(F.gelu(linear(x, f"{at}.linear1")), f"{at}.linear2"), f"{at}.norm2")
    return F.gelu(linear(layer_norm(x, "projector.norm"), "projector.linear"))


def timeseries(llm: str, rows: dict[str, Any], precision: str = "float32", device: str = "cpu", **options: Any) -> Run:
    """Steps of the time-series LM; `compile` in the options compiles the loss, as one does on CUDA."""
    lm, compiles = Llama(Path(llm), getattr(torch, precision), device), options.pop("compile", False)
    p = {name: torch.from_numpy(w).to(device) for name, w in initialise(timeseries_spec(Path(llm)), 0).items()}
    own = {part: [w.requires_grad_() for n, w in p.items() if n.startswith(part)] for part in RATES}
    groups = [{"params": own[part], "lr": rate} for part, rate in RATES.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2, fused=True)
    stream, table = prepared(llm, rows, **options), lm.w["model.embed_tokens.weight"]
    kept: dict[bytes, KeysValues] = {}

    @torch.no_grad()
    def keys_values(tokens: np.ndarray, past: KeysValues) -> KeysValues:
        ids = torch.from_numpy(tokens).long().to(device)
        new = lm.run(F.embedding(ids, table), past, ids.new_zeros((len(ids), 1)))[1]
        old = [tuple(x.expand(len(ids), -1, -1, -1) for x in layer) for layer in past]
        return [(torch.cat([k, nk], 2), torch.cat([v, nv], 2)) for (k, v), (nk, nv) in zip(old, new)] if past else new

    def read(tokens: np.ndarray) -> KeysValues:
        common = common_prefix(tokens)
        if common and tokens[0, :common].tobytes() not in kept:
            kept[tokens[0, :common].tobytes()] = keys_values(tokens[:1, :common], [])
        past = kept[tokens[0, :common].tobytes()] if common else []
        return past if common == tokens.shape[1] else keys_values(tokens[:, common:], past)

    def loss_of(batch: dict[str, Tensor], past: KeysValues, prefix: int) -> Tensor:
        index, x = batch["patch_index"][:, prefix:, None].long(), F.embedding(batch["tokens"][:, prefix:].long(), table)
        placed = F.embedding((index[..., 0] - 1).clamp(min=0), encode(p, batch).flatten(0, 1)).to(x.dtype)
        h, _ = lm.run(torch.where(index > 0, placed, x), past, (batch["positions"].long() - prefix).clamp(min=0))
        logits, targets = F.linear(h, table).float().flatten(0, 1), batch["targets"].flatten().long()
        losses = F.cross_entropy(logits, targets, reduction="none")
        return (losses * batch["mask"].flatten()).sum() / batch["mask"].sum()

    compiled = torch.compile(loss_of, dynamic=False) if compiles else loss_of

    def take(source: Batch) -> Tensor:
        batch = {name: torch.from_numpy(array).to(device) for name, array in source.arrays().items()}
        optimizer.zero_grad()
        loss = compiled(batch, read(source.tokens[:, : source.prefix]) if source.prefix else [], source.prefix)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        return loss.detach()

    return over(stream, take)
