"""Our side: the backend's own step on batches of the product's own iterator, read as the trainer reads it."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_training import backend as backends
from mlx_training.assemble import RowData, load_run
from mlx_training.backend import Optim, Runtime
from mlx_training.config_presets import PRESETS
from mlx_training.data.batch import Batch
from mlx_training.data.batching import BatchBy, Batches, eval_batches
from mlx_training.data.collate import collate
from mlx_training.data.packing import PackedDocuments
from mlx_training.data.prompt import PromptEncoder
from mlx_training.data.rows import Row
from mlx_training.data.text import TextBatches, TextWindows
from mlx_training.data.token_cache import TokenStream
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.generate import Generator
from mlx_training.init import initialise
from mlx_training.llm_source import describe_llm
from mlx_training.objectives.lm import lm
from mlx_training.pretrained import find_linears
from mlx_training.sampling import Sampling
from mlx_training.spec import AdapterSpec, DecoderSpec, EncoderSpec, FrozenLM, PretrainedSpec, Spec, TimeSeriesSpec
from tools.benchmarks import material
from tools.benchmarks.worker import Run

LOG_EVERY = 10  # as logging.every_steps: nobody waits for a step's result in between
RATES = {"encoder": 2e-4, "projector": 1e-4}  # as published
OPTIM = Optim(weight_decay=1e-2, grad_clip_norm=1.0)
LORA_OPTIM = Optim(grad_clip_norm=1.0)  # as `training.grad_clip_norm` has it by default, and HF's Trainer
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def over(stream: Iterator[Batch], take: Callable[[Batch], Any]) -> Run:
    """Steps on a stream, of which `take` takes one and gives its loss: tokens a step that count, and the last loss."""

    def run(steps: int) -> dict[str, float]:
        tokens, loss = 0, 0.0
        for i in range(1, steps + 1):
            batch = next(stream)
            last = take(batch)
            tokens += int(batch.lengths.sum())
            if i % LOG_EVERY == 0 or i == steps:
                loss = float(last)
        return {"tokens": tokens / steps, "loss": loss}

    return run


class Training:
    """A model that trains on a stream of batches."""

    def __init__(
        self,
        spec: Spec,
        stream: Iterator[Batch],
        backend: str,
        rates: dict[str, float],
        optim: Optim,
        runtime: Any,
        seed: int = 0,
    ) -> None:
        self.backend, self.rates = backends.get(backend, Runtime(**runtime)), rates
        self.model = self.backend.build(spec)
        self.backend.load(self.model, self.backend.export(self.model) | initialise(spec, seed))
        self.step = self.backend.make_step(self.model, lm, optim, seed=seed)
        self.number = 0
        self.run = over(stream, self.take)

    def __call__(self, steps: int) -> dict[str, float]:
        """Take so many steps."""
        return self.run(steps)

    def take(self, batch: Batch) -> Any:
        """One step; its loss on the device."""
        self.number += 1
        return self.step([batch], step=self.number, lr=self.rates)["loss"]


def timeseries_spec(llm: Path, weights: str = "dequantized") -> TimeSeriesSpec:
    """The published encoder in front of a directory's LM."""
    info = describe_llm(llm)
    return TimeSeriesSpec(FrozenLM(llm, info.hidden_size, info.vocab_size, weights=weights), EncoderSpec())


def encoder_of(llm: Path) -> PromptEncoder:
    """Rows become the very tokens that OpenTSLM makes of them."""
    return PromptEncoder(Tokenizer.load(llm), 4, layout="opentslm")


def prepared(llm: str, rows: dict[str, Any], batch_size: int = 4, fixed: bool = False) -> Iterator[Batch]:
    """The batches that `timeseries` trains on, in its order, all made beforehand; for the loops written by hand."""
    batches = Batches(material.rows(**rows), encoder_of(Path(llm)).encode, batch_size, 0, collate)
    return itertools.cycle([batches.batch(i) for i in range(1 if fixed else 64)])


def timeseries(
    llm: str,
    rows: dict[str, Any],
    backend: str = "torch",
    batch_size: int = 4,
    fixed: bool = False,
    weights: str = "dequantized",
    keeps_rows: bool = True,
    **runtime: Any,
) -> Run:
    """Steps of the time-series LM. `fixed`: one batch for ever, its lengths as equal as can be.

    `keeps_rows`: encoded rows are kept, not made again.
    """
    directory = Path(llm)
    encode = encoder_of(directory).encode
    batches = Batches(material.rows(**rows), encode, batch_size, 0, collate, cache=keeps_rows)
    stream = iter(lambda: batches.batch(0), None) if fixed else batches.prefetch(0)
    runtime = {"device": "cpu"} | runtime
    return Training(timeseries_spec(directory, weights), stream, backend, RATES, OPTIM, runtime)


def decoder(
    preset: str,
    tokens: str,
    vocab: int,
    batch_size: int,
    backend: str = "torch",
    context_length: int = 0,
    documents: bool = False,
    **runtime: Any,
) -> Run:
    """Steps of a decoder trained from scratch, on rows of a stream of tokens (an .npy file); no dropout.

    Rows are windows, or `documents` of 20 to 500 tokens, log-uniform. `context_length`: in place of the preset's.
    """
    import numpy as np

    spec, made = replace(decoder_spec(preset, vocab), dropout=0.0), np.load(tokens)
    spec = replace(spec, context_length=context_length or spec.context_length)
    rows: TextWindows | PackedDocuments = TextWindows(made, spec.context_length)
    if documents:
        lengths = np.exp(np.random.default_rng(0).uniform(np.log(20), np.log(500), 1000)).astype(int)
        whole = TokenStream(made[: lengths.sum()], np.cumsum(lengths) - lengths, 0, 0)
        rows = PackedDocuments(whole, spec.context_length, 0)
    stream = TextBatches(rows, batch_size, 0).prefetch(0)
    optim = Optim(weight_decay=0.1, betas=(0.9, 0.95), grad_clip_norm=1.0)
    return Training(spec, stream, backend, dict.fromkeys(spec.groups, 3e-4), optim, {"device": "cpu"} | runtime)


def decoder_spec(preset: str, vocab: int) -> DecoderSpec:
    """A shipped preset with this vocabulary."""
    keys = {key: tuple(v) if isinstance(v, list) else v for key, v in PRESETS["decoder"][preset]["decoder"].items()}
    build: Any = DecoderSpec
    spec: DecoderSpec = build(vocab_size=vocab, **sizes(keys))
    return spec


def sizes(keys: dict[str, Any]) -> dict[str, Any]:
    """What a preset leaves to the configuration: as many keys as heads, and heads that fill their width."""
    width = keys.get("intermediate_dim", keys["hidden_size"])
    head = {"num_kv_heads": keys["num_heads"], "head_dim": width // keys["num_heads"]}
    return head | {key: value for key, value in keys.items() if key != "intermediate_dim"}


def lora(
    llm: str,
    texts: dict[str, Any],
    rank: int,
    alpha: int,
    rate: float,
    seed: int,
    backend: str = "torch",
    batch_by: BatchBy = "tokens",
    **runtime: Any,
) -> Run:
    """LoRA on texts of which every token counts; `run(1)` is an epoch, with the loss on held-out texts after it."""
    encode = PromptEncoder(Tokenizer.load(Path(llm)), 0).encode
    train, held_out = material.texts(**texts)
    batches = Batches([material.text_row(t) for t in train], encode, 4, seed, collate, batch_by=batch_by)
    spec, runtime = lora_spec(Path(llm), rank, alpha), {"device": "cpu"} | runtime
    training = Training(spec, batches.prefetch(0), backend, {"lora": rate}, LORA_OPTIM, runtime, seed)
    return Epochs(training, batches.num_batches, [material.text_row(t) for t in held_out], encode)


def lora_spec(llm: Path, rank: int, alpha: int) -> PretrainedSpec:
    """A directory's LM with adapters on every Linear of its blocks."""
    info, adapter = describe_llm(llm), AdapterSpec(find_linears(llm, TARGETS), rank, alpha, 0.0, False)
    return PretrainedSpec(FrozenLM(llm, info.hidden_size, info.vocab_size), adapter=adapter)


def prepared_texts(llm: str, texts: dict[str, Any]) -> Iterator[Batch]:
    """The batches of one epoch over and over, made beforehand: few shapes, all of which a warm-up meets."""
    encode, (train, _) = PromptEncoder(Tokenizer.load(Path(llm)), 0).encode, material.texts(**texts)
    batches = Batches([material.text_row(t) for t in train], encode, 4, 0, collate, batch_by="tokens")
    return itertools.cycle([batches.batch(i) for i in range(batches.num_batches)])


def lora_steps(
    llm: str, texts: dict[str, Any], rank: int, alpha: int, rate: float, backend: str, **runtime: Any
) -> Run:
    """Steps of LoRA on batches that were made beforehand."""
    spec, runtime = lora_spec(Path(llm), rank, alpha), {"device": "cpu"} | runtime
    return Training(spec, prepared_texts(llm, texts), backend, {"lora": rate}, LORA_OPTIM, runtime)


def questions(run: str, backend: str) -> tuple[Any, list[Row]]:
    """A run on another backend, and the rows of its test split."""
    loaded = load_run(Path(run), backend, device="cpu")
    assert isinstance(loaded.data, RowData)
    rows = loaded.data.rows("test")
    return loaded, [rows[i] for i in range(len(rows))]


def evaluation(run: str, batch_size: int, backend: str = "torch") -> Run:
    """Answers to the test split of a trained run, as its evaluation asks for them."""
    loaded, rows = questions(run, backend)
    sampling = Sampling(max_new_tokens=loaded.config.evaluation.max_new_tokens)
    generator = Generator(loaded.backend, loaded.model, loaded.data.tokenizer, sampling, batch_size)

    def take(steps: int) -> dict[str, float]:
        for _ in range(steps):
            generator.answers(rows, loaded.data.encode_prompt)
        return {}

    return take


def reasoning(llm: str, rows: dict[str, Any], batch_size: int, new_tokens: int, backend: str = "torch") -> Run:
    """Long answers, as chains of thought are; a random LM never ends by itself."""
    directory, chosen = Path(llm), backends.get(backend, Runtime(device="cpu"))
    spec, asked, encoder = timeseries_spec(directory), material.rows(**rows), encoder_of(directory)
    model = chosen.build(spec)
    chosen.load(model, chosen.export(model) | initialise(spec, 0))
    generator = Generator(chosen, model, encoder.tokenizer, Sampling(max_new_tokens=new_tokens), batch_size)

    def run(steps: int) -> dict[str, float]:
        for _ in range(steps):
            generator.answers(asked, partial(encoder.encode, with_answer=False))
        return {}

    return run


class Epochs:
    """Whole epochs of a training; the loss is that of held-out rows, which its time leaves out."""

    def __init__(self, training: Training, num_batches: int, held_out: list[Any], encode: Any) -> None:
        self.training, self.num_batches = training, num_batches
        self.held_out, self.encode = held_out, encode

    def __call__(self, steps: int) -> dict[str, float]:
        found = [self.training(self.num_batches) for _ in range(steps)]
        return {"tokens": found[-1]["tokens"] * self.num_batches}

    def loss(self) -> float:
        """Mean negative log-likelihood of every held-out token."""
        total = weight = 0.0
        for batch in eval_batches(self.held_out, self.encode, 4, collate):
            sums = self.training.backend.score(self.training.model, lm, batch)
            total, weight = total + sums["loss"], weight + sums["weight"]
        return total / weight
