"""Generation in batches, through a backend's Session: answers to rows about series, and continuations of text."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.assemble import LoadedRun, RowData, TextData, load_run
from mlx_training.backend import Backend
from mlx_training.data.batch import Batch
from mlx_training.data.batching import eval_batches
from mlx_training.data.collate import collate_prompts
from mlx_training.data.files import read_text
from mlx_training.data.prompt import Encoded
from mlx_training.data.rows import Row
from mlx_training.data.text_stream import TextStream
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import DataError, UserError
from mlx_training.memory import full_memory_explained, reading_advice
from mlx_training.sampling import Sampling, choose
from mlx_training.waiting import Waiting

GREEDY = Sampling()


@dataclass
class Continuation:
    """One row's text while it is generated."""

    row: int  # its number among all rows: with the seed and the position it decides what is drawn
    prompt: list[int]  # the prompt's tokens, patches left out
    stream: TextStream
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    finish: str = ""  # "eos", "stop" (a stop string) or "length"; "" while it goes on

    def push(self, token: int, eos_id: int) -> str:
        """Append a token; the text that is certain now and was not before."""
        self.tokens.append(token)
        if token == eos_id:
            self.finish = "eos"
            return self.stream.end()
        text = self.stream.push(token)
        if len(self.tokens) == self.max_new_tokens and not self.stream.stopped:
            self.finish = "length"
            text += self.stream.end()
        if self.stream.stopped:
            self.finish = "stop"
        return text

    @property
    def text(self) -> str:
        """The text so far, without the prompt and without a stop string."""
        return self.stream.text


Watch = Callable[[Continuation, str], None]  # is told every piece of text; the last one comes with `finish`


@dataclass(frozen=True)
class Generator:
    """Generates texts from one model."""

    backend: Backend
    model: Any
    tokenizer: Tokenizer
    sampling: Sampling
    batch_size: int
    watch: Watch | None = None

    def __post_init__(self) -> None:
        if not self.model.spec.is_causal:
            raise UserError(
                "a masked model (mixers: [bidirectional]) tells hidden tokens from both sides; it cannot continue a "
                "text. Evaluate it with `mlx-training evaluate RUN`, or train with objective: causal"
            )

    def answers(self, rows: Sequence[Row], encode: Callable[[Row], Encoded]) -> list[str]:
        """An answer to every row's prompt, in row order. Nothing steers the model towards a row's options.

        It ends where learned positions do.
        """
        stop, longest = self.sampling.stop, self.model.spec.max_length or np.inf
        found: dict[int, Continuation] = {}
        with Waiting("answering", len(rows)) as waiting:
            for batch in eval_batches(rows, encode, self.batch_size, collate_prompts):
                begun = []
                for row, prompt, length in zip(batch.rows, _prompt_tokens(batch), batch.lengths, strict=True):
                    room = max(1, min(self.sampling.max_new_tokens, longest - length))
                    begun.append(Continuation(row, prompt, TextStream(self.tokenizer, stop=stop), int(room)))
                self._run(batch, begun, waiting.add)
                found |= {continuation.row: continuation for continuation in begun}
        return [found[row].text.strip() for row in range(len(rows))]

    def texts(self, prompts: Sequence[str], samples: int = 1) -> list[Continuation]:
        """`samples` continuations of every prompt, those of one prompt side by side (DataError: see `encode`)."""
        encoded = [self.encode(prompt) for prompt in prompts for _ in range(samples)]
        stop, most = self.sampling.stop, self.model.spec.max_length
        found: dict[int, Continuation] = {}
        for batch in eval_batches(encoded, lambda item: item, self.batch_size, collate_prompts):
            begun = []
            for row, prompt in zip(batch.rows, _prompt_tokens(batch), strict=True):
                room = min(self.sampling.max_new_tokens, np.inf if most is None else most - len(prompt))
                begun.append(Continuation(row, prompt, TextStream(self.tokenizer, prompt, stop), int(room)))
            self._run(batch, begun)
            found |= {continuation.row: continuation for continuation in begun}
        return [found[row] for row in range(len(encoded))]

    def encode(self, prompt: str) -> Encoded:
        """The prompt as a document begins in training; an empty one is what stands between documents.

        Raises DataError when it does not leave room for a token (`Spec.max_length`).
        """
        tokens = self.tokenizer.encode(prompt, bos=self.tokenizer.add_bos) or [self.tokenizer.eos_id]
        most = self.model.spec.max_length
        if most is not None and len(tokens) >= most:
            raise DataError(
                f"prompt {_shortened(prompt)}: {len(tokens)} tokens, but this model has positions for {most} in all "
                f"(its context_length; positions are learned), new ones included; give a prompt of at most {most - 1}"
            )
        return Encoded.of_text(np.array(tokens, np.int32), len(tokens))

    def _run(self, batch: Batch, rows: list[Continuation], done: Callable[[int], None] = lambda _: None) -> None:
        """Continue every row of a batch of prompts to its end; rows that are done leave the session.

        `done` is told how many they are.
        """
        session = self.backend.session(self.model)
        logits_BV = session.prefill(batch)
        while True:
            places = [len(row.tokens) for row in rows]
            texts = [row.prompt + row.tokens for row in rows]
            tokens_B = choose(logits_BV, self.sampling, [row.row for row in rows], places, texts)
            for row, token in zip(rows, tokens_B.tolist(), strict=True):
                text = row.push(token, self.tokenizer.eos_id)
                if self.watch is not None:
                    self.watch(row, text)
            going_on = [b for b, row in enumerate(rows) if not row.finish]
            done(len(rows) - len(going_on))
            if not going_on:
                return
            if len(going_on) < len(rows):
                session, rows = session.fork(going_on), [rows[b] for b in going_on]
            logits_BV = session.extend(tokens_B[going_on])


def generate_rows(
    run: Path,
    rows: Path,
    backend: str | None = None,
    *,
    checkpoint: str | None = None,
    device: str | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Answer every row of a file with a trained run: {"rows": [{"id", "answer", "prediction"}]}.

    `sampling`: fields of Sampling; without them greedily, and as long as `evaluation.max_new_tokens` allows.
    """
    with full_memory_explained(lambda: reading_advice(run)):
        loaded = load_run(run, backend, checkpoint, device)
        if not isinstance(loaded.data, RowData):
            raise DataError(f"--rows {rows}: {run} is a language model; give it --prompt TEXT or --prompts FILE")
        given = loaded.data.read(rows, with_answers=False)
        chosen = {"max_new_tokens": loaded.config.evaluation.max_new_tokens} | dict(sampling or {})
        predictions = generator_of(loaded, Sampling(**chosen)).answers(given, loaded.data.encode_prompt)
        return {
            "run": str(run),
            "backend": loaded.backend.name,
            "rows": [
                {"id": row.id, "answer": row.answer, "prediction": text}
                for row, text in zip(given, predictions, strict=True)
            ],
        }


def generate_texts(
    run: Path,
    prompts: Sequence[str],
    backend: str | None = None,
    *,
    checkpoint: str | None = None,
    device: str | None = None,
    sampling: Sampling = GREEDY,
    samples: int = 1,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Continue prompts with a trained language model: {"samples": [{"prompt", "text", "tokens", "finish"}]}."""
    with full_memory_explained(lambda: reading_advice(run)):
        loaded, context_length = load_language_model(run, backend, checkpoint, device)
        found = sample_texts(generator_of(loaded, sampling, watch), prompts, samples, context_length)
    about = {"run": str(run), "backend": loaded.backend.name, "checkpoint": str(loaded.checkpoint.path)}
    return about | {"samples": found}


def sample_texts(
    generator: Generator, prompts: Sequence[str], samples: int, context_length: int
) -> list[dict[str, Any]]:
    """One record a continuation: prompt, text, number of tokens (EOS included), why it ended.

    Says once when a text goes beyond the `context_length` of training, or ends where the model's positions do.
    """
    if samples < 1:
        raise UserError(f"--samples: given {samples}; expected 1 or more")
    if samples > 1 and not generator.sampling.temperature:
        raise UserError(f"--samples {samples}: at temperature 0 they are all the same; give --temperature, e.g. 1")
    found = generator.texts(prompts, samples)
    most, longest = generator.model.spec.max_length, max(len(item.prompt) + len(item.tokens) for item in found)
    if any(item.finish == "length" and len(item.tokens) < generator.sampling.max_new_tokens for item in found):
        print(f"note: a text ends at {most} tokens, prompt included: the model has no later positions", file=sys.stderr)
    elif longest > context_length:
        print(f"note: up to {longest} tokens; the model was trained on {context_length} at a time", file=sys.stderr)
    return [
        {"prompt": prompts[i // samples], "text": item.text, "tokens": len(item.tokens), "finish": item.finish}
        for i, item in enumerate(found)
    ]


def generator_of(loaded: LoadedRun, sampling: Sampling, watch: Watch | None = None) -> Generator:
    """A generator of a run that was loaded."""
    batch_size = loaded.config.evaluation.batch_size or loaded.config.training.batch_size
    return Generator(loaded.backend, loaded.model, loaded.data.tokenizer, sampling, batch_size, watch)


def load_language_model(
    run: Path, backend: str | None, checkpoint: str | None = None, device: str | None = None
) -> tuple[LoadedRun, int]:
    """`load_run` of a run on text (DataError), and the number of tokens in its training windows."""
    loaded = load_run(run, backend, checkpoint, device)
    if not isinstance(loaded.data, TextData):
        raise DataError(
            f"{run} answers rows of {loaded.config.dataset.format}; give it --rows FILE of such rows instead of prompts"
        )
    return loaded, loaded.data.context_length


def read_prompts(path: Path) -> list[str]:
    """Every line of a file that is not blank."""
    prompts = [line for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise DataError(f"--prompts {path}: no prompt; expected one on every line")
    return prompts


def on_terminal(prompts: Sequence[str], samples: int) -> Watch:
    """Print texts to stdout: a single one as it grows, several each when it is done."""
    single = len(prompts) * samples == 1

    def watch(item: Continuation, text: str) -> None:
        prompt = prompts[item.row // samples]
        if not single and item.finish:
            number = f" ({item.row % samples + 1}/{samples})" if samples > 1 else ""
            print(f"--- {_shortened(prompt)}{number}\n{prompt}{item.text}", flush=True)
        elif single:
            begin, end = prompt if len(item.tokens) == 1 else "", "\n" if item.finish else ""
            print(begin, text, sep="", end=end, flush=True)

    return watch


def show(result: dict[str, Any]) -> str:
    """What is said after texts were printed, or the answers of rows."""
    if "rows" in result:
        return "\n".join(f"{row['id']}\t{row['prediction']}" for row in result["rows"])
    samples = result["samples"]
    ends = ", ".join(f"{name} {count}" for name, count in Counter(sample["finish"] for sample in samples).items())
    return f"({sum(sample['tokens'] for sample in samples)} tokens; ended by: {ends})"


def _prompt_tokens(batch: Batch) -> list[list[int]]:
    """Each row's tokens of text; where a patch stands there is none."""
    rows = []
    for b, length in enumerate(batch.lengths):
        tokens = batch.tokens[b, :length]
        rows.append((tokens if batch.patch_index is None else tokens[batch.patch_index[b, :length] == 0]).tolist())
    return rows


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
