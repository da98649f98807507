"""Arithmetic of a training step, from sizes alone: what is multiplied forward, and what backward really needs.

A product of (m, k) and (k, n) is 2mkn operations. Attention counts the full square (the usual convention: Chowdhery et
al. 2022, PaLM, appendix B), although a fused kernel may skip the masked half; sparse mixers count the blocks that they
multiply, padding included, and experts those that are active, and their router. Norms, activations and softmax are left
out, as is usual: together below 2 % at real sizes.

Shape suffixes: B rows, L tokens, K labels a row, S series, P patches a series.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from mlx_training.backend import Runtime, head_chunks
from mlx_training.config_schema import Performance
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.plan_ssm import forward_flops
from mlx_training.spec import (
    DecoderSpec,
    EncoderSpec,
    KgramSpec,
    PretrainedSpec,
    RecurrentSpec,
    Spec,
    SSMSpec,
    TimeSeriesSpec,
)


@dataclass(frozen=True)
class BatchShape:
    """Shape of a micro-batch, padding included. `origin`: "data" (its longest batch) or "limits" (of the settings).

    `prefix`: leading places of every row that have no gradient. `last`: places a row at which a frozen language model's
    last layer is computed; 0: all. `chunk`: labels whose logits are made at once, where those of all are not; 0: all.
    """

    rows: int
    tokens: int
    labels: int
    series: int = 0
    patches: int = 0
    origin: str = "data"
    prefix: int = 0
    last: int = 0
    chunk: int = 0

    def to_json(self) -> dict[str, Any]:
        """What `plan --json` shows."""
        return asdict(self)


@dataclass(frozen=True)
class LMShape:
    """Sizes of a Llama-shaped language model; `query` and `key` are the widths of all heads together."""

    hidden: int
    ffn: int
    num_layers: int
    num_heads: int
    query: int
    key: int
    vocab: int
    num_ffn_matrices: int = 3
    num_experts: int = 1
    num_active: int = 1
    seen: Callable[[int], float] = float  # keys a query is multiplied with, by the text's length
    score_width: float = 1.0  # of queries and keys, as a multiple of a head's
    beside: int = 0  # float32 elements a place that a layer's attention keeps beside its queries, keys and values
    resized: int = 0  # the width of the layer before, where a matrix brings it to this one
    layers: tuple["LMShape", ...] = ()  # each one's own sizes, where they differ

    @property
    def each(self) -> tuple["LMShape", ...]:
        """The sizes of every layer."""
        return self.layers or (self,) * self.num_layers

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's matrices."""
        return self._layer_weights(self.num_experts)

    @property
    def weights(self) -> int:
        """Elements of all layers' matrices that a token is multiplied with."""
        return sum(layer._layer_weights(layer.num_active) for layer in self.each)

    def squares(self, length: int) -> int:
        """Operations of attention a place, which grow with the text."""
        return round(sum(2 * (1 + layer.score_width) * layer.query * layer.seen(length) for layer in self.each))

    def _layer_weights(self, num_experts: int) -> int:
        router = self.num_experts if self.num_experts > 1 else 0
        ffn = num_experts * self.num_ffn_matrices * self.ffn + router
        return self.hidden * (2 * self.query + 2 * self.key + ffn + self.resized)


@dataclass(frozen=True)
class PlainShape:
    """Sizes of a language model without attention: `weights` elements of matrices multiply every place."""

    hidden: int
    vocab: int
    weights: int

    def squares(self, length: int) -> int:
        """None."""
        return 0


Shape = LMShape | PlainShape


class Flops(NamedTuple):
    """Floating-point operations of one micro-batch."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Both passes."""
        return self.forward + self.backward


def batch_shape(batch: Batch, patch_size: int = 1) -> BatchShape:
    """The shape of a collated batch."""
    (B, L), K = batch.tokens.shape, batch.targets.shape[1]
    S, T = (0, 0) if batch.series is None else batch.series.shape
    return BatchShape(B, L, K, S, T // patch_size, prefix=batch.prefix)


def spared(shape: BatchShape, spec: Spec, performance: Performance | Runtime) -> BatchShape:
    """The shape with what these settings spare a frozen language model, and the chunks in which it meets the head."""
    is_read_ahead = isinstance(spec, TimeSeriesSpec) and not spec.adapter and performance.frozen_prefix != "off"
    trims = isinstance(spec, PretrainedSpec) and performance.trim_last_layer and shape.labels < shape.tokens
    labels = shape.rows * shape.labels
    size = head_chunks(spec).of(labels) if performance.chunked_head else labels
    return replace(
        shape,
        prefix=shape.prefix if is_read_ahead else 0,
        last=shape.labels if trims else 0,
        chunk=size if size < labels else 0,
    )


def _decoder(spec: DecoderSpec) -> LMShape:
    whole = LMShape(
        spec.hidden_size,
        spec.intermediate_size,
        spec.num_layers,
        spec.num_heads,
        spec.num_heads * spec.head_dim,
        spec.num_kv_heads * spec.head_dim,
        spec.vocab_size,
        3 if spec.activation == "swiglu" else 2,
        spec.experts.num_experts if spec.experts else 1,
        spec.experts.num_active if spec.experts else 1,
        score_width=2.0 if spec.num_sinks and spec.positions == "rope" else 1.0,  # turned and unturned, side by side
    )
    return replace(whole, layers=tuple(_layer(spec, whole, i) for i in range(spec.num_layers)))


def _layer(spec: DecoderSpec, whole: LMShape, number: int) -> LMShape:
    one, before = spec.of_layer(number), spec.of_layer(max(number - 1, 0)).hidden_size
    return replace(
        whole,
        hidden=one.hidden_size,
        ffn=one.intermediate_size,
        num_layers=1,
        seen=partial(keys_seen, one, number),
        query=one.num_heads * one.head_dim,
        key=one.num_kv_heads * one.head_dim,
        beside=_sparsek_elements(one) if spec.mixer(number) == "sparsek" else 0,
        resized=before if before != one.hidden_size else 0,
    )


def _sparsek_elements(spec: DecoderSpec) -> int:
    """What a place of SparseK keeps: its chosen keys and values, and some copies of scores and weights (counted)."""
    chosen = spec.num_kv_heads * spec.num_selected
    return 2 * chosen * spec.head_dim + 12 * chosen + 5 * spec.num_heads * (spec.num_selected + 2 * spec.window)


def keys_seen(spec: DecoderSpec, layer: int, length: int) -> float:
    """Keys that a place of a text is multiplied with in this layer, as both backends do it: in whole blocks."""
    mixer, window, segment = spec.mixer(layer), spec.window, spec.fixed.local_context
    seen = float(length)
    if mixer == "local" and window < length:
        seen = _blocks(length, window) * window * 2 * window / length
    elif mixer == "sparsek":
        seen = float(spec.num_selected + 2 * spec.window)
    elif mixer == "strided":
        seen = spec.stride * _blocks(length, spec.stride) ** 2 / length
    elif mixer == "fixed" and segment < length:
        summaries = spec.fixed.vert_size * spec.fixed.block_size
        blocks = _blocks(length, segment)
        seen = blocks * segment * (blocks * summaries + segment) / length
    return seen + spec.num_sinks


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


def _plain(spec: RecurrentSpec | KgramSpec) -> PlainShape:
    looked_up, head = "embed_tokens.weight", "lm_head.weight"
    matrices = {name: p.size for name, p in spec.params().items() if len(p.shape) == 2}
    return PlainShape(
        spec.hidden_size, spec.vocab_size, sum(size for name, size in matrices.items() if name not in (looked_up, head))
    )


def _ssm(spec: SSMSpec) -> LMShape:
    H = spec.hidden_size
    return LMShape(H, spec.intermediate_size or 0, spec.num_layers, spec.num_heads, H, H, spec.vocab_size)


SHAPES: dict[type[Spec], Callable[[Any], Shape]] = {
    DecoderSpec: _decoder,
    RecurrentSpec: _plain,
    KgramSpec: _plain,
    SSMSpec: _ssm,
}


def lm_shape(spec: Spec, llm_config: Mapping[str, Any] | None = None) -> Shape:
    """The language model of a spec: a family's own sizes, or those of the frozen model's `config.json`."""
    if type(spec) in SHAPES:
        return SHAPES[type(spec)](spec)
    if isinstance(spec, PretrainedSpec) and spec.llm.decoder:
        return _decoder(spec.llm.decoder)
    assert llm_config is not None, "a frozen language model is described by its config.json"
    heads, head_dim = llm_config["num_attention_heads"], llm_config["head_dim"]
    return LMShape(
        llm_config["hidden_size"],
        llm_config["intermediate_size"],
        llm_config["num_hidden_layers"],
        heads,
        heads * head_dim,
        llm_config["num_key_value_heads"] * head_dim,
        llm_config["vocab_size"],
    )


def count_flops(spec: Spec, lm: Shape, batch: BatchShape) -> Flops:
    """Operations of one micro-batch, both passes.

    Backward of a trained product is twice its forward (input and weight). In a frozen LM only the input's half is
    needed, and only where gradients flow: none before the first series, and none at all for a batch without series,
    unless the LM has adapters, whose own products are counted and whose input gradients are needed from the first layer
    on. Attention's two products have no weights, so both halves are always needed. The patch embedding reads data, so
    it has no input gradient. A head that trains is multiplied with once more where logits come in chunks.
    """
    head = batch.rows * batch.labels * 2 * lm.hidden * lm.vocab
    again = head if batch.chunk and trains_head(spec) else 0
    if isinstance(spec, SSMSpec):
        forward = forward_flops(spec, batch.rows, batch.tokens, batch.labels)
        return Flops(forward, 2 * forward + again)
    tokens = batch.rows * batch.tokens
    if not isinstance(spec, PretrainedSpec):
        forward = tokens * (2 * lm.weights + lm.squares(batch.tokens)) + head
        return Flops(forward, 2 * forward + again)
    assert isinstance(lm, LMShape)
    after = batch.rows * (batch.tokens - batch.prefix)
    products, squares = _layers_flops(lm, after, batch.tokens, batch.rows * batch.last or after)
    before = sum(_layers_flops(lm, tokens - after, batch.prefix, 0))
    forward = before + products + squares + head
    adapters = _adapter_flops(spec, tokens)
    whole_head = isinstance(spec, TimeSeriesSpec) and spec.train_lm_head
    head_backward = head * (1 + whole_head) + again
    through_lm = products + 2 * squares + head_backward + 2 * adapters
    forward += adapters
    if not isinstance(spec, TimeSeriesSpec) or not batch.series:
        return Flops(forward, through_lm if spec.adapter else head * whole_head + again)
    patch_embed, trained = _encoder_flops(spec.encoder, lm.hidden, batch)
    return Flops(forward + patch_embed + trained, through_lm + patch_embed + 2 * trained)


def trains_head(spec: Spec) -> bool:
    """Whether anything in the head has a gradient of its own: the matrix, or adapters on it."""
    if not isinstance(spec, PretrainedSpec):
        return True
    adapted = spec.adapter is not None and any(path.endswith("lm_head") for path, *_ in spec.adapter.linears)
    return adapted or (isinstance(spec, TimeSeriesSpec) and spec.train_lm_head)


def _layers_flops(lm: LMShape, places: int, length: int, at_last: int) -> tuple[int, int]:
    """Forward operations of all layers over so many places, each of which sees `length`: products, attention.

    Of the last layer `at_last` places are computed, and keys and values of the others.
    """
    spared, last = places - at_last, lm.each[-1]
    products = places * 2 * lm.weights - spared * 2 * (last.layer_weights - 2 * last.hidden * last.key)
    return products, places * lm.squares(length) - spared * lm.squares(length) // lm.num_layers


def _adapter_flops(spec: PretrainedSpec, tokens: int) -> int:
    """Forward operations of the adapters; of DoRA also the change of every matrix, for its norm."""
    if spec.adapter is None:
        return 0
    rank, linears = spec.adapter.rank, spec.adapter.linears
    low_rank = sum(2 * tokens * rank * (outputs + inputs) for _, outputs, inputs in linears)
    return low_rank + spec.adapter.dora * sum(2 * rank * outputs * inputs for _, outputs, inputs in linears)


def _encoder_flops(encoder: EncoderSpec, lm_hidden: int, batch: BatchShape) -> tuple[int, int]:
    """Forward operations of the patch embedding, and of everything after it up to the LM's embedding space."""
    d, patches = encoder.hidden_size, batch.series * batch.patches
    layer = 2 * (4 * d * d + 2 * d * encoder.ffn_size) + 4 * d * batch.patches
    scale = batch.series * 2 * (2 * d + d * d) if encoder.numeric_scale else 0
    return patches * 2 * encoder.patch_size * d, patches * (encoder.num_layers * layer + 2 * d * lm_hidden) + scale
