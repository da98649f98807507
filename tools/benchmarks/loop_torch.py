"""The speed of light in PyTorch: the time-series LM's step written out by hand, with the levers that ours has.

What stands before the series without gradients (and once, where all rows share it), fused attention, the last layer and
the head at labels alone, no gradients of frozen weights, one fused AdamW. Batches are ready before the clock starts.

Shape suffixes: B rows, L tokens, K labels, S series, P patches, H hidden, N heads, D head_dim.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mlx_training.data.batching import Batches
from mlx_training.data.collate import collate, common_prefix
from mlx_training.init import initialise
from tools.benchmarks import material
from tools.benchmarks.ours import LOG_EVERY, RATES, encoder_of, timeseries_spec
from tools.benchmarks.worker import Run

Weights = dict[str, Tensor]
KeysValues = list[tuple[Tensor, Tensor]]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


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

    def heads(self, layer: int, name: str, x_BLH: Tensor) -> Tensor:
        return self.project(layer, f"self_attn.{name}", x_BLH).unflatten(-1, (-1, self.D)).transpose(1, 2)

    def run(self, x_BLH: Tensor, past: KeysValues, places_BK: Tensor | None) -> tuple[Tensor, KeysValues]:
        """Hidden states (at `places` of x, if given) and the keys and values of x."""
        B, L, _ = x_BLH.shape
        start, last = past[0][0].shape[2] if past else 0, self.config["num_hidden_layers"] - 1
        place_L, kept = torch.arange(start, start + L, device=x_BLH.device), []
        mask = torch.arange(start + L, device=x_BLH.device) <= place_L[:, None] if past else None
        for i in range(last + 1):
            n_BLH = norm(x_BLH, self.w[f"model.layers.{i}.input_layernorm.weight"])
            k = rotate(self.heads(i, "k_proj", n_BLH), self.cos[place_L], self.sin[place_L])
            v = self.heads(i, "v_proj", n_BLH)
            kept.append((k, v))
            if past:
                k = torch.cat([past[i][0].expand(B, -1, -1, -1), k], dim=2)
                v = torch.cat([past[i][1].expand(B, -1, -1, -1), v], dim=2)
            cos, sin = self.cos[place_L], self.sin[place_L]
            if i == last and places_BK is not None:
                at = places_BK[..., None].expand(-1, -1, x_BLH.shape[-1])
                x_BLH, n_BLH = x_BLH.gather(1, at), n_BLH.gather(1, at)
                cos, sin = (t[start + places_BK][:, None] for t in (self.cos, self.sin))
                mask = (torch.arange(start + L, device=x_BLH.device) <= start + places_BK[..., None])[:, None]
            q = rotate(self.heads(i, "q_proj", n_BLH), cos, sin)
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
            x_BLH = x_BLH + self.project(i, "self_attn.o_proj", out.transpose(1, 2).flatten(2))
            n_BLH = norm(x_BLH, self.w[f"model.layers.{i}.post_attention_layernorm.weight"])
            inner = F.silu(self.project(i, "mlp.gate_proj", n_BLH)) * self.project(i, "mlp.up_proj", n_BLH)
            x_BLH = x_BLH + self.project(i, "mlp.down_proj", inner)
        return norm(x_BLH, self.w["model.norm.weight"]), kept


def encode(p: Weights, batch: dict[str, Tensor], num_layers: int = 6, num_heads: int = 8) -> Tensor:
    """Series (S, T) -> patches in the LM's space (S, P, H)."""
    d, _, size = p["encoder.patch_embed.weight"].shape
    x = F.linear(batch["series"].unflatten(1, (-1, size)), p["encoder.patch_embed.weight"].view(d, size))
    S, P, _ = x.shape
    x = F.layer_norm(
        x + p["encoder.pos_embed"][:, :P], (d,), p["encoder.input_norm.weight"], p["encoder.input_norm.bias"]
    )
    mask = (torch.arange(P, device=x.device) < batch["num_patches"][:, None])[:, None, None]
    for i in range(num_layers):
        w = {name: p[f"encoder.layers.{i}.{name}"] for name in LAYER}
        qkv = F.linear(x, w["self_attn.in_proj_weight"], w["self_attn.in_proj_bias"])
        q, k, v = qkv.view(S, P, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        out = F.linear(out, w["self_attn.out_proj.weight"], w["self_attn.out_proj.bias"])
        x = F.layer_norm(x + out, (d,), w["norm1.weight"], w["norm1.bias"])
        inner = F.gelu(F.linear(x, w["linear1.weight"], w["linear1.bias"]))
        x = F.layer_norm(
            x + F.linear(inner, w["linear2.weight"], w["linear2.bias"]), (d,), w["norm2.weight"], w["norm2.bias"]
        )
    x = F.layer_norm(x, (d,), p["projector.norm.weight"], p["projector.norm.bias"])
    return F.gelu(F.linear(x, p["projector.linear.weight"], p["projector.linear.bias"]))


LAYER = [f"self_attn.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]
LAYER += [f"{m}.{n}" for m in ("linear1", "linear2", "norm1", "norm2") for n in ("weight", "bias")]


def timeseries(llm: str, rows: dict[str, Any], precision: str = "float32", device: str = "cpu", **options: Any) -> Run:
    """Steps of the time-series LM; `compile` in the options compiles the loss, as one does on CUDA."""
    lm = Llama(Path(llm), getattr(torch, precision), device)
    values = initialise(timeseries_spec(Path(llm)), 0)
    p = {name: torch.from_numpy(w).to(device).requires_grad_() for name, w in values.items()}
    parts = {rate: [w for name, w in p.items() if name.startswith(part)] for part, rate in RATES.items()}
    groups = [{"params": ws, "lr": rate} for rate, ws in parts.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2, fused=True)
    source = Batches(material.rows(**rows), encoder_of(Path(llm)).encode, options.get("batch_size", 4), 0, collate)
    numbers = [0] if options.get("fixed") else range(64)
    ready = [(b.prefix, b.tokens, {n: torch.from_numpy(a).to(device) for n, a in b.arrays().items()})
             for b in map(source.batch, numbers)]  # fmt: skip
    stream, table, kept = itertools.cycle(ready), lm.w["model.embed_tokens.weight"], dict[bytes, KeysValues]()

    @torch.no_grad()
    def read(prefix: int, tokens: np.ndarray, ids: Tensor) -> KeysValues:
        if not prefix or common_prefix(tokens[:, :prefix]) < prefix:
            return (
                lm.run(F.embedding(ids[:, :prefix].long(), table), [], ids.new_zeros((len(ids), 1)).long())[1]
                if prefix
                else []
            )
        key = tokens[0, :prefix].tobytes()
        if key not in kept:
            kept[key] = lm.run(F.embedding(ids[:1, :prefix].long(), table), [], ids.new_zeros((1, 1)).long())[1]
        return kept[key]

    def loss_of(batch: dict[str, Tensor], past: KeysValues, prefix: int) -> Tensor:
        patches = encode(p, batch).flatten(0, 1)
        index = batch["patch_index"][:, prefix:, None].long()
        x = F.embedding(batch["tokens"][:, prefix:].long(), table)
        placed = F.embedding((index[..., 0] - 1).clamp(min=0), patches).to(x.dtype)
        h, _ = lm.run(torch.where(index > 0, placed, x), past, (batch["positions"].long() - prefix).clamp(min=0))
        logits = F.linear(h, table).float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten().long(), reduction="none")
        return (losses * batch["mask"].flatten()).sum() / batch["mask"].sum()

    compiled = torch.compile(loss_of, dynamic=False) if options.get("compile") else loss_of

    def run(steps: int) -> dict[str, float]:
        tokens, last = 0, 0.0
        for i in range(1, steps + 1):
            prefix, ids, batch = next(stream)
            optimizer.zero_grad()
            loss = compiled(batch, read(prefix, ids, batch["tokens"]), prefix)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
            optimizer.step()
            tokens += int(batch["lengths"].sum())
            if i % LOG_EVERY == 0 or i == steps:
                last = loss.item()
        return {"tokens": tokens / steps, "loss": last}

    return run
