"""Sources of text and their splits: which document, or which part of one, trains, validates or tests."""

import hashlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mlx_training.data.splits import SPLITS
from mlx_training.data.text_files import Document, read_documents, text_files
from mlx_training.errors import DataError

ENOUGH = 10  # documents a split should get, at the least, when documents are what is drawn


@dataclass(frozen=True)
class TextSplits:
    """How a text is divided. `unit`: what fractions draw; null: documents where each split gets some ten of them."""

    fraction: Mapping[str, float] = field(default_factory=dict)  # never "train": it gets the rest
    seed: int = 0
    unit: Literal["document", "character"] | None = None

    def draw(self, digest: bytes) -> str:
        """The split of a document: a function of its text and the seed, so that copies stay together."""
        number = hashlib.blake2b(digest, digest_size=8, salt=self.seed.to_bytes(8, "little")).digest()
        place = int.from_bytes(number, "little") / 2**64
        for name, share in self.fraction.items():
            if place < share:
                return name
            place -= share
        return "train"


@dataclass(frozen=True)
class Part:
    """A document, or the characters [start, stop) of it, in a split."""

    split: str
    document: Document
    start: int = 0
    stop: int | None = None

    def pieces(self) -> Iterator[str]:
        """Its text in pieces, as `Document.pieces`."""
        place = 0
        for piece in self.document.pieces():
            stop = len(piece) if self.stop is None else self.stop - place
            if chosen := piece[max(self.start - place, 0) : max(stop, 0)]:
                yield chosen
            place += len(piece)


@dataclass(frozen=True)
class Source:
    """Documents from one place. `split` puts them all there; `state` changes with them (None: they are in memory)."""

    name: str
    documents: Callable[[], Iterable[Document]]
    split: str | None = None
    weight: float | None = None
    max_tokens: int | None = None
    state: Mapping[str, Any] | None = None
    num_bytes: int = 0

    @classmethod
    def of_files(
        cls,
        path: str,
        *,
        split: str | None = None,
        weight: float | None = None,
        max_documents: int | None = None,
        max_tokens: int | None = None,
        **options: Any,
    ) -> "Source":
        """A file, folder, pattern or hub dataset; `options` are those of `read_documents`."""
        files = text_files(path)
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        caps = {"max_documents": max_documents, "max_tokens": max_tokens}

        def documents() -> Iterator[Document]:
            return itertools.islice(read_documents(path, **options), max_documents)

        num_bytes = sum(size for _, size, _ in stats)
        return cls(path, documents, split, weight, max_tokens, {"files": stats, **caps, **options}, num_bytes)

    @cached_property
    def outline(self) -> list[tuple[bytes, int]]:
        """Digest and length in characters of every document."""
        return [document.measure() for document in self.documents()]


class Division:
    """Sources and their splits. Each source is divided by itself, and no text is in two splits."""

    def __init__(self, sources: Sequence[Source], splits: TextSplits) -> None:
        self.sources, self.splits = sources, splits
        self.units = {id(source): self._unit(source) for source in sources}
        self._told: set[int] = set()  # sources whose repeats were reported: a tokenizer is trained on the parts first

    def parts(self, source: Source) -> Iterator[Part]:
        """Every document of one of the sources, or its parts, in order. Repeats of what is cut in two are left out."""
        unit = self.units[id(source)]
        if unit == "whole":
            yield from (Part(source.split or "train", document) for document in source.documents())
        elif unit == "document":
            taken = self._digests(self.sources)
            for document in source.documents():
                digest, _ = document.measure()
                if digest not in taken:
                    yield Part(self.splits.draw(digest), document)
        else:
            before = itertools.takewhile(lambda other: other is not source, self.sources)
            yield from self._by_characters(source, self._digests(before))

    def state(self, source: Source) -> dict[str, Any]:
        """What `parts(source)` depends on, as JSON."""
        units = [self.units[id(other)] for other in self.sources]
        others = self.sources if "character" in units and len(units) > 1 else [source]
        return {
            "source": source.state,
            "units": units,
            "sources": [other.state for other in others],
            "split": source.split,
            "fraction": dict(self.splits.fraction),
            "seed": self.splits.seed,
        }

    def _unit(self, source: Source) -> str:
        """What fractions draw from a source."""
        fraction = self.splits.fraction
        if source.split is not None or not fraction:
            return "whole"
        if self.splits.unit is not None:
            return self.splits.unit
        enough = math.ceil(ENOUGH / min(fraction.values()))
        return "document" if sum(1 for _ in itertools.islice(source.documents(), enough)) == enough else "character"

    def _digests(self, sources: Iterable[Source]) -> set[bytes]:
        """The documents of those sources that are cut by characters."""
        cut = (source for source in sources if self.units[id(source)] == "character")
        return {digest for source in cut for digest, _ in source.outline}

    def _by_characters(self, source: Source, seen: set[bytes]) -> Iterator[Part]:
        """Contiguous parts: train first, then each split in turn. A document on a border is cut in two."""
        lengths: list[int] = []  # 0: a repeat
        for digest, length in source.outline:
            lengths.append(0 if digest in seen else length)
            seen.add(digest)
        if (num_repeats := lengths.count(0)) and id(source) not in self._told:
            self._told.add(id(source))
            print(f"note: {source.name}: {num_repeats} repeated documents are left out", file=sys.stderr)
        total = sum(lengths)
        if num_repeats and not total:
            return
        sizes = {name: round(share * total) for name, share in self.splits.fraction.items()}
        sizes = {"train": total - sum(sizes.values()), **sizes}
        for name, size in sizes.items():
            if size < 2:
                raise DataError(
                    f"dataset.splits: {name} would hold {max(size, 0)} of {total} characters of {source.name}; a split "
                    "needs at least 2: use more text or other fractions"
                )
        names = iter(sizes)
        name = next(names)
        left = sizes[name]
        for document, length in zip(source.documents(), lengths, strict=True):
            start = 0
            while start < length:
                if not left:
                    name = next(names)
                    left = sizes[name]
                stop = start + min(left, length - start)
                yield Part(name, document, start, stop)
                start, left = stop, left - (stop - start)


def sources_of_files(path: str, files: Mapping[str, str], **options: Any) -> list[Source]:
    """`dataset.splits.file`: a file per split, beside `path` or in it, where it is a folder; the train file is divided.

    Raises DataError when one file serves two splits.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    places = {name: str(folder / file) for name, file in files.items()}
    if len({Path(place).resolve() for place in places.values()}) < len(places):
        raise DataError(f"dataset.splits.file: one file serves two splits ({dict(files)}); text would leak")
    return [
        Source.of_files(places[name], split=None if name == "train" else name, **options)
        for name in SPLITS
        if name in places
    ]
