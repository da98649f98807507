"""Protocols of perplexity: which tokens of a text are predicted, and what each prediction sees."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import DataError, UserError

READS = {  # what each protocol reads beside its name
    "windows": ("context_length",),
    "sliding": ("context_length", "stride"),
    "lines": ("max_lines", "max_tokens"),
    "position": ("context_length",),
}
MAX_LINES, MAX_TOKENS = 100, 512  # of `lines`: the reference's


@dataclass(frozen=True)
class Protocol:
    """How a text is scored. Raises UserError for a value out of range, and for one that the protocol ignores.

    Documents that did not see each other in training do not here.
    windows: cut as in training, every token once. sliding: every token once, each with at least
    context_length - stride tokens before it. lines: the first lines that are not blank, each alone, without BOS.
    position: windows, and the loss at each place of a window.
    """

    name: Literal["windows", "sliding", "lines", "position"] = "windows"
    context_length: int | None = None  # None: the run's own
    stride: int | None = None  # None: half the context
    max_lines: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for key in ("context_length", "stride", "max_lines", "max_tokens"):
            flag, value = "--" + key.replace("_", "-"), getattr(self, key)
            if value is not None and key not in READS[self.name]:
                readers = ", ".join(name for name, keys in READS.items() if key in keys)
                raise UserError(f"{flag}: the protocol {self.name} does not read it; it belongs to {readers}")
            least = 2 if key == "max_tokens" else 1
            if value is not None and value < least:
                raise UserError(f"{flag}: given {value}; expected {least} or more")

    def filled(self, context_length: int, max_length: int | None) -> "Protocol":
        """With the values that were left open, of a model that trained on `context_length` tokens.

        `max_length` is the most tokens it can read (None: any number). Raises UserError where more are asked for.
        """
        if self.name == "lines":
            most = self.max_tokens or min(MAX_TOKENS, max_length or MAX_TOKENS)
            _expect_most("--max-tokens", most, max_length)
            return replace(self, max_lines=self.max_lines or MAX_LINES, max_tokens=most)
        length = self.context_length or context_length
        _expect_most("--context-length", length, max_length)
        if self.name != "sliding":
            return replace(self, context_length=length)
        stride = self.stride or max(1, length // 2)
        if stride > length:
            raise UserError(f"--stride {stride}: it would skip tokens; give at most the context, {length}")
        return replace(self, context_length=length, stride=stride)

    @property
    def settings(self) -> dict[str, Any]:
        """Its name and what it reads, for a report."""
        return {"protocol": self.name} | {key: getattr(self, key) for key in READS[self.name]}


@dataclass(frozen=True)
class Window:
    """Tokens, where those after place `first` are predicted, each from all before it."""

    tokens: np.ndarray  # int32 (n + 1,)
    first: int = 0

    def __len__(self) -> int:
        return self.tokens.size


def windows_of(
    protocol: Protocol, parts: Sequence[np.ndarray], documents: Sequence[str], tokenizer: Tokenizer
) -> list[Window]:
    """What a `filled` protocol scores of a text, which is given as tokens and as documents.

    `parts`: the tokens, in pieces that do not see each other. Raises DataError where there is nothing to predict.
    """
    if protocol.name == "lines":
        lines = [line for document in documents for line in document.splitlines() if line.strip()]
        encoded = [tokenizer.encode(line)[: protocol.max_tokens] for line in lines[: protocol.max_lines]]
        windows = [Window(np.array(ids, np.int32)) for ids in encoded if len(ids) > 1]
        if not windows:
            raise DataError(f"none of {len(lines)} lines has the 2 tokens that a prediction needs; give lines of words")
        return windows
    if max((part.size for part in parts), default=0) < 2:
        size = sum(part.size for part in parts)
        raise DataError(f"a text of {size} tokens has nothing to predict; at least 2 are needed")
    length = protocol.context_length
    assert length is not None, "filled"
    if protocol.name == "sliding":
        stride = protocol.stride
        assert stride is not None, "filled"
        return [window for part in parts for window in sliding(part, length, stride)]
    return [Window(part[start : start + length + 1]) for part in parts for start in range(0, part.size - 1, length)]


def sliding(tokens: np.ndarray, context_length: int, stride: int) -> Iterator[Window]:
    """Every token but the first is predicted once, after at least `context_length - stride` others where there are."""
    done, last = 0, tokens.size - 1
    while done < last:
        end = min(max(done + stride, context_length), last)
        start = max(0, end - context_length)
        yield Window(tokens[start : end + 1], done - start)
        done = end


def collate_windows(windows: Sequence[Window], rows: Sequence[int] = ()) -> Batch:
    """The head meets only the places that count."""
    lengths = np.array([window.tokens.size - 1 for window in windows], np.int32)
    counts = [length - window.first for length, window in zip(lengths, windows, strict=True)]
    tokens = np.zeros((len(windows), lengths.max()), np.int32)
    shape = (len(windows), max(counts))
    targets, positions, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for b, (window, length, count) in enumerate(zip(windows, lengths, counts, strict=True)):
        tokens[b, :length] = window.tokens[:-1]
        targets[b, :count] = window.tokens[window.first + 1 :]
        positions[b, :count] = np.arange(window.first, length)
        mask[b, :count] = 1
    return Batch(tokens, targets, mask, lengths, positions, rows=tuple(rows))


def documents_of(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The texts that stand between EOS tokens."""
    return [tokenizer.decode(part.tolist()) for part in parts_of(tokens, tokenizer)]


def parts_of(tokens: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    """The tokens of each document, its EOS included."""
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    return [part for part in np.split(tokens, ends + 1) if part.size]


def sizes_of(predicted: Sequence[np.ndarray], tokenizer: Tokenizer) -> tuple[int, int]:
    """UTF-8 bytes and characters that predicted tokens spell; BOS and EOS spell nothing."""
    documents = [text for tokens in predicted for text in documents_of(tokens, tokenizer)]
    return sum(len(text.encode()) for text in documents), sum(map(len, documents))


def _expect_most(flag: str, given: int, max_length: int | None) -> None:
    if max_length is not None and given > max_length:
        raise UserError(
            f"{flag}: given {given}; this model has positions for {max_length} tokens (they are learned); "
            f"give at most {max_length}"
        )
