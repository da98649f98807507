"""The text of a run: from `dataset` and `model.tokenizer` to batches of tokens."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.config_model import LanguageConfig, PretrainedConfig
from mlx_training.config_schema import RunConfig
from mlx_training.data.batch import Batch
from mlx_training.data.batching import Transform, eval_batches
from mlx_training.data.corpus import corpus_documents
from mlx_training.data.fill_in_the_middle import NUM_ADDED, FillInTheMiddle
from mlx_training.data.masking import MaskedDocuments, MaskedWindows, Masking
from mlx_training.data.packing import PackedDocuments, warn_of_cut
from mlx_training.data.splits import SPLITS
from mlx_training.data.text import Mixture, Rows, TextBatches, TextWindows
from mlx_training.data.text_files import Document, read_documents
from mlx_training.data.text_sources import Division, Source, TextSplits, sources_of_files
from mlx_training.data.token_cache import TokenStream, cached_streams, encode_parts
from mlx_training.data.tokenizer import Tokenizer, check_vocabulary, train_bpe
from mlx_training.errors import DataError

LARGE = 32 << 20  # bytes of text from which tokens are kept in a cache, asked or not


@dataclass(frozen=True)
class TextData:
    """Rows of tokens, by split: windows of a stream, or packed documents."""

    splits: dict[str, Rows | Mixture]
    tokenizer: Tokenizer
    config: RunConfig
    streams: dict[str, list[TokenStream]]  # of every source
    transform: Transform[Any] | None = None  # of training rows
    masking: Masking | None = None  # of every row, where the objective is masked

    def train_batches(self) -> TextBatches:
        """Training micro-batches by index."""
        rows, size = self.rows("train"), self.config.training.batch_size
        if len(rows) < size:
            raise DataError(
                f"training.batch_size {size} is larger than the training data: {self.sizes('train')['tokens']} tokens "
                f"make {len(rows)} row{'s' * (len(rows) != 1)} of {self.context_length}; set training.batch_size to "
                f"{max(len(rows), 1)} or less, or give a shorter context_length or more text"
            )
        return TextBatches(rows, size, self.config.experiment.seed, self.transform)

    def eval_batches(self, split: str, batch_size: int, limit: int | None) -> Iterator[Batch]:
        """Every row of a split once (at most `limit`), as it was written: nothing is turned around.

        Where tokens are hidden they are always the same ones.
        """
        return self._in_order(self.rows(split), batch_size, limit)

    def hidden_batches(self, tokens: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """A text of one's own for a masked model: every token once, some of them hidden."""
        assert self.masking is not None
        return self._in_order(MaskedWindows(tokens, self.masking), batch_size, None)

    def _in_order(self, rows: Rows | Mixture, batch_size: int, limit: int | None) -> Iterator[Batch]:
        def seen(index: int) -> Any:
            return self.masking.fixed(rows[index], index) if self.masking else rows[index]

        return eval_batches(range(min(len(rows), limit or len(rows))), seen, batch_size, rows.collate)

    def rows(self, split: str) -> Rows | Mixture:
        """The rows of a split."""
        if split not in self.splits:
            raise DataError(
                f"this run has no split {split!r}; it has: {', '.join(self.splits)} (dataset.splits defines them)"
            )
        return self.splits[split]

    @property
    def context_length(self) -> int:
        """Tokens of a training window."""
        return self.config.model.context_length  # type: ignore[union-attr]  # a language family has it

    def tokens(self, split: str) -> np.ndarray:
        """All tokens of a split, in order, int32 (N,)."""
        self.rows(split)
        return np.concatenate([stream.tokens for stream in self.streams[split]]).astype(np.int32)

    def read(self, path: Path) -> list[str]:
        """The documents of another file or folder, parted as this run's own are."""
        options = self.config.dataset.options.model_dump(exclude_none=True)
        given = {key: value for key, value in options.items() if key in ("separator", "text_column")}
        return ["".join(document.pieces()) for document in read_documents(path, **given)]

    def sizes(self, split: str) -> dict[str, int]:
        """Documents and tokens (special ones included) of a split; UTF-8 bytes and characters of its text alone."""
        self.rows(split)
        streams = self.streams[split]
        return {
            "documents": sum(stream.starts.size for stream in streams),
            "tokens": sum(stream.tokens.size for stream in streams),
            "bytes": sum(stream.num_bytes for stream in streams),
            "characters": sum(stream.num_characters for stream in streams),
        }

    def summary(self) -> dict[str, dict[str, Any]]:
        """What `validate` says of every split."""
        return {split: self._summary(split) for split in self.splits}

    def _summary(self, split: str) -> dict[str, Any]:
        sizes, rows = self.sizes(split), self.rows(split)
        found: dict[str, Any] = {**sizes, "bytes_per_token": round(sizes["bytes"] / sizes["tokens"], 4)}
        parts = rows.sources if isinstance(rows, Mixture) else [rows]
        packed = [part for part in parts if isinstance(part, PackedDocuments)]
        if packed:
            places = sum(len(part) for part in packed)
            found["packing_efficiency"] = round(sum(part.efficiency * len(part) for part in packed) / places, 4)
        if isinstance(rows, Mixture) and split == "train":
            found["rows_drawn_per_epoch"] = rows.draws()
        return found


def load_text(
    config: RunConfig, model: LanguageConfig | PretrainedConfig, run: Path | None, tokenizer: Tokenizer | None = None
) -> TextData:
    """Read, divide and tokenise the text of a configuration. A tokenizer that is made here is kept in `run`.

    That of a frozen LM is given.

    Raises DataError for text that cannot be used, and when the tokenizer has more ids than `model.vocab_size`.
    """
    data, training = config.dataset, config.training
    division = Division(_sources(config), _splits(config))
    if not isinstance(model, PretrainedConfig):
        tokenizer = text_tokenizer(model, division, run)
        vocabulary_size(model, tokenizer)
    assert tokenizer is not None, "a frozen LM has its own"
    fim: FillInTheMiddle | None = None
    masking: Masking | None = None
    if training.objective == "fill_in_the_middle":
        fim = FillInTheMiddle.of(tokenizer, training.fim_rate, training.fim_spm_rate, model.context_length)
    elif training.objective == "masked":
        masking = Masking.of(tokenizer, training.mask_rate, model.context_length)

    per_source = [_streams(config, division, source, tokenizer) for source in division.sources]
    rows: dict[str, Rows | Mixture] = {}
    streams: dict[str, list[TokenStream]] = {}
    for split in _split_names(division):
        kept = [(source, found[split]) for source, found in zip(division.sources, per_source) if split in found]
        kept = [(source, stream) for source, stream in kept if stream.tokens.size > 1]
        if not kept:
            total = sum(stream.starts.size for found in per_source for stream in found.values())
            raise DataError(
                f"dataset.splits: no text for {split!r} ({total} documents in all); use more text, larger fractions or "
                "dataset.splits.unit=character, which cuts the text by characters"
            )
        streams[split] = [stream for _, stream in kept]
        made: list[Rows] = []
        for source, stream in kept:
            if data.packing == "documents":
                reserve = NUM_ADDED if fim and split == "train" else 0
                seed = config.experiment.seed
                packed = (
                    MaskedDocuments(stream, masking, seed)
                    if masking
                    else PackedDocuments(stream, model.context_length, seed, reserve)
                )
                warn_of_cut(f"{source.name}, {split}", packed)
                made.append(packed)
            elif masking:
                made.append(MaskedWindows(stream.tokens, masking))
            else:
                made.append(TextWindows(stream.tokens, model.context_length))
        weights = [source.weight for source, _ in kept if source.weight is not None]
        rows[split] = made[0] if len(made) == 1 else Mixture(made, weights if split == "train" and weights else None)
    change: Transform[Any] | None = masking.row if masking else None
    if fim:
        change = fim.row if data.packing == "documents" else fim.window
    return TextData(rows, tokenizer, config, streams, change, masking)


def vocabulary_size(model: LanguageConfig, tokenizer: Tokenizer) -> int:
    """Ids that the model embeds: `model.vocab_size`, else the tokenizer's. DataError when that is too few."""
    size = model.vocab_size or tokenizer.vocab_size
    check_vocabulary(tokenizer.vocab_size, size, "model.vocab_size", f"Set it to {tokenizer.vocab_size} or to null")
    return size


def text_tokenizer(model: LanguageConfig, division: Division, run: Path | None) -> Tokenizer:
    """The tokenizer of a directory, the one this run has made, or one made now and kept in `run`.

    Without config.yaml a tokenizer in `run` is what an attempt with other text or settings left behind.
    """
    wanted = model.tokenizer
    if isinstance(wanted, str):
        return Tokenizer.load(wanted)
    if run is not None and (run / "config.yaml").is_file() and (run / "tokenizer").is_dir():
        return Tokenizer.load(run / "tokenizer")
    if wanted.load is not None:
        tokenizer = Tokenizer.load(wanted.load, wanted.special_tokens, wanted.pattern)
        if run is not None:
            tokenizer.save(run / "tokenizer")
        return tokenizer
    assert wanted.train is not None, "the configuration checks this"
    parts = (part for source in division.sources for part in division.parts(source) if part.split == "train")
    texts = (piece for part in parts for piece in part.pieces())
    if run is not None:
        return train_bpe(texts, wanted.train, run / "tokenizer", wanted.special_tokens)
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        return train_bpe(texts, wanted.train, directory, wanted.special_tokens)


def cache_folder(configured: str | None) -> Path:
    """Where token caches are: `dataset.cache_dir`, else below the user's cache directory."""
    if configured is not None:
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlx-training" / "tokens"


def _sources(config: RunConfig) -> list[Source]:
    data = config.dataset
    if data.format == "corpus":
        counts = {name: getattr(data, f"num_samples_{name}") for name in SPLITS}
        return [_generated(config.experiment.seed, name, count) for name, count in counts.items()]
    options = data.options.model_dump(exclude_none=True)
    if data.sources is not None:
        return [Source.of_files(**{**options, **entry.model_dump(exclude_none=True)}) for entry in data.sources]
    assert data.path is not None and data.splits is not None, "the configuration checks this"
    if data.splits.file is not None:
        return sources_of_files(data.path, data.splits.file.model_dump(exclude_none=True), **options)
    return [Source.of_files(data.path, **options)]


def _generated(seed: int, split: str, count: int) -> Source:
    documents = [Document(text) for text in corpus_documents(seed, split, count)]
    return Source(f"corpus, {split}", lambda: documents, split)


def _splits(config: RunConfig) -> TextSplits:
    splits = config.dataset.splits
    if splits is None:
        return TextSplits()
    fraction = splits.fraction.model_dump(exclude_none=True) if splits.fraction else {}
    return TextSplits(fraction, splits.seed, splits.unit)


def _split_names(division: Division) -> Sequence[str]:
    named = {source.split or "train" for source in division.sources} | {*division.splits.fraction}
    return [name for name in SPLITS if name in named]


def _streams(config: RunConfig, division: Division, source: Source, tokenizer: Tokenizer) -> Mapping[str, TokenStream]:
    """The tokens of a source: mapped from the cache when one is named or the text is large, else in memory."""
    configured = config.dataset.cache_dir
    if source.state is None or (configured is None and source.num_bytes < LARGE):
        return encode_parts(division.parts(source), tokenizer, source.max_tokens)
    folder = cache_folder(configured)

    def parts() -> Iterator[Any]:
        print(f"{source.name}: {source.num_bytes / 1e6:,.1f} MB of text become tokens in {folder}", file=sys.stderr)
        return division.parts(source)

    return cached_streams(folder, division.state(source), parts, tokenizer, source.max_tokens)
