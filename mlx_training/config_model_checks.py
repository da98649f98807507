"""Keys of the `model` section that contradict each other."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mlx_training.config_decoder import DecoderConfig, DecoderShape
from mlx_training.config_language import KgramConfig, KgramShape, RecurrentConfig, RecurrentShape
from mlx_training.config_model import ModelConfig
from mlx_training.config_ssm import SSMConfig
from mlx_training.config_timeseries import TimeSeriesConfig
from mlx_training.spec import FixedPattern


class Conflict(NamedTuple):
    """Keys that contradict each other, and what to do about it. Errors cite the first key that was given."""

    keys: tuple[str, ...]
    message: str


def model_conflicts(model: ModelConfig) -> Iterator[Conflict]:
    """Contradictions within the `model` section."""
    if isinstance(model, TimeSeriesConfig):
        encoder = model.encoder
        keys = ("model.encoder.hidden_size", "model.encoder.num_heads")
        yield from _divides(keys, encoder.hidden_size, encoder.num_heads)
        if model.layout == "opentslm" and encoder.numeric_scale:
            keys = ("model.encoder.numeric_scale", "model.layout")
            yield Conflict(keys, "given true; the opentslm layout has no numeric scale, set false or layout: standard")
        if model.train_lm_head and model.lora and "lm_head" in model.lora.targets:
            keys = ("model.lora.targets", "model.train_lm_head")
            yield Conflict(keys, "names lm_head, which trains as a whole already; remove one of them")
    elif isinstance(model, DecoderConfig):
        yield from _decoder_conflicts(model.decoder)
    elif isinstance(model, RecurrentConfig):
        yield from _recurrent_conflicts(model.recurrent)
    elif isinstance(model, KgramConfig):
        yield from _kgram_conflicts(model.kgram)
    elif isinstance(model, SSMConfig):
        for key, message in model.ssm.broken_rules():
            yield Conflict((f"model.ssm.{key}", "model.ssm.mixers", "model.preset"), message)


def _decoder_conflicts(shape: DecoderShape) -> Iterator[Conflict]:
    at = "model.decoder."
    if shape.head_dim is not None and shape.intermediate_dim is not None:
        message = "both say how wide the heads are; keep one of them (null removes a key)"
        yield Conflict((f"{at}intermediate_dim", f"{at}head_dim"), message)
    elif shape.head_dim is None:
        whole = "hidden_size" if shape.intermediate_dim is None else "intermediate_dim"
        yield from _divides((at + whole, f"{at}num_heads"), getattr(shape, whole), shape.num_heads)
    if shape.widths is not None and (conflict := _width_conflict(shape, shape.widths)):
        yield conflict
    yield from _divides((f"{at}num_heads", f"{at}num_kv_heads"), shape.num_heads, shape.num_kv_heads or 1)
    head_dim = shape.head_dim or (shape.intermediate_dim or shape.hidden_size) // shape.num_heads
    if head_dim % 2 and shape.positions == "rope":
        keys = (f"{at}head_dim", f"{at}intermediate_dim", f"{at}hidden_size")
        yield Conflict(keys, f"a head is {head_dim} wide; rotary positions need an even number")
    readers = {"rope_theta": "rope", "rope_scaling": "rope", "position_init_std": "learned"}
    yield from _unread(shape, readers, "positions", (shape.positions,))
    readers = {"window": "local or sparsek", "stride": "strided", "num_selected": "sparsek", "fixed": "fixed"}
    yield from _unread(shape, readers, "mixers", shape.mixers)
    if "sparsek" in shape.mixers and shape.window + shape.num_selected >= shape.context_length:
        yield _nothing_to_select(shape)
    if shape.positions == "alibi" and set(shape.mixers) != {"causal"}:
        message = f"given {', '.join(shape.mixers)}; ALiBi goes with causal only: give [causal], or other positions"
        yield Conflict((f"{at}mixers", f"{at}positions"), message)
    if "fixed" in shape.mixers:
        for key, message in FixedPattern(**shape.fixed.model_dump()).broken_rules(shape.num_heads):
            yield Conflict((f"{at}fixed.{key}", f"{at}fixed", f"{at}mixers"), message)
    if (experts := shape.experts) is not None:
        if experts.num_active > experts.num_experts:
            message = f"given {experts.num_active}; there are only {experts.num_experts} experts"
            yield Conflict((f"{at}experts.num_active", f"{at}experts.num_experts"), message)
        if shape.mlp_bias:
            yield Conflict((f"{at}mlp_bias", f"{at}experts"), "given true; experts have no biases: give false")


def _unread(shape: DecoderShape, readers: dict[str, str], by: str, given: Sequence[str]) -> Iterator[Conflict]:
    """Keys that only another value of the key `by` would read."""
    for key, reader in readers.items():
        if not {*reader.split(" or ")} & {*given} and getattr(shape, key) != DecoderShape.model_fields[key].default:
            message = f"{by}: {', '.join(given)} does not read it; remove it, or give {by}: {reader}"
            yield Conflict((f"model.decoder.{key}", f"model.decoder.{by}"), message)


def _width_conflict(shape: DecoderShape, widths: tuple[int, ...]) -> Conflict | None:
    """The first rule of a U-Net that the widths break, and the nearest list that keeps it."""
    heads, at, given = shape.num_heads, "model.decoder.", f"given {[*widths]}; "
    half = widths[: (len(widths) + 1) // 2]
    mirrored = [*half, *half[len(widths) // 2 - 1 :: -1]]
    unit = 2 * heads if shape.positions == "rope" else heads
    ends = f"it must begin and end with hidden_size {shape.hidden_size}"
    if shape.head_dim is not None or shape.intermediate_dim is not None:
        key = "head_dim" if shape.head_dim is not None else "intermediate_dim"
        message = "given beside widths, which say how wide the heads are (width / num_heads); remove one of them"
        return Conflict((f"{at}{key}", f"{at}widths"), message)
    if len(widths) != shape.num_layers:
        message = f"{given}that is {len(widths)} layers, but num_layers is {shape.num_layers}: make them equal"
        return Conflict((f"{at}widths", f"{at}num_layers"), message)
    if [*widths] != mirrored:
        return Conflict((f"{at}widths",), f"{given}the way up must mirror the way down: {mirrored}")
    if widths[0] != shape.hidden_size:
        inner = [shape.hidden_size, *widths[1:-1], shape.hidden_size]
        return Conflict((f"{at}widths", f"{at}hidden_size"), f"{given}{ends}: {inner}, or give hidden_size={widths[0]}")
    if any(width % unit for width in widths):
        even = f", twice {heads} heads (rotary heads are even)" if unit != heads else ", the heads"
        near = [max(unit, round(width / unit) * unit) for width in widths]
        return Conflict((f"{at}widths", f"{at}num_heads"), f"{given}each must be a multiple of {unit}{even}: {near}")
    return None


def _nothing_to_select(shape: DecoderShape) -> Conflict:
    length, key = shape.context_length, "window" if shape.window >= shape.num_selected else "num_selected"
    other = "num_selected" if key == "window" else "window"
    most = length - getattr(shape, other) - 1
    near = f"at most {most}" if most > 0 else f"at most {length // 2 - 1 or 1}, and {other} at most {length // 2}"
    message = (
        f"given {getattr(shape, key)}; with {other} {getattr(shape, other)} a query of sparsek would see all "
        f"{length} tokens of the context and select nothing: give {near}"
    )
    return Conflict(tuple(f"model.decoder.{name}" for name in (key, other, "mixers", "context_length")), message)


def _recurrent_conflicts(shape: RecurrentShape) -> Iterator[Conflict]:
    if shape.tie_word_embeddings and shape.embed_size not in (None, shape.hidden_size):
        keys = tuple(f"model.recurrent.{key}" for key in ("embed_size", "tie_word_embeddings", "hidden_size"))
        message = f"given {shape.embed_size}; a head that is tied to the embeddings needs them as wide as hidden_size"
        yield Conflict(keys, f"{message}, which is {shape.hidden_size}")


def _kgram_conflicts(shape: KgramShape) -> Iterator[Conflict]:
    if shape.form == "onehot" and shape.embed_size is not None:
        keys = ("model.kgram.embed_size", "model.kgram.form")
        yield Conflict(keys, "form: onehot does not read it; remove it or give form: embedding")
    if shape.k > shape.context_length:
        keys = ("model.kgram.k", "model.kgram.context_length")
        yield Conflict(keys, f"given {shape.k}; a window has context_length {shape.context_length} tokens only")


def _divides(keys: tuple[str, str], whole: int, part: int) -> Iterator[Conflict]:
    if whole % part:
        yield Conflict(keys, f"given {whole}; it must be a multiple of {keys[1].rpartition('.')[2]}, which is {part}")
