"""Memory of a training step, from sizes alone: weights, optimiser, gradients, activations, logits.

**Activations are counted, not guessed.** For PyTorch the coefficients below are what autograd keeps, tensor by tensor
(`torch.autograd.graph.saved_tensors_hooks`), plus what lives beside it at the peak; they are whole numbers because
each is a tensor of that width. For MLX they are a non-negative least-squares fit to `mx.get_peak_memory()` of 45 random
shapes of each family (largest error 2 % for decoders, 5 % behind a frozen LM): the graph's order of evaluation decides
what lives together there, and attention on the CPU keeps its L x L weights. Measured on a CPU with torch 2.13 and
MLX 0.32.4; fused attention on Metal keeps less. Logits exist at label places only, of many
labels in chunks: PyTorch has their log-softmax beside them; MLX reserves about twelve copies ahead and touches three.

**Overhead** is what a process holds beyond its tensors: code and tables that the first step touches, the tokenizer, the
rows, and above all what glibc's heap keeps of freed tensors smaller than 32 MB. PyTorch's CPU allocator goes
through it: `quick_test` with 128 rows a batch peaks at 600 MB above the imports, and at 375 MB under
MALLOC_TRIM_THRESHOLD_=1000000, which gives freed pieces back. Fitted to the resident memory of the shipped
configurations; on a GPU it lies in the process and not on the device. Evaluation (its key/value cache) and
checkpoints are not counted, nor is reading the data (a decoder's text is tokenised before the first step).

**Loading** is uncertain: a mapped weight file counts as resident until the system drops its pages. Behind a 4-bit
Llama-3.2-1B (bfloat16, torch) five runs of the same three steps peaked at 3.3 to 4.0 GB; the plan says 3.6.
"""

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from mlx_training.diagnostics.flops import BatchShape, LMShape, Shape, trains_head
from mlx_training.diagnostics.plan_decoder import extra_elements, stack_elements
from mlx_training.diagnostics.plan_ssm import activation_bytes, scanned_bytes
from mlx_training.optim import Optim
from mlx_training.spec import (
    AdapterSpec,
    DecoderSpec,
    EncoderSpec,
    KgramSpec,
    PretrainedSpec,
    RecurrentSpec,
    Spec,
    SSMSpec,
    TimeSeriesSpec,
)

FLOAT32 = 4


class Kept(NamedTuple):
    """Elements a token (patch) that are alive at the peak, as multiples of the widths."""

    hidden: float = 0
    ffn: float = 0
    query: float = 0
    key: float = 0
    scores: float = 0  # of num_heads * L: attention weights that are materialised
    wide: float = 0  # of `hidden`, in float32 whatever the precision: normalisation


@dataclass(frozen=True)
class Coefficients:
    """What one framework keeps. `layer` is multiplied by the number of layers, `once` is not."""

    layer: dict[bool, Kept]  # by: is the LM frozen?
    once: dict[bool, Kept]
    transient: Kept  # of one layer's backward pass, or of the head's, whichever is larger
    encoder: Kept  # per layer and patch
    logits_kept: int  # copies of the logits
    logits_transient: int
    chunks: int  # copies of the logits of a chunk: those that are under way at the same time
    loading: float  # copies of packed weights while they are read: the mapped file, and pieces of it
    copies: int  # copies of trained parameters while the update runs, beside gradients and moments
    overhead_bytes: float
    overhead_share: dict[bool, float]  # of activations, by the same


COEFFICIENTS = {
    "torch": Coefficients(
        layer={True: Kept(0, 3, 2, 2, 0, 2), False: Kept(4, 4, 3, 2, 0, 2)},
        once={True: Kept(3, wide=1), False: Kept(2, wide=1)},
        transient=Kept(1, 2),
        encoder=Kept(8, 2),
        logits_kept=1,
        logits_transient=2,
        chunks=2,
        loading=1.6,
        copies=0,
        overhead_bytes=80e6,
        overhead_share={True: 0.55, False: 0.25},
    ),
    "mlx": Coefficients(
        layer={True: Kept(2.5, 3.85, 1.6, 0.6, 0.9), False: Kept(5.4, 5.2, 2.2, 1.35, 1.0)},
        once={True: Kept(7.5, 4, 9.6, 9.6, 2.3), False: Kept(16, 2, 8, 8, 2)},
        transient=Kept(),
        encoder=Kept(11, 4, scores=1),
        logits_kept=3,
        logits_transient=0,
        chunks=3,
        loading=0.5,
        copies=3,
        overhead_bytes=45e6,
        overhead_share={True: 0.0, False: 0.0},
    ),
}


class Plain(NamedTuple):
    """What is alive at the peak of a model without attention."""

    layer: float  # elements a token, of each layer's width
    entry: float  # of what enters the first layer
    logits: float  # copies of the logits
    gradients: float  # copies of the parameters beside weights and moments


# PyTorch: counted as above (oneDNN's LSTM allocates twice what it touches), and what lives beside it. MLX: fitted to
# 45 random shapes, errors up to 20 %.
PLAIN = {
    "torch": {
        "lstm": Plain(8, 3, 3, 1),
        "gru": Plain(8, 3, 3, 1),
        "onehot": Plain(2, 2, 3, 1),
        "embedding": Plain(2, 2, 3, 1),
        "convolution": Plain(2, 4, 3, 1),
    },
    "mlx": {
        "lstm": Plain(9.5, 10.8, 2.1, 2),
        "gru": Plain(10.4, 5.2, 2.2, 1.8),
        "onehot": Plain(3.8, 3.4, 3.2, 2.4),
        "embedding": Plain(3.9, 3.9, 2.9, 1.8),
        "convolution": Plain(4.5, 11.2, 3.6, 1),
    },
}


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, above what importing the framework takes."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    overhead: int
    loading: int = 0  # what reading and expanding the frozen weights needs beyond all of that, before the first step

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        """Bytes by name, and their total."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class FrozenBytes:
    """The frozen weights: as they stand in memory, those of them that are stored otherwise, and, when packed weights
    stay packed, the largest matrix while it is expanded for a product."""

    held: int = 0
    converted: int = 0
    expanded: int = 0


def count_memory(
    spec: Spec,
    lm: Shape,
    batch: BatchShape,
    backend: str,
    precision: str,
    weights: FrozenBytes,
    optim: Optim,
    *,
    recompute: bool = False,
) -> Memory:
    """The memory of a step of one micro-batch (accumulation adds none). `recompute`: with gradient checkpointing a
    layer keeps its input alone, but for the one that is being computed again.
    """
    if isinstance(spec, RecurrentSpec | KgramSpec):
        return _plain_memory(spec, lm, batch, backend, precision, optim)
    assert isinstance(lm, LMShape)
    c, trained, frozen = COEFFICIENTS[backend], spec.num_parameters * FLOAT32, isinstance(spec, PretrainedSpec)
    width = 2 if precision == "bfloat16" else 4
    tokens = batch.rows * (batch.tokens - batch.prefix)
    logits = _logits_bytes(spec, lm, batch, backend, c.logits_kept + c.logits_transient)
    passing = logits if batch.chunk else logits - _logits_bytes(spec, lm, batch, backend, c.logits_kept)
    carries_gradient = not isinstance(spec, PretrainedSpec) or bool(batch.series) or spec.adapter is not None
    layers = lm.each if carries_gradient else lm.each[:1]  # without a gradient each layer's tensors go at once
    kept = [_bytes(c.layer[frozen], layer, batch.tokens, width) + FLOAT32 * layer.beside for layer in layers]
    if batch.last:  # its places, and keys and values of all
        everywhere = _bytes(Kept(key=3, wide=1), layers[-1], batch.tokens, width)
        kept[-1] = everywhere + kept[-1] * min(1, batch.rows * batch.last / tokens)
    inputs = sum(width * layer.hidden for layer in layers)
    elements = _bytes(c.once[frozen], lm, batch.tokens, width) + (max(kept) + inputs if recompute else sum(kept))
    transient = max(tokens * _bytes(c.transient, lm, batch.tokens, width) - passing, 0)
    activations = tokens * elements + transient
    activations += batch.rows * batch.prefix * 2 * lm.num_layers * lm.key * width
    if isinstance(spec, TimeSeriesSpec):
        activations += _encoder_bytes(c, spec.encoder, lm.hidden, batch) if batch.series else 0
    elif not frozen and precision == "bfloat16":
        activations += 2 * sum(layer.layer_weights for layer in lm.each)  # matrices cast for every product are kept
    copied, share = trained, c.overhead_share[frozen]
    if isinstance(spec, DecoderSpec):
        activations += tokens * width * extra_elements(spec, lm, batch.tokens, backend)
        copied -= FLOAT32 * stack_elements(spec)
    if isinstance(spec, SSMSpec):
        activations = activation_bytes(spec, batch.rows, batch.tokens, backend, width)
        scanned, share = scanned_bytes(spec, batch.rows, batch.tokens, backend), 0.0
        activations += max(0, scanned - logits) if backend == "torch" else scanned  # there the logits are gone by then
    if isinstance(spec, PretrainedSpec) and spec.adapter:
        activations += _adapter_bytes(spec.adapter, tokens, width)
    step = Memory(
        weights=trained + weights.held,
        optimizer=FLOAT32 * optim.state_size(spec),
        gradients=trained + copied * c.copies,
        activations=round(activations + weights.expanded),
        logits=logits,
        overhead=round(c.overhead_bytes + share * activations),
    )
    loading = weights.held + round(c.loading * weights.converted)
    return replace(step, loading=max(0, loading - step.total))


def _plain_memory(
    spec: RecurrentSpec | KgramSpec, lm: Shape, batch: BatchShape, backend: str, precision: str, optim: Optim
) -> Memory:
    form, entry, width = (
        (spec.cell, spec.embed_size, FLOAT32)  # in every precision
        if isinstance(spec, RecurrentSpec)
        else (spec.form, spec.window_size, 2 if precision == "bfloat16" else FLOAT32)
    )
    kept, c, trained = PLAIN[backend][form], COEFFICIENTS[backend], spec.num_parameters * FLOAT32
    elements = kept.layer * spec.num_layers * spec.hidden_size + kept.entry * entry
    activations = round(width * batch.rows * batch.tokens * elements)
    logits = _logits_bytes(spec, lm, batch, backend, kept.logits)
    gradients = round(kept.gradients * trained)
    state = FLOAT32 * optim.state_size(spec)
    return Memory(trained, state, gradients, activations, logits, round(c.overhead_bytes))


def _logits_bytes(spec: Spec, lm: Shape, batch: BatchShape, backend: str, copies: float) -> int:
    """So many copies of all logits; or those of a chunk, and its part of the gradient of the head's matrix."""
    if not batch.chunk:
        return round(copies * FLOAT32 * batch.rows * batch.labels * lm.vocab)
    matrix = min(spec.num_parameters, lm.vocab * lm.hidden) if trains_head(spec) else 0
    return FLOAT32 * (COEFFICIENTS[backend].chunks * batch.chunk * lm.vocab + matrix)


def _adapter_bytes(adapter: AdapterSpec, tokens: int, width: int) -> int:
    """What adapters keep for their gradients: the input of A and of B; with DoRA also the output and the gain."""
    kept = sum(inputs + adapter.rank + 2 * adapter.dora * outputs for _, outputs, inputs in adapter.linears)
    dense = max(outputs * inputs for _, outputs, inputs in adapter.linears) * FLOAT32 * 2 * adapter.dora
    return tokens * kept * width + dense


def _bytes(kept: Kept, lm: LMShape, length: int, width: int) -> float:
    """Bytes a token."""
    narrow = kept.hidden * lm.hidden + kept.ffn * lm.ffn + kept.query * lm.query + kept.key * lm.key
    return width * (narrow + kept.scores * lm.num_heads * lm.seen(length)) + FLOAT32 * kept.wide * lm.hidden


def _encoder_bytes(c: Coefficients, encoder: EncoderSpec, lm_hidden: int, batch: BatchShape) -> float:
    """Encoder and projector, which are float32 in every precision."""
    e, d = c.encoder, encoder.hidden_size
    layer = e.hidden * d + e.ffn * encoder.ffn_size + e.scores * encoder.num_heads * batch.patches
    rest = 3 * d + 4 * lm_hidden  # input and projector norms; projection, activation, norm, table
    return FLOAT32 * batch.series * batch.patches * (encoder.num_layers * layer + rest)
