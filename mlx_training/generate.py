"""Greedy decoding in batches, through a backend's Session."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.assemble import RowData, load_run
from mlx_training.backend import Backend
from mlx_training.data.batching import eval_batches
from mlx_training.data.collate import collate_prompts
from mlx_training.data.prompt import Encoded
from mlx_training.data.rows import Row
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import DataError
from mlx_training.memory import full_memory_explained, reading_advice


def greedy(
    backend: Backend,
    model: Any,
    rows: Sequence[Row],
    encode: Callable[[Row], Encoded],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """The most probable continuation of every row's prompt, token by token, up to EOS; texts in row order.

    Unconstrained: nothing steers the model towards a row's options.
    """
    texts = [""] * len(rows)
    for batch in eval_batches(rows, encode, batch_size, collate_prompts):
        session = backend.session(model)
        tokens_B = session.prefill(batch).argmax(-1)
        columns = [tokens_B]
        running = tokens_B != tokenizer.eos_id
        while running.any() and len(columns) < max_new_tokens:
            tokens_B = session.extend(tokens_B).argmax(-1)
            columns.append(tokens_B)
            running &= tokens_B != tokenizer.eos_id
        for row, ids in zip(batch.rows, np.stack(columns, axis=1).tolist(), strict=True):
            end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
            texts[row] = tokenizer.decode(ids[:end]).strip()
    return texts


def generate_rows(run: Path, rows: Path, backend: str | None = None) -> dict[str, Any]:
    """Answer every row of a file with a trained run: {"rows": [{"id", "answer", "prediction"}]}."""
    with full_memory_explained(lambda: reading_advice(run)):
        loaded = load_run(run, backend)
        if not isinstance(loaded.data, RowData):
            raise DataError(f"--rows {rows}: {run} trained a decoder on text; --rows takes rows about time series")
        given = loaded.data.read(rows, with_answers=False)
        predictions = greedy(
            loaded.backend,
            loaded.model,
            given,
            loaded.data.encode_prompt,
            loaded.data.tokenizer,
            batch_size=loaded.config.evaluation.batch_size or loaded.config.training.batch_size,
            max_new_tokens=loaded.config.evaluation.max_new_tokens,
        )
        return {
            "run": str(run),
            "backend": loaded.backend.name,
            "rows": [
                {"id": row.id, "answer": row.answer, "prediction": text}
                for row, text in zip(given, predictions, strict=True)
            ],
        }
