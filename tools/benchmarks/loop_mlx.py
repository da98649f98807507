"""The speed of light in MLX: the same step as loop_torch.py, by hand with the same levers, compiled whole."""
# Shapes: B rows, L tokens, K labels, S series, P patches, H hidden, N heads, D head_dim

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_training.blas import load_fast_blas

load_fast_blas()  # before MLX, as the product does
import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402

from mlx_training.data.batch import Batch  # noqa: E402
from mlx_training.data.collate import common_prefix  # noqa: E402
from mlx_training.init import initialise  # noqa: E402
from tools.benchmarks.ours import RATES, over, prepared, timeseries_spec  # noqa: E402
from tools.benchmarks.worker import Run  # noqa: E402


class Llama:
    """A frozen Llama: keys and values of a prefix (2, layers, B, N, L, D), or hidden states at labels after one."""

    def __init__(self, directory: Path, dtype: mx.Dtype = mx.float32) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.w = {name: w.astype(dtype) for name, w in mx.load(str(directory / "model.safetensors")).items()}
        self.D = self.config["head_dim"]

    def project(self, layer: int, name: str, x: mx.array) -> mx.array:
        return x @ self.w[f"model.layers.{layer}.{name}.weight"].T

    def heads(self, layer: int, name: str, x_BLH: mx.array) -> mx.array:
        y = self.project(layer, f"self_attn.{name}", x_BLH)
        return y.reshape(*y.shape[:2], -1, self.D).transpose(0, 2, 1, 3)

    def rope(self, x: mx.array, offset: Any) -> mx.array:
        return mx.fast.rope(x, self.D, traditional=False, base=self.config["rope_theta"], scale=1.0, offset=offset)

    def run(self, x_BLH: mx.array, past: mx.array | None, places_BK: mx.array | None) -> tuple[mx.array, mx.array]:
        """Hidden states (at `places` of x, if given) and the keys and values of x."""
        B, L, _ = x_BLH.shape
        start, last, kept = 0 if past is None else past.shape[-2], self.config["num_hidden_layers"] - 1, []
        mask: Any = "causal"
        for i in range(last + 1):
            at = f"model.layers.{i}"
            n_BLH = mx.fast.rms_norm(x_BLH, self.w[f"{at}.input_layernorm.weight"], 1e-5)
            k, v = self.rope(self.heads(i, "k_proj", n_BLH), start), self.heads(i, "v_proj", n_BLH)
            kept.append(mx.stack([k, v]))
            if past is not None:
                before = mx.broadcast_to(past[:, i], (2, B, *past.shape[3:]))
                k, v = mx.concatenate([before[0], k], axis=2), mx.concatenate([before[1], v], axis=2)
            offset: Any = start
            if i == last and places_BK is not None:
                x_BLH, n_BLH = (mx.take_along_axis(x, places_BK[..., None], axis=1) for x in (x_BLH, n_BLH))
                mask = (mx.arange(start + L) <= start + places_BK[..., None])[:, None]
                offset = start + places_BK[:, 0]  # places follow each other
            q = self.rope(self.heads(i, "q_proj", n_BLH), offset)
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.D**-0.5, mask=mask)
            x_BLH = x_BLH + self.project(i, "self_attn.o_proj", out.transpose(0, 2, 1, 3).flatten(2))
            n_BLH = mx.fast.rms_norm(x_BLH, self.w[f"{at}.post_attention_layernorm.weight"], 1e-5)
            gate, up = (self.project(i, f"mlp.{name}_proj", n_BLH) for name in ("gate", "up"))
            x_BLH = x_BLH + self.project(i, "mlp.down_proj", nn.silu(gate) * up)
        return mx.fast.rms_norm(x_BLH, self.w["model.norm.weight"], 1e-5), mx.stack(kept, axis=1)


def encode(p: dict[str, mx.array], batch: dict[str, mx.array], num_layers: int = 6, num_heads: int = 8) -> mx.array:
    """Series (S, T) -> patches in the LM's space (S, P, H)."""

    def linear(x: mx.array, name: str, dot: str = ".") -> mx.array:
        return mx.addmm(p[f"{name}{dot}bias"], x, p[f"{name}{dot}weight"].T)

    def norm(x: mx.array, name: str) -> mx.array:
        return mx.fast.layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    S, (d, _, size) = batch["series"].shape[0], p["encoder.patch_embed.weight"].shape
    x = batch["series"].reshape(S, -1, size) @ p["encoder.patch_embed.weight"].reshape(d, size).T
    P = x.shape[1]
    x = norm(x + p["encoder.pos_embed"][:, :P], "encoder.input_norm")
    mask = (mx.arange(P) < batch["num_patches"][:, None])[:, None, None]
    for i in range(num_layers):
        at = f"encoder.layers.{i}"
        qkv = linear(x, f"{at}.self_attn.in_proj", "_")
        q, k, v = qkv.reshape(S, P, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        out = linear(out.transpose(0, 2, 1, 3).reshape(S, P, d), f"{at}.self_attn.out_proj")
        x = norm(x + out, f"{at}.norm1")
        x = norm(x + linear(nn.gelu(linear(x, f"{at}.linear1")), f"{at}.linear2"), f"{at}.norm2")
    return nn.gelu(linear(norm(x, "projector.norm"), "projector.linear"))


def adamw(p: Any, gradients: Any, state: Any, taken: mx.array, rate_of: Callable[[str], float], decay: float) -> Any:
    norm, taken = mx.sqrt(sum(g.square().sum() for g in gradients.values())), taken + 1
    new, moments, factor = {}, {}, mx.minimum(1.0 / (norm + 1e-6), 1.0)
    for name, w in p.items():
        rate, g, (m, v) = rate_of(name), gradients[name] * factor, state[name]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        update = (m / (1 - 0.9**taken)) / (mx.sqrt(v / (1 - 0.999**taken)) + 1e-8)
        new[name], moments[name] = w * (1 - rate * decay) - rate * update, (m, v)
    return new, moments, taken


def timeseries(llm: str, rows: dict[str, Any], precision: str = "float32", **options: Any) -> Run:
    """Steps of the time-series LM."""
    lm, kept = Llama(Path(llm), getattr(mx, precision)), dict[bytes, mx.array]()
    table, stream, taken = lm.w["model.embed_tokens.weight"], prepared(llm, rows, **options), mx.array(0.0)
    p = {name: mx.array(w) for name, w in initialise(timeseries_spec(Path(llm)), 0).items()}
    state = {name: (mx.zeros_like(w), mx.zeros_like(w)) for name, w in p.items()}

    def keys_values(tokens: np.ndarray, past: mx.array | None) -> mx.array:
        new = lm.run(table[mx.array(tokens)], past, mx.zeros((len(tokens), 1), mx.int32))[1]
        old = [] if past is None else [mx.broadcast_to(past, (*past.shape[:2], len(tokens), *past.shape[3:]))]
        return mx.concatenate([*old, new], axis=-2)

    def read(tokens: np.ndarray) -> mx.array | None:
        common = common_prefix(tokens)
        if common and tokens[0, :common].tobytes() not in kept:
            kept[tokens[0, :common].tobytes()] = keys_values(tokens[:1, :common], None)
        past = kept[tokens[0, :common].tobytes()] if common else None
        return past if common == tokens.shape[1] else keys_values(tokens[:, common:], past)

    def loss_of(p: dict[str, mx.array], batch: dict[str, mx.array], past: mx.array | None) -> mx.array:
        prefix = 0 if past is None else past.shape[-2]
        patches = encode(p, batch).reshape(-1, table.shape[1]).astype(table.dtype)
        index = batch["patch_index"][:, prefix:]
        x = mx.where((index > 0)[..., None], patches[mx.maximum(index - 1, 0)], table[batch["tokens"][:, prefix:]])
        logits = lm.run(x, past, mx.maximum(batch["positions"] - prefix, 0))[0] @ table.T
        losses = nn.losses.cross_entropy(logits.astype(mx.float32), batch["targets"])
        return (losses * batch["mask"]).sum() / batch["mask"].sum()

    @mx.compile
    def step(p: Any, state: Any, taken: mx.array, batch: Any, past: mx.array | None) -> Any:
        loss, gradients = mx.value_and_grad(loss_of)(p, batch, past)
        return *adamw(p, gradients, state, taken, lambda name: RATES[name.split(".")[0]], 1e-2), loss

    def take(source: Batch) -> mx.array:
        nonlocal p, state, taken
        batch = {name: mx.array(array) for name, array in source.arrays().items()}
        past = read(source.tokens[:, : source.prefix]) if source.prefix else None
        p, state, taken, loss = step(p, state, taken, batch, past)
        mx.async_eval(p, state, taken, loss)
        return loss

    return over(stream, take)
