"""The least that reading prompts takes: products, attention and activations of an LM's layers, nothing between them."""

from functools import partial
from typing import Any

from mlx_training.data.batching import eval_batches
from mlx_training.data.collate import collate_prompts
from tools.benchmarks.ours import questions
from tools.benchmarks.worker import Run


def kernels(run: str, batch_size: int, backend: str = "torch") -> Run:
    """Of the batches in which `ours:evaluation` reads a run's test split; the encoder is left out."""
    loaded, rows = questions(run, backend)
    batches = [*eval_batches(rows, loaded.data.encode_prompt, batch_size, collate_prompts)]
    reads = partial(READERS[backend], loaded.model.lm)

    def take(steps: int) -> dict[str, float]:
        for _ in range(steps):
            for batch in batches:
                reads(loaded.backend.to_device(batch).tokens)  # type: ignore[attr-defined]  # both have it
        return {}

    return take


def _torch(lm: Any, tokens_BL: Any) -> None:
    import torch
    import torch.nn.functional as F

    from torch_backend.layers import attention

    with torch.no_grad():
        x = lm.embed(tokens_BL)
        for layer in lm.model.layers:
            mixer, mlp = layer.self_attn, layer.mlp
            k, v = (
                project(x).unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2)
                for project in (mixer.k_proj, mixer.v_proj)
            )
            if layer is lm.model.layers[-1]:
                return  # the rest of the last layer is computed at one place a row
            q = mixer.q_proj(x).unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2)
            mixer.o_proj(attention(q, k, v, "causal", mixer.scale).transpose(1, 2).flatten(2))
            F.silu(mlp.gate_proj(x))
            mlp.down_proj(mlp.up_proj(x))


def _mlx(lm: Any, tokens_BL: Any) -> None:
    import mlx.core as mx

    from mlx_training.mlx_backend.layers import attention

    x = lm.embed(tokens_BL)
    for layer in lm.model.layers:
        mixer, mlp = layer.self_attn, layer.mlp
        heads = (
            (mixer.q_proj, mixer.num_heads),
            (mixer.k_proj, mixer.num_kv_heads),
            (mixer.v_proj, mixer.num_kv_heads),
        )
        q, k, v = (project(x).reshape(*x.shape[:2], number, -1).swapaxes(1, 2) for project, number in heads)
        if layer is lm.model.layers[-1]:
            mx.eval(k, v)
            return
        out = mixer.o_proj(attention(q, k, v, "causal", mixer.scale).swapaxes(1, 2).flatten(2))
        mx.eval(out, mx.sigmoid(mlp.gate_proj(x)), mlp.down_proj(mlp.up_proj(x)))


READERS = {"torch": _torch, "mlx": _mlx}
