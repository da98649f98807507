"""Memory that sparse mixers, sinks and experts of a decoder keep beyond a dense one, from sizes alone.

PyTorch: counted, what autograd keeps (`torch.autograd.graph.saved_tensors_hooks`). MLX: `mx.get_peak_memory()` of a few
shapes (CPU, torch 2.13, MLX 0.32.4), within 15 %; its attention weights are counted in `plan_memory`, by the keys seen.
"""

from mlx_training.diagnostics.flops import LMShape, keys_seen
from mlx_training.spec import DecoderSpec

FFN = {"torch": 4.0, "mlx": 5.2}  # of the feed-forward width, an active expert beyond the first
ROUTED = {"torch": 3.0, "mlx": 4.5}  # of the model's width, an active expert: what goes in and comes out


def extra_elements(spec: DecoderSpec, lm: LMShape, length: int, backend: str) -> float:
    """Elements a place of the text, all layers."""
    elements = 0.0
    if spec.experts:
        active = spec.experts.num_active
        routed = FFN[backend] * (active - 1) * lm.ffn + ROUTED[backend] * active * lm.hidden
        elements += spec.num_layers * routed
    if backend == "torch":
        elements += sum(_attention(spec, lm, layer, length) for layer in range(spec.num_layers))
    return elements


def stack_elements(spec: DecoderSpec) -> int:
    """Parameters of experts: each matrix is updated by itself, so that copies of them do not stand side by side."""
    return sum(p.size for p in spec.params().values() if len(p.shape) == 3 and p.hidden)


def _attention(spec: DecoderSpec, lm: LMShape, layer: int, length: int) -> float:
    """Keys and values of whole blocks, masks as numbers, and with sinks the attention weights."""
    seen, mixer, elements = keys_seen(spec, layer, length), spec.mixer(layer), 0.0
    if mixer == "local" and spec.window < length:
        elements += 2 * lm.key + 2 * spec.window
    elif mixer == "fixed" and spec.fixed.local_context < length:
        elements += 2 * lm.query * (1 + seen / spec.fixed.local_context) - 2 * lm.key + seen
    return elements + (lm.num_heads * seen + 2 * lm.query if spec.num_sinks else 0)
