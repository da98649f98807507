"""The speed of light of LoRA in MLX: the frozen Llama of loop_mlx.py with adapters written out by hand."""
# Shapes: B rows, L tokens, H hidden, K labels of a row, V vocabulary

from pathlib import Path
from typing import Any

from mlx_training.data.batch import Batch
from mlx_training.init import initialise
from tools.benchmarks.loop_mlx import Llama, adamw, mx, nn  # MLX after the fast BLAS
from tools.benchmarks.ours import lora_spec, over, prepared_texts
from tools.benchmarks.worker import Run


class Adapted(Llama):
    """y = W x + alpha / r * B A x; the step puts its parameters into `p`."""

    p: dict[str, mx.array]
    scale: float

    def project(self, layer: int, name: str, x: mx.array) -> mx.array:
        A, B = (self.p[f"lm.model.layers.{layer}.{name}.lora_{side}.weight"].astype(x.dtype) for side in "AB")
        return super().project(layer, name, x) + self.scale * ((x @ A.T) @ B.T)


def lora(llm: str, texts: dict[str, Any], rank: int, alpha: int, rate: float, precision: str = "float32") -> Run:
    """Steps on ragged texts of which every token counts."""
    lm, stream, taken = Adapted(Path(llm), getattr(mx, precision)), prepared_texts(llm, texts), mx.array(0.0)
    table, lm.scale = lm.w["model.embed_tokens.weight"], alpha / rank
    p = {name: mx.array(array) for name, array in initialise(lora_spec(Path(llm), rank, alpha), 0).items()}
    state = {name: (mx.zeros_like(w), mx.zeros_like(w)) for name, w in p.items()}

    def loss_of(p: dict[str, mx.array], batch: dict[str, mx.array]) -> mx.array:
        lm.p = p
        h_BLH, _ = lm.run(table[batch["tokens"]], None, None)
        h_BKH = mx.take_along_axis(h_BLH, batch["positions"][..., None], axis=1)
        logits_BKV = (h_BKH @ table.T).astype(mx.float32)
        losses_BK = nn.losses.cross_entropy(logits_BKV, batch["targets"])
        return (losses_BK * batch["mask"]).sum() / batch["mask"].sum()

    @mx.compile
    def step(p: dict[str, mx.array], state: Any, taken: mx.array, batch: dict[str, mx.array]) -> Any:
        loss, gradients = mx.value_and_grad(loss_of)(p, batch)
        return *adamw(p, gradients, state, taken, lambda _: rate, 0.0), loss

    def take(source: Batch) -> mx.array:
        nonlocal p, state, taken
        batch = {name: mx.array(array) for name, array in source.arrays().items()}
        p, state, taken, loss = step(p, state, taken, batch)
        mx.async_eval(p, state, taken, loss)
        return loss

    return over(stream, take)
