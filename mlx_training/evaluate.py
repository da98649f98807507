"""Evaluation: loss, generated answers, predicted tokens, and the ablation that tells whether series are read at all."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_training.assemble import Data, LoadedRun, RowData, TextData, load_run
from mlx_training.backend import Backend
from mlx_training.config import RunConfig
from mlx_training.data.batching import eval_batches
from mlx_training.data.rows import Row
from mlx_training.data.token_cache import encode_documents
from mlx_training.errors import UserError
from mlx_training.generate import Generator
from mlx_training.memory import full_memory_explained, reading_advice
from mlx_training.metrics import TokenTally, answer_metrics, mainrun_metrics, token_metrics
from mlx_training.objectives.lm import lm
from mlx_training.protocols import Protocol, collate_windows, documents_of, parts_of, sizes_of, windows_of
from mlx_training.run_directory import full_disk_explained, write_atomic
from mlx_training.sampling import Sampling
from mlx_training.waiting import Waiting

BY_POSITION = "loss_by_position.csv"
NUM_BINS = 16  # of the loss by position in a report; the file has every position


class Text(NamedTuple):
    """A text to evaluate a language model on; `split` where it is one of the run's own."""

    tokens: np.ndarray
    documents: Callable[[], Sequence[str]]
    split: str | None = None


@dataclass(frozen=True)
class Evaluator:
    """Evaluates one model on the splits of one run."""

    config: RunConfig
    backend: Backend
    model: Any
    data: Data

    def during_training(self) -> dict[str, float]:
        """The metrics of `evaluation.metrics` on `evaluation.split`."""
        wanted = self.config.evaluation.metrics
        split, limit = self.config.evaluation.split, self.config.evaluation.max_rows
        metrics = self.loss(split, limit) if "loss" in wanted else {}
        if isinstance(self.data, RowData) and {"accuracy", "macro_f1"} & set(wanted):
            rows = self.data.rows(split)[:limit]
            metrics |= answer_metrics(rows, self._answers(rows))
        return {name: metrics[name] for name in wanted}

    def report(self, split: str, rows: Sequence[Row] | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Everything there is to say about a split (or about these rows), and each row's prediction."""
        if not isinstance(self.data, RowData):
            return self.score_text(text_of_split(self.data, split), Protocol())[0], []
        rows = self.data.rows(split) if rows is None else rows
        predictions = self._answers(rows)
        metrics = answer_metrics(rows, predictions)
        if any(row.series for row in rows):
            without = self._answers(rows, ablate=True)
            metrics["accuracy_without_series"] = answer_metrics(rows, without)["accuracy"]
        lines = [
            {"id": row.id, "type": row.type, "answer": row.answer, "prediction": text}
            for row, text in zip(rows, predictions, strict=True)
        ]
        return metrics, lines

    def loss(self, split: str, limit: int | None) -> dict[str, float]:
        """Mean negative log-likelihood in nats per supervised token."""
        total = weight = 0.0
        for batch in Waiting("scoring").over(self.data.eval_batches(split, self.batch_size, limit)):
            sums = self.backend.score(self.model, lm, batch)
            total, weight = total + sums["loss"], weight + sums["weight"]
        loss = total / weight
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(weight)}

    def score_text(self, text: Text, protocol: Protocol) -> tuple[dict[str, Any], TokenTally]:
        """What a protocol says about a text, and the sums behind it."""
        assert isinstance(self.data, TextData)
        if self.data.masking is not None:
            return self._score_hidden(text)
        tokenizer = self.data.tokenizer
        filled = protocol.filled(self.data.context_length, self.model.spec.max_length)
        documents = text.documents() if filled.name == "lines" else ()
        apart = self.config.dataset.packing == "documents"
        parts = parts_of(text.tokens, tokenizer) if apart else [text.tokens]
        windows = windows_of(filled, parts, documents, tokenizer)
        batches = eval_batches(windows, lambda window: window, self.batch_size, collate_windows)
        if protocol == Protocol() and text.split is not None:
            batches = self.data.eval_batches(text.split, self.batch_size, None)
        tally = TokenTally()
        for batch in Waiting("scoring").over(batches):
            tally.add(batch, self.backend.score_tokens(self.model, batch))
        predicted = [w.tokens[1:] for w in windows] if filled.name == "lines" else [part[1:] for part in parts]
        num_bytes, num_characters = sizes_of(predicted, tokenizer)
        metrics = token_metrics(tally, num_bytes, num_characters)
        if filled.name == "windows":
            num_eos = sum(int((tokens == tokenizer.eos_id).sum()) for tokens in predicted)
            length, batch_size = filled.context_length or 0, self.config.training.batch_size
            metrics |= mainrun_metrics(tally, num_characters, num_eos, length, batch_size)
        metrics |= filled.settings
        if filled.name == "position":
            metrics["by_position"] = binned(tally.loss_by_place)
        return metrics, tally

    def _score_hidden(self, text: Text) -> tuple[dict[str, Any], TokenTally]:
        """Of a masked model: how well it tells the hidden tokens, always the same ones of a text."""
        assert isinstance(self.data, TextData)
        if text.split is not None:
            batches = self.data.eval_batches(text.split, self.batch_size, None)
        else:
            batches = self.data.hidden_batches(text.tokens, self.batch_size)
        tally = TokenTally()
        for batch in Waiting("scoring").over(batches):
            tally.add(batch, self.backend.score_tokens(self.model, batch))
        nats, tokens, hits = tally.by_place.sum(1)
        return {"loss": nats / tokens, "accuracy": hits / tokens, "hidden_tokens": int(tokens)}, tally

    @property
    def batch_size(self) -> int:
        """Rows a batch."""
        return self.config.evaluation.batch_size or self.config.training.batch_size

    def _answers(self, rows: Sequence[Row], *, ablate: bool = False) -> list[str]:
        assert isinstance(self.data, RowData)
        generator = Generator(
            self.backend,
            self.model,
            self.data.tokenizer,
            Sampling(max_new_tokens=self.config.evaluation.max_new_tokens),
            self.batch_size,
        )
        return generator.answers(rows, partial(self.data.encode_prompt, ablate=ablate))


def evaluate_run(
    run: Path,
    split: str | None = None,
    data: Path | None = None,
    backend: str | None = None,
    *,
    checkpoint: str | None = None,
    device: str | None = None,
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint of a run (None: the best) on a split, or on every row (or the text) of a file.

    Writes predictions, and the loss by position, into the run. Raises DataError when the run has no such split.
    """
    with full_memory_explained(lambda: reading_advice(run)), full_disk_explained(run):
        loaded = load_run(run, backend, checkpoint, device)
        return evaluate_loaded(loaded, run, split, data, protocol)


def evaluate_loaded(
    loaded: LoadedRun, run: Path, split: str | None, data: Path | None, protocol: Protocol | None
) -> dict[str, Any]:
    """`evaluate_run` of a run that was loaded."""
    evaluator = Evaluator(loaded.config, loaded.backend, loaded.model, loaded.data)
    split = split or loaded.config.evaluation.test_split or loaded.config.evaluation.split
    if isinstance(loaded.data, TextData):
        if loaded.data.masking and protocol is not None:
            raise UserError(
                f"--protocol {protocol.name}: {run} is a masked model, which predicts no next token and has no "
                "perplexity; without a protocol its loss on hidden tokens is reported"
            )
        text = text_of_split(loaded.data, split) if data is None else text_of_file(loaded.data, data)
        metrics, tally = evaluator.score_text(text, protocol or Protocol())
        if "by_position" in metrics:
            write_by_position(run / BY_POSITION, tally)
        return metrics
    if protocol is not None:
        raise UserError(f"--protocol {protocol.name}: {run} answers rows; protocols are for text")
    if data is None:
        metrics, predictions = evaluator.report(split)
    else:
        metrics, predictions = evaluator.report("", loaded.data.read(data))
    if loaded.config.evaluation.save_predictions and predictions:
        where = split if data is None else f"file_{data.stem}"
        save_predictions(run / f"predictions_{where}.jsonl", predictions)
    return metrics


def text_of_split(data: TextData, split: str) -> Text:
    """A split of a run on text."""
    tokens = data.tokens(split)
    return Text(tokens, lambda: documents_of(tokens, data.tokenizer), split)


def text_of_file(data: TextData, path: Path) -> Text:
    """Another text, with a run's tokenizer."""
    documents = data.read(path)
    return Text(encode_documents(documents, data.tokenizer), lambda: documents)


def binned(loss_P: np.ndarray) -> dict[str, float]:
    """Mean loss of up to NUM_BINS equal stretches of positions: {"0-15": loss}."""
    starts = np.linspace(0, loss_P.size, min(NUM_BINS, loss_P.size) + 1).round().astype(int)
    return {f"{a}-{b - 1}": float(np.nanmean(loss_P[a:b])) for a, b in pairwise(starts.tolist())}


def write_by_position(path: Path, tally: TokenTally) -> None:
    """position, mean loss in nats, number of tokens: one line a place of the window."""
    table = zip(tally.loss_by_place.tolist(), tally.by_place[1].astype(int).tolist(), strict=True)
    lines = [f"{place},{loss:.6g},{tokens}" for place, (loss, tokens) in enumerate(table)]
    write_atomic(path, "\n".join(["position,loss,tokens", *lines, ""]))


def save_predictions(path: Path, predictions: Sequence[dict[str, Any]]) -> None:
    """One JSON object a row: id, type, answer, prediction."""
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions))
