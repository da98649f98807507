"""Pretraining a GPT in PyTorch as one would by hand: fused projections, flash attention, fused AdamW, random windows.

The shape is GPT's: pre-LayerNorm, GELU, learned positions, biases, a head of its own. No dropout.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.benchmarks.ours import LOG_EVERY, decoder_spec
from tools.benchmarks.worker import Run


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tokens (B, L) and targets -> mean cross-entropy."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def decoder(preset: str, tokens: str, vocab: int, batch_size: int, device: str = "cpu") -> Run:
    """Steps on random windows of a stream of tokens (an .npy file)."""
    spec, data = decoder_spec(preset, vocab), torch.from_numpy(np.load(tokens).astype(np.int64))
    length = spec.context_length
    model = GPT(vocab, spec.hidden_size, spec.num_layers, spec.num_heads, length).to(device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups: Any = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)

    def run(steps: int) -> dict[str, float]:
        last = 0.0
        for i in range(1, steps + 1):
            starts = torch.randint(len(data) - length - 1, (batch_size,), generator=generator).tolist()
            x = torch.stack([data[s : s + length] for s in starts]).to(device)
            y = torch.stack([data[s + 1 : s + length + 1] for s in starts]).to(device)
            optimizer.zero_grad()
            loss = model(x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if i % LOG_EVERY == 0 or i == steps:
                last = loss.item()
        return {"tokens": batch_size * length, "loss": last}

    return run
