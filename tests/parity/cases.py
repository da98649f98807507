"""The models and batches of the parity suite: small, ragged, float32."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training import backend as backends
from mlx_training.backend import Arrays, Backend, Optim, Runtime
from mlx_training.data.batch import Batch
from mlx_training.data.collate import collate
from mlx_training.data.masking import Masking
from mlx_training.data.prompt import Encoded
from mlx_training.init import initialise
from mlx_training.pretrained import find_linears
from mlx_training.schedule import Schedule
from mlx_training.spec import (
    AdapterSpec,
    DecoderSpec,
    EncoderSpec,
    ExpertsSpec,
    FixedPattern,
    FrozenLM,
    KgramSpec,
    PretrainedSpec,
    ProjectorSpec,
    RecurrentSpec,
    RopeScaling,
    Spec,
    SSMSpec,
    TimeSeriesSpec,
)
from tests.parity.decoder_bases import GPT, VOCAB, adapters_on_decoders

ENCODER = EncoderSpec(patch_size=4, hidden_size=16, num_layers=2, num_heads=2, ffn_size=24, max_patches=12)
OPTIM = Optim(weight_decay=0.01, grad_clip_norm=1.0)


def specs(directory: Path) -> dict[str, Spec]:
    """One spec a case; `directory` holds a 4-bit Llama (vocabulary 96, hidden 64)."""
    llm = FrozenLM(directory, 64, VOCAB)
    published = TimeSeriesSpec(llm, ENCODER)
    scaled = EncoderSpec(**(vars(ENCODER) | {"numeric_scale": True, "max_series": 2}))
    ours = TimeSeriesSpec(llm, scaled, ProjectorSpec(norm_output=True), train_lm_head=True)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "head_dim": 8}
    one: dict[str, Any] = {"hidden_size": 16, "num_layers": 1}
    bottleneck = small | {"head_dim": 4}
    rope = RopeScaling(8.0, 1.0, 4.0, original_context_length=16)
    resident = FrozenLM(directory, 64, VOCAB, weights="resident")
    lora = AdapterSpec(_linears(directory, "q_proj", "v_proj"), rank=4, alpha=6.0)
    dora = AdapterSpec(_linears(directory, "layers.2.mlp.up_proj", "down_proj"), rank=3, alpha=24.0, dora=True)
    return {
        "timeseries-published": published,
        "timeseries-ours": ours,
        "timeseries-resident": TimeSeriesSpec(resident, scaled, ProjectorSpec(norm_output=True)),
        "timeseries-lora": TimeSeriesSpec(llm, ENCODER, adapter=lora),
        "timeseries-lora-resident": TimeSeriesSpec(resident, ENCODER, adapter=lora),
        "pretrained-dora": PretrainedSpec(resident, adapter=dora),
        **adapters_on_decoders(directory),
        "decoder-gqa-rope-scaling": DecoderSpec(VOCAB, num_kv_heads=2, rope_scaling=rope, init_std=0.06, **small),
        "decoder-untied": DecoderSpec(VOCAB, tie_word_embeddings=False, norm_eps=1e-3, **small),
        "decoder-gpt": DecoderSpec(VOCAB, context_length=24, init_std=0.06, position_init_std=0.1, **GPT, **bottleneck),
        "decoder-post-norm-alibi": DecoderSpec(
            VOCAB, norm_position="post", activation="relu2", positions="alibi", qk_norm=True, num_kv_heads=2, **small
        ),
        "decoder-local-strided-sinks": DecoderSpec(
            VOCAB, mixers=("local", "strided"), window=5, stride=3, num_sinks=2, num_kv_heads=2, **small
        ),
        "decoder-fixed-experts": DecoderSpec(
            VOCAB, mixers=("fixed",), fixed=FixedPattern(2, 8, 2, 2), experts=ExpertsSpec(4, 2, 0.1), **small
        ),
        "decoder-no-positions": DecoderSpec(
            VOCAB, activation="gelu_quick", positions="none", logit_softcap=2.0, mlp_bias=True, init="xavier", **small
        ),
        "decoder-sparsek-sinks": DecoderSpec(
            VOCAB,
            **(small | {"num_layers": 1}),
            mixers=("sparsek",),
            window=4,
            num_selected=2,
            num_sinks=1,
            num_kv_heads=2,
            init_std=0.1,
        ),
        "decoder-unet": DecoderSpec(
            VOCAB,
            **(small | {"num_layers": 3, "widths": (32, 16, 32)}),
            mixers=("causal", "local"),
            window=5,
            num_kv_heads=2,
            qk_norm=True,
            num_sinks=1,
        ),
        "decoder-bidirectional-sinks": DecoderSpec(
            VOCAB, mixers=("bidirectional",), num_sinks=2, num_kv_heads=2, activation="gelu", init_std=0.06, **small
        ),
        "recurrent-lstm": RecurrentSpec(VOCAB, "lstm", embed_size=12, hidden_size=16, num_layers=2),
        "recurrent-gru": RecurrentSpec(
            VOCAB, "gru", embed_size=16, hidden_size=16, tie_word_embeddings=True, init_std=0.5
        ),
        "kgram-onehot": KgramSpec(VOCAB, "onehot", k=3, hidden_size=16, num_layers=2),
        "kgram-embedding": KgramSpec(VOCAB, "embedding", k=2, embed_size=12, hidden_size=16, num_layers=1),
        "kgram-convolution": KgramSpec(VOCAB, "convolution", k=4, embed_size=12, hidden_size=16, num_layers=2),
        "ssm-mamba": SSMSpec(VOCAB, state_size=4, dt_rank=3, **one),
        "ssm-mamba2": SSMSpec(
            VOCAB,
            mixers=("mamba2",),
            state_size=4,
            head_dim=8,
            num_groups=2,
            chunk_size=8,
            tie_word_embeddings=False,
            **one,
        ),
        "ssm-s4d": SSMSpec(VOCAB, mixers=("s4d",), state_size=8, norm="layernorm", **one),
        "ssm-stu-local": SSMSpec(
            VOCAB,
            hidden_size=16,
            num_layers=2,
            mixers=("stu", "local"),
            num_filters=6,
            window=5,
            context_length=12,
            intermediate_size=24,
        ),
    }


def _linears(directory: Path, *targets: str) -> tuple[tuple[str, int, int], ...]:
    """The Linears of these names; none where only families without a frozen LM are asked for."""
    return find_linears(directory, targets) if (directory / "config.json").is_file() else ()


CASES = (
    "timeseries-published",
    "timeseries-ours",
    "timeseries-resident",
    "timeseries-lora",
    "timeseries-lora-resident",
    "pretrained-dora",
    "pretrained-lora-gpt",
    "pretrained-dora-sparse",
    "decoder-gqa-rope-scaling",
    "decoder-untied",
    "decoder-gpt",
    "decoder-post-norm-alibi",
    "decoder-no-positions",
    "decoder-local-strided-sinks",
    "decoder-fixed-experts",
    "decoder-sparsek-sinks",
    "decoder-unet",
    "decoder-bidirectional-sinks",
    "recurrent-lstm",
    "recurrent-gru",
    "kgram-onehot",
    "kgram-embedding",
    "kgram-convolution",
    "ssm-mamba",
    "ssm-mamba2",
    "ssm-s4d",
    "ssm-stu-local",
)

MASKED = ("decoder-bidirectional-sinks",)  # these cannot continue a text


def batches(spec: Spec, count: int, seed: int = 0, batch_size: int = 4) -> list[Batch]:
    """Learnable ragged batches: the answer depends on the series (or the text on itself)."""
    rng = np.random.default_rng(seed)
    make = _rows if isinstance(spec, TimeSeriesSpec) else _windows if spec.is_causal else _hidden
    return [make(rng, batch_size) for _ in range(count)]


def _windows(rng: np.random.Generator, batch_size: int) -> Batch:
    start, stride = rng.integers(3, VOCAB, (batch_size, 1)), rng.integers(1, 4, (batch_size, 1))
    tokens = (3 + (start + stride * np.arange(20)) % (VOCAB - 3)).astype(np.int32)
    mask = np.ones((batch_size, 19), np.float32)
    mask[0, 12:] = 0
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, np.array([12, *[19] * (batch_size - 1)], np.int32))


def _hidden(rng: np.random.Generator, batch_size: int) -> Batch:
    """The same texts with tokens hidden; 2 is the mask token."""
    windows = _windows(rng, batch_size)
    masking = Masking(2, (0, 1, 2), VOCAB, 0.2, windows.tokens.shape[1])
    texts = [tokens[:length] for tokens, length in zip(windows.tokens, windows.lengths, strict=True)]
    return masking.collate([masking.row(text, rng) for text in texts], range(batch_size))


def _rows(rng: np.random.Generator, batch_size: int) -> Batch:
    return collate([encoded_row(rng, int(rng.integers(1, 3))) for _ in range(batch_size)], range(batch_size))


def encoded_row(rng: np.random.Generator, num_series: int, instruction: Sequence[int] = ()) -> Encoded:
    """A prompt of random words with `num_series` noisy lines; the answer is the direction of the first."""
    direction = int(rng.integers(2))
    tokens, places, series, counts = [1, *instruction], [0] * (1 + len(instruction)), [], []
    for index in range(num_series):
        words = rng.integers(3, VOCAB, rng.integers(1, 6)).tolist()
        patches = int(rng.integers(2, 11))
        slope = (2 * direction - 1) if index == 0 else 0
        values = slope * np.linspace(-1, 1, 4 * patches) + 0.5 * rng.standard_normal(4 * patches)
        series.append(values.astype(np.float32))
        tokens += words + [0] * patches
        places += [0] * len(words) + list(range(1 + sum(counts), 1 + sum(counts) + patches))
        counts.append(patches)
    tokens += (post := rng.integers(3, VOCAB, 3).tolist())
    places += [0] * len(post)
    prompt_length = len(tokens)
    tokens += (answer := [10 + direction, 2] if direction else [10, 12, 2])
    return Encoded(
        tokens=np.array(tokens, np.int32),
        prompt_length=prompt_length,
        series=tuple(series),
        scale=rng.standard_normal((num_series, 2)).astype(np.float32),
        patch_place=np.array(places + [0] * len(answer), np.int32),
        num_patches=tuple(counts),
        patch_size=4,
    )


def realise(name: str, spec: Spec, seed: int = 0) -> tuple[Backend, Any]:
    """The spec on one backend, with the initial values both backends share."""
    backend = backends.get(name, Runtime(device="cpu"))
    model = backend.build(spec)
    backend.load(model, backend.export(model) | initialise(spec, seed) | _moved_adapters(spec))
    return backend, model


def _moved_adapters(spec: Spec) -> Arrays:
    """B away from zero, where A has a gradient."""
    rng = np.random.default_rng(1)
    shapes = {name: p.shape for name, p in spec.params().items() if ".lora_B." in name}
    return {name: (0.05 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def rates(spec: Spec, step: int, total_steps: int, peak: float = 1e-3) -> dict[str, float]:
    """Warm-up over 10 % of the steps, then cosine; every group at its own peak."""
    value = peak * Schedule(warmup=total_steps // 10).factor(step, total_steps)
    return {group: value / (1 + i) for i, group in enumerate(spec.groups)}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def without_zero_gradients(spec: Spec, arrays: Arrays) -> Arrays:
    """Arrays with the parts that have a true gradient of zero set to zero: rounding noise is all they hold."""
    kept = dict(arrays)
    for name, part in spec.zero_gradients().items():
        kept[name] = kept[name].copy()
        kept[name][part] = 0
    return kept
