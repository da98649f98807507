"""Evaluation: loss, generated answers, and the ablation that tells whether the series are read at all."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_training.assemble import Data, RowData, load_run
from mlx_training.backend import Backend
from mlx_training.config import RunConfig
from mlx_training.data.rows import Row
from mlx_training.errors import DataError
from mlx_training.generate import greedy
from mlx_training.memory import full_memory_explained, reading_advice
from mlx_training.metrics import answer_metrics
from mlx_training.objectives.lm import lm
from mlx_training.run_directory import full_disk_explained, write_atomic


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
            return self.loss(split, None), []
        rows = self.data.rows(split) if rows is None else rows
        predictions = self._answers(rows)
        metrics = answer_metrics(rows, predictions)
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
        for batch in self.data.eval_batches(split, self.batch_size, limit):
            sums = self.backend.score(self.model, lm, batch)
            total, weight = total + sums["loss"], weight + sums["weight"]
        loss = total / weight
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(weight)}

    @property
    def batch_size(self) -> int:
        """Rows a batch."""
        return self.config.evaluation.batch_size or self.config.training.batch_size

    def _answers(self, rows: Sequence[Row], *, ablate: bool = False) -> list[str]:
        assert isinstance(self.data, RowData)
        return greedy(
            self.backend,
            self.model,
            rows,
            partial(self.data.encode_prompt, ablate=ablate),
            self.data.tokenizer,
            batch_size=self.batch_size,
            max_new_tokens=self.config.evaluation.max_new_tokens,
        )


def evaluate_run(
    run: Path, split: str | None = None, data: Path | None = None, backend: str | None = None
) -> dict[str, Any]:
    """Evaluate a run's best checkpoint on a split, or on every row of a file. Writes nothing but predictions.

    Raises DataError when the run has no such split or the model does not read rows.
    """
    with full_memory_explained(lambda: reading_advice(run)), full_disk_explained(run):
        loaded = load_run(run, backend)
        evaluator = Evaluator(loaded.config, loaded.backend, loaded.model, loaded.data)
        if data is None:
            split = split or loaded.config.evaluation.test_split or loaded.config.evaluation.split
            metrics, predictions = evaluator.report(split)
            where = split
        else:
            if not isinstance(loaded.data, RowData):
                raise DataError(
                    f"--data {data}: this run trained a decoder on text; --data takes rows about time series"
                )
            metrics, predictions = evaluator.report("", loaded.data.read(data))
            where = f"file_{data.stem}"
        if loaded.config.evaluation.save_predictions and predictions:
            save_predictions(run / f"predictions_{where}.jsonl", predictions)
        return metrics


def save_predictions(path: Path, predictions: Sequence[dict[str, Any]]) -> None:
    """One JSON object a row: id, type, answer, prediction."""
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions))
