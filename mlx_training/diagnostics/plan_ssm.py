"""Arithmetic and memory of state-space models, from sizes alone.

Products are counted, as for the other families. Transforms, scans, convolutions of a few taps and the sum that makes
S4D's kernel are not: they are no products, and the time they take is that of moving their numbers.

**Activations** are a non-negative least-squares fit, for each mixer, to 14 random shapes: of what autograd keeps
(`torch.autograd.graph.saved_tensors_hooks`), and of `mx.get_peak_memory()` (CPU, torch 2.13, MLX 0.32.4). Largest
errors: 4 % for mamba and s4d in torch, 8 to 17 % elsewhere, about 40 % for local attention, which is small. A layer of
mamba makes its states again in the backward pass: they live for one layer at a time.
"""

from mlx_training.spec.ssm import SSMMixer, SSMSpec

FLOAT32 = 4
KEPT: dict[str, dict[SSMMixer, tuple[float, ...]]] = {  # elements, as multiples of `_widths`
    "torch": {
        "mamba": (3.0, 10.1, 0),
        "mamba2": (5.1, 12.0, 2.8, 9.9),
        "s4d": (6.2, 5.0, 2.3, 6.6),
        "stu": (3.2, 2.5),
        "local": (10.5, 0.2),
    },
    "mlx": {
        "mamba": (3.0, 12.1, 0.8),
        "mamba2": (6.8, 14.8, 2.2, 3.5),
        "s4d": (9.2, 8.8, 1.7, 5.7),
        "stu": (4.2, 2.2),
        "local": (7.6, 1.3),
    },
}
KEPT_BY_MLP = {"torch": (2.4, 4.4), "mlx": (0, 3.6)}  # of the model's width, and of its own
SCANNED = {"torch": 9, "mlx": 16}  # copies of the states of one layer of mamba, while its backward pass runs
KEPT_ONCE = 4  # embeddings, final norm, and their gradients


def forward_flops(spec: SSMSpec, rows: int, tokens: int, labels: int) -> int:
    """Operations of one forward pass over `rows` rows of `tokens` tokens with `labels` labels each."""
    H, places = spec.hidden_size, rows * tokens
    products = sum(_layer_flops(spec, spec.mixer(i), rows, tokens) for i in range(spec.num_layers))
    feed_forward = spec.num_layers * 2 * places * 3 * H * (spec.intermediate_size or 0)
    return products + feed_forward + 2 * rows * labels * H * spec.vocab_size


def activation_bytes(spec: SSMSpec, rows: int, tokens: int, backend: str, width: int) -> int:
    """Bytes that are kept for the backward pass; `width` is that of a number in the compute type."""
    places, elements = rows * tokens, 0.0
    for i in range(spec.num_layers):
        mixer = spec.mixer(i)
        sizes = _widths(spec, mixer, rows, tokens)
        elements += sum(c * size for c, size in zip(KEPT[backend][mixer], sizes, strict=True))
        if spec.intermediate_size:
            of_model, own = KEPT_BY_MLP[backend]
            elements += places * (of_model * spec.hidden_size + own * spec.intermediate_size) * width / FLOAT32
    return round(FLOAT32 * (elements + KEPT_ONCE * places * spec.hidden_size))


def scanned_bytes(spec: SSMSpec, rows: int, tokens: int, backend: str) -> int:
    """Bytes of the states that one layer of mamba makes again in its backward pass."""
    states = rows * tokens * spec.inner_size * spec.state_size
    return FLOAT32 * SCANNED[backend] * states if "mamba" in spec.mixers else 0


def _layer_flops(spec: SSMSpec, mixer: SSMMixer, rows: int, tokens: int) -> int:
    H, D, N, places = spec.hidden_size, spec.inner_size, spec.state_size, rows * tokens
    if mixer == "mamba":
        return 2 * places * (3 * H * D + D * (spec.dt_rank + 2 * N) + spec.dt_rank * D + D * N)
    if mixer == "mamba2":
        size, groups = min(spec.chunk_size, tokens), spec.num_groups
        padded = rows * _rounded_up(tokens, size)
        chunks = padded * (size * (groups * N + D) + 2 * D * N)
        return 2 * (places * (3 * H * D + H * (2 * groups * N + spec.num_ssd_heads)) + chunks)
    if mixer == "s4d":
        return 2 * places * (H * H + 3 * H * D)
    if mixer == "stu":
        return 2 * (places * H * H + spec.context_length * 2 * spec.num_filters * H)
    seen = places * tokens if spec.window >= tokens else rows * _rounded_up(tokens, spec.window) * 2 * spec.window
    return 2 * places * 4 * H * H + 4 * seen * H


def _widths(spec: SSMSpec, mixer: SSMMixer, rows: int, tokens: int) -> tuple[int, ...]:
    """What a mixer's memory grows with."""
    H, D, N, places = spec.hidden_size, spec.inner_size, spec.state_size, rows * tokens
    transform = rows * (1 << max(2 * tokens - 2, 1).bit_length()) * H
    sizes: dict[SSMMixer, tuple[int, ...]] = {
        "mamba": (places * H, places * D, places * D * N),
        "mamba2": (
            places * H,
            places * D,
            places * spec.num_ssd_heads * spec.chunk_size,
            places * D * N // spec.chunk_size,
        ),
        "s4d": (places * H, places * D, transform, H * N // 2 * tokens),
        "stu": (places * H, transform),
        "local": (places * H, places * spec.num_heads * 2 * min(spec.window, tokens)),
    }
    return sizes[mixer]


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
