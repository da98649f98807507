"""The speed of light of LoRA in PyTorch: the frozen Llama of loop_torch.py with adapters written out by hand."""
# Shapes: B rows, L tokens, H hidden, N labels of all rows, V vocabulary

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlx_training.data.batch import Batch
from mlx_training.init import initialise
from tools.benchmarks.loop_torch import Llama
from tools.benchmarks.ours import lora_spec, over, prepared_texts
from tools.benchmarks.worker import Run


class Adapted(Llama):
    """y = W x + alpha / r * B A x."""

    def __init__(self, llm: str, rank: int, alpha: int, precision: str) -> None:
        super().__init__(Path(llm), getattr(torch, precision), "cpu")
        table = initialise(lora_spec(Path(llm), rank, alpha), 0)
        self.p = {name: torch.from_numpy(array).requires_grad_() for name, array in table.items()}
        self.scale = alpha / rank

    def project(self, layer: int, name: str, x: Tensor) -> Tensor:
        A, B = (self.p[f"lm.model.layers.{layer}.{name}.lora_{side}.weight"].to(x.dtype) for side in "AB")
        return super().project(layer, name, x) + self.scale * F.linear(F.linear(x, A), B)


def lora(llm: str, texts: dict[str, Any], rank: int, alpha: int, rate: float, precision: str = "float32") -> Run:
    """Steps on ragged texts of which every token counts."""
    lm, stream = Adapted(llm, rank, alpha, precision), prepared_texts(llm, texts)
    table = lm.w["model.embed_tokens.weight"]
    optimizer = torch.optim.AdamW(lm.p.values(), lr=rate, weight_decay=0.0, fused=True)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        h_BLH, _ = lm.run(F.embedding(batch["tokens"].long(), table), [], None)
        h_BKH = h_BLH.gather(1, batch["positions"].long()[..., None].expand(-1, -1, h_BLH.shape[-1]))
        logits_NV = F.linear(h_BKH, table).float().flatten(0, 1)
        losses_N = F.cross_entropy(logits_NV, batch["targets"].flatten().long(), reduction="none")
        return (losses_N * batch["mask"].flatten()).sum() / batch["mask"].sum()

    def take(source: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of({name: torch.from_numpy(array) for name, array in source.arrays().items()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.p.values(), 1.0)
        optimizer.step()
        return loss.detach()

    return over(stream, take)
