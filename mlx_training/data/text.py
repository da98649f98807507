"""Text for decoders: documents become one stream of tokens, cut into windows."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.data.files import read_json_lines, read_text
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import DataError


def read_documents(path: Path | str, *, separator: str | None = None, text_column: str = "text") -> list[str]:
    """Documents of a `.jsonl` file (field `text_column` of each line), a text file or a folder of `.txt` files.

    A text file is one document, or several when `separator` is given (e.g. "<|endoftext|>" or a blank line).
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        documents = []
        for where, data in read_json_lines(path):
            if not isinstance(data.get(text_column), str):
                raise DataError(f"{where}: no text in field {text_column!r}; the fields are {', '.join(data)}")
            documents.append(data[text_column])
    else:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        texts = [read_text(file) for file in files]
        documents = texts if separator is None else [part for text in texts for part in text.split(separator)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"{path}: no text; expected a .jsonl or text file with text, or a folder of .txt files")
    return documents


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """One int32 stream (N,): each document, after BOS when the tokenizer adds one, followed by EOS."""
    stream: list[int] = []
    for document in documents:
        stream += tokenizer.encode(document, bos=tokenizer.add_bos)
        stream.append(tokenizer.eos_id)
    return np.array(stream, np.int32)


def split_documents(documents: Sequence[str], fraction: Mapping[str, float]) -> dict[str, list[str]]:
    """Contiguous parts of a text by characters: "train" first, then each split of `fraction`, no character twice.

    Cut before anything is learnt from the text, a tokenizer included. A document on a border is cut in two.
    """
    total = sum(map(len, documents))
    sizes = {name: round(share * total) for name, share in fraction.items()}
    sizes = {"train": total - sum(sizes.values()), **sizes}
    parts: dict[str, list[str]] = {name: [] for name in sizes}
    rest = iter(documents)
    document = ""
    for name, size in sizes.items():
        if size < 2:
            raise DataError(
                f"dataset.splits: {name} would hold {max(size, 0)} of {total} characters; a split needs at least 2: "
                "use more text or other fractions"
            )
        while size > 0:
            document = document or next(rest)
            parts[name].append(document[:size])
            size, document = size - len(document[:size]), document[size:]
    return parts


class TextWindows(Sequence[np.ndarray]):
    """Windows of `context_length` + 1 tokens; consecutive windows share one token, so each target comes once.

    The last window may be shorter. A dataset for `Batches` with `encode` = identity and `collate` = `self.collate`.
    """

    def __init__(self, tokens: np.ndarray, context_length: int) -> None:
        if tokens.size < 2:
            raise DataError(f"a text of {tokens.size} tokens has nothing to predict; at least 2 are needed")
        self.tokens = tokens
        self.context_length = context_length

    def __len__(self) -> int:
        return -(-(self.tokens.size - 1) // self.context_length)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int -> window; slices are not needed
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.context_length
        return self.tokens[start : start + self.context_length + 1]

    def collate(self, windows: Sequence[np.ndarray], rows: Sequence[int] = ()) -> Batch:
        """Every place predicts the next token; a short window is padded at its end, unsupervised."""
        shape = (len(windows), self.context_length)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        mask = np.zeros(shape, np.float32)
        for b, window in enumerate(windows):
            length = window.size - 1
            tokens[b, :length], targets[b, :length], mask[b, :length] = window[:-1], window[1:], 1
        lengths = np.array([window.size - 1 for window in windows], np.int32)
        return Batch(tokens, targets, mask, lengths, rows=tuple(rows))
