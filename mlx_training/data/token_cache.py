"""Token streams, in memory or in a folder of files that are written once and mapped into memory after that."""

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_training.data.text_sources import Part
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import DataError
from mlx_training.run_directory import sync

VERSION = 1
BATCH = 1 << 17  # characters that are encoded at a time
HEADER = "header.json"


@dataclass(frozen=True)
class TokenStream:
    """The documents of a split, one after another: each after BOS when the tokenizer adds one, and before EOS."""

    tokens: np.ndarray  # uint16 or uint32 (N,)
    starts: np.ndarray  # int64 (D,): the first token of each document
    num_bytes: int  # of their text in UTF-8, without special tokens
    num_characters: int


class _Writer:
    """Appends documents to a file of tokens."""

    def __init__(self, file: BinaryIO, dtype: str) -> None:
        self.file, self.dtype = file, dtype
        self.starts = array("q")
        self.num_tokens = self.num_bytes = self.num_characters = 0

    def write(self, ids: list[int], text: str) -> None:
        self.file.write(np.array(ids, self.dtype).tobytes())
        self.num_tokens += len(ids)
        self.num_bytes += len(text.encode())
        self.num_characters += len(text)

    def counts(self) -> dict[str, int]:
        return {
            "tokens": self.num_tokens,
            "documents": len(self.starts),
            "bytes": self.num_bytes,
            "characters": self.num_characters,
        }


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """One int32 stream (N,): each document, after BOS when the tokenizer adds one, followed by EOS."""
    stream: list[int] = []
    for document in documents:
        stream += tokenizer.encode(document, bos=tokenizer.add_bos)
        stream.append(tokenizer.eos_id)
    return np.array(stream, np.int32)


def encode_parts(parts: Iterator[Part], tokenizer: Tokenizer, max_tokens: int | None = None) -> dict[str, TokenStream]:
    """Token streams in memory, by split. `max_tokens`: of the training split; what comes after is left out."""
    buffers: dict[str, io.BytesIO] = {}

    def new(split: str) -> BinaryIO:
        return buffers.setdefault(split, io.BytesIO())

    writers = _encode(parts, tokenizer, max_tokens, new)
    return {
        name: TokenStream(
            np.frombuffer(buffers[name].getbuffer(), writer.dtype),
            np.array(writer.starts, np.int64),
            writer.num_bytes,
            writer.num_characters,
        )
        for name, writer in writers.items()
    }


def cached_streams(
    folder: Path,
    state: Mapping[str, Any],
    parts: Callable[[], Iterator[Part]],
    tokenizer: Tokenizer,
    max_tokens: int | None = None,
) -> dict[str, TokenStream]:
    """The streams of `state` from their own folder below `folder`, mapped into memory; encoded first when it is absent.

    `state` is all that the tokens depend on, as JSON. A folder that is damaged (a header that cannot be read or is of
    another state, a file of another size) is said so and made again.
    """
    state = json.loads(json.dumps({"version": VERSION, "tokenizer": tokenizer.fingerprint, **state}))
    place = folder / hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]
    if place.exists():
        if (found := _read(place, state)) is not None:
            return found
        print(f"warning: {place} is damaged; it is made again", file=sys.stderr)
        shutil.rmtree(place)
    _claim(folder)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as name:
        temporary = Path(name) / "tokens"
        temporary.mkdir()
        files: list[BinaryIO] = []

        def new(split: str) -> BinaryIO:
            files.append((temporary / f"{split}.tokens").open("wb"))
            return files[-1]

        try:
            writers = _encode(parts(), tokenizer, max_tokens, new)
        finally:
            for file in files:
                file.close()
        for split, writer in writers.items():
            (temporary / f"{split}.starts").write_bytes(writer.starts.tobytes())
        header = {"state": state, "dtype": _dtype(tokenizer), "splits": {n: w.counts() for n, w in writers.items()}}
        (temporary / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            sync(path)
        if not place.exists():  # else another process was faster
            os.rename(temporary, place)
    streams = _read(place, state)
    assert streams is not None, f"{place} was written just now"
    return streams


def _claim(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".tmp-", dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"{folder}: tokens cannot be kept there ({error.strerror or error}); set dataset.cache_dir to a folder "
            "that can be written"
        ) from error


def _dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def _read(place: Path, state: Mapping[str, Any]) -> dict[str, TokenStream] | None:
    """The streams in a folder, or None where it does not hold them whole."""
    try:
        header = json.loads((place / HEADER).read_text(encoding="utf-8"))
        if header["state"] != state:
            return None
        streams = {}
        for split, counts in header["splits"].items():
            tokens = _map(place / f"{split}.tokens", header["dtype"], counts["tokens"])
            starts = _map(place / f"{split}.starts", "<i8", counts["documents"])
            streams[split] = TokenStream(tokens, starts, counts["bytes"], counts["characters"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return streams


def _map(path: Path, dtype: str, size: int) -> np.ndarray:
    if path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError("another size than the header says")
    return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)


def _encode(
    parts: Iterator[Part], tokenizer: Tokenizer, max_tokens: int | None, new: Callable[[str], BinaryIO]
) -> dict[str, _Writer]:
    """Write the tokens of every part to the file of its split, which `new` opens."""
    writers: dict[str, _Writer] = {}
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    for batch in _batches(_pieces(parts)):
        texts = [
            text[1:] if not first and tokenizer.adds_space and text[0] == " " else text for _, text, first, _ in batch
        ]
        for (split, text, first, last), ids in zip(batch, tokenizer.encode_batch(texts), strict=True):
            writer = writers.get(split)
            if writer is None:
                writer = writers[split] = _Writer(new(split), _dtype(tokenizer))
            most = max_tokens if split == "train" and max_tokens is not None else sys.maxsize
            if writer.num_tokens >= most:
                continue
            if first:
                writer.starts.append(writer.num_tokens)
                ids = bos + ids
            if last:
                ids = [*ids, tokenizer.eos_id]
            if len(ids) > most - writer.num_tokens:
                ids = ids[: most - writer.num_tokens]
                text = tokenizer.decode(ids)
            writer.write(ids, text)
    return writers


def _pieces(parts: Iterator[Part]) -> Iterator[tuple[str, str, bool, bool]]:
    """(split, text, whether it begins a document, whether it ends it) of every piece of every part."""
    for part in parts:
        first, before = True, ""
        for piece in part.pieces():
            if before:
                yield part.split, before, first, False
                first = False
            before = piece
        yield part.split, before, first, True


def _batches(pieces: Iterator[tuple[str, str, bool, bool]]) -> Iterator[list[tuple[str, str, bool, bool]]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
