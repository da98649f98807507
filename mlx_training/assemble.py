"""From a configuration to what a run is made of: tokenizer, data, spec; and a trained run read back."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_training import backend as backends
from mlx_training.backend import Backend, Runtime
from mlx_training.checkpoint import CheckpointStore, check_shapes
from mlx_training.checkpoint_files import MODEL, STATE, Checkpoint
from mlx_training.config import RunConfig, load_config
from mlx_training.config_checks import TEXT
from mlx_training.config_dataset import Augment
from mlx_training.config_model import PretrainedConfig, TimeSeriesConfig
from mlx_training.data.augment import Augmentation
from mlx_training.data.batch import Batch
from mlx_training.data.batching import Batches, eval_batches
from mlx_training.data.collate import collate
from mlx_training.data.importers import LABELLED, SUFFIXES, load_rows
from mlx_training.data.prompt import Encoded, PromptEncoder
from mlx_training.data.questions import QuestionDataset
from mlx_training.data.rows import Row
from mlx_training.data.splits import SPLITS, SplitSpec, load_splits
from mlx_training.data.text_data import TextData, load_text, vocabulary_size
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.environment import resolve_backend
from mlx_training.errors import CheckpointError, ConfigError, DataError
from mlx_training.notes import notes
from mlx_training.pretrained import frozen_tokenizer, longest_text, pretrained_spec, timeseries_spec
from mlx_training.spec import PretrainedSpec, Spec


@dataclass(frozen=True)
class RowData:
    """Rows, by split, and how they become tokens. Files are read when a split is asked for."""

    tokenizer: Tokenizer
    encoder: PromptEncoder
    config: RunConfig
    augmentation: Augmentation | None = None  # of training rows, when they are drawn

    @cached_property
    def splits(self) -> dict[str, Sequence[Row]]:
        """All rows. Those of files are checked here, so that the last one cannot end a run when its turn comes."""
        splits = _row_splits(self.config)
        if self.config.dataset.format != "questions":
            for rows in splits.values():
                self._check(rows)
        if self.augmentation is not None:
            generated = self.config.dataset.format == "questions"  # all alike
            for row in [splits["train"][0]] if generated else splits["train"]:
                self.augmentation.check(row)
        return splits

    def rows(self, split: str) -> Sequence[Row]:
        """The rows of a split."""
        return _pick(self.splits, split)

    def encode(self, row: Row) -> Encoded:
        """Prompt and answer."""
        return self.encoder.encode(row)

    def encode_prompt(self, row: Row, *, ablate: bool = False) -> Encoded:
        """Prompt alone, to generate from; `ablate` removes what the series say."""
        return self.encoder.encode(row, with_answer=False, ablate=ablate)

    def train_batches(self) -> Batches[Row, Encoded]:
        """Training micro-batches by index."""
        cache = self.config.dataset.format != "questions"
        training, seed = self.config.training, self.config.experiment.seed
        rows, size, by = self.rows("train"), training.batch_size, training.batch_by
        transform = self.augmentation.row if self.augmentation else None
        return Batches(rows, self.encode, size, seed, collate, batch_by=by, cache=cache, transform=transform)

    def eval_batches(self, split: str, batch_size: int, limit: int | None) -> Iterator[Batch]:
        """Every row of a split once (at most `limit`)."""
        return eval_batches(self.rows(split)[:limit], self.encode, batch_size, collate)

    def read(self, path: Path, *, with_answers: bool = True) -> Sequence[Row]:
        """Every row of another file, in this run's format if that can be, else by the file's suffix; checked."""
        data, by_suffix = self.config.dataset, SUFFIXES.get(path.suffix)
        first = data.splits.file.train if data.splits and data.splits.file else data.path
        own = SUFFIXES.get(Path(first or "").suffix) if data.format == "auto" else data.format
        is_raw = own is not None and own not in ("questions", *SUFFIXES.values())  # tsqa, m4, ...: several suffixes
        if own == by_suffix or (is_raw and by_suffix in (None, "jsonl", "parquet", "csv")):
            given = data.options.model_dump(exclude_none=True)
            rows = load_rows(path, own or "auto", classes=self._classes(path) if own in LABELLED else (), **given)
        else:
            rows = load_rows(path)
        self._check(rows, with_answers)
        return rows

    def _classes(self, path: Path) -> tuple[str, ...]:
        """The classes that this run's prompts list; without its data those of the file are all there are."""
        try:
            splits = vars(self).get("splits") or _row_splits(self.config)  # not checked row by row for that
            return splits["train"][0].options
        except DataError as error:
            print(f"note: the options of {path} come from that file alone; {error}", file=sys.stderr)
            return ()

    def _check(self, rows: Sequence[Row], with_answers: bool = True) -> None:
        for row in rows:
            self.encoder.check(row, with_answer=with_answers)


Data = RowData | TextData


@dataclass(frozen=True)
class Assembly:
    """What a configuration stands for, before any framework is chosen."""

    config: RunConfig
    spec: Spec
    data: Data


@dataclass(frozen=True)
class LoadedRun:
    """A trained run with its model on a backend."""

    config: RunConfig
    data: Data
    backend: Backend
    model: Any
    checkpoint: Checkpoint


def assemble(config: RunConfig, run: Path | None = None) -> Assembly:
    """Read the tokenizer and work out the spec. A tokenizer that is trained here is kept in `run`.

    Rows are read later (`RowData`), so that a run can be used where its training data is not. Raises ConfigError and
    DataError; vocabularies that disagree are found here, before the first step.
    """
    if isinstance(config.model, TimeSeriesConfig):
        spec = timeseries_spec(config.model)
        tokenizer = frozen_tokenizer(spec.llm)
        encoder = PromptEncoder(
            tokenizer,
            spec.encoder.patch_size,
            layout=config.model.layout,
            normalize=config.dataset.normalize,
            stats_in_text=config.dataset.stats_in_text,
            max_length=_max_length(config, spec),
            max_patches=spec.encoder.max_patches,
            max_series=spec.encoder.max_series,
        )
        return Assembly(config, spec, RowData(tokenizer, encoder, config, _augmentation(config.dataset.augment)))
    if isinstance(config.model, PretrainedConfig):
        return _assemble_pretrained(config, config.model)
    data = load_text(config, config.model, run)
    return Assembly(config, config.model.spec(vocabulary_size(config.model, data.tokenizer)), data)


def _assemble_pretrained(config: RunConfig, model: PretrainedConfig) -> Assembly:
    """Text in windows, or rows without series, as the LM's own tokenizer reads them."""
    spec = pretrained_spec(model)
    tokenizer, longest = frozen_tokenizer(spec.llm), longest_text(spec)
    if config.dataset.format not in TEXT:
        encoder = PromptEncoder(tokenizer, 0, max_length=_max_length(config, spec))
        return Assembly(config, spec, RowData(tokenizer, encoder, config))
    if longest and model.context_length > longest:
        raise ConfigError(
            f"model.context_length: given {model.context_length}; {model.llm_id} reads at most {longest} tokens"
        )
    return Assembly(config, spec, load_text(config, model, None, tokenizer))


def load_run(
    run: Path, backend: str | None = None, checkpoint: str | None = None, device: str | None = None
) -> LoadedRun:
    """A run on its own backend and device, or on others: its best checkpoint (else its latest), or the named one."""
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: no config.yaml; expected a run directory, as `mlx-training train` makes it")
    config = load_config(run / "config.yaml")
    if device is not None:
        config = config.model_copy(update={"device": device})
    assembly = assemble(config, run)
    store = CheckpointStore(run)
    loaded = store.best_or_latest() if checkpoint is None else store.load(store.named(checkpoint))
    try:
        check_fits(assembly.spec, loaded)
    except CheckpointError as error:
        if store.holds(loaded.path):
            raise
        raise CheckpointError(
            f"--checkpoint {checkpoint}: it is not one of {run} and does not fit it; give best, latest or a step of "
            f"that run, or the run that it is of.\n{error}"
        ) from None
    chosen = open_backend(config, backend)
    model = chosen.build(assembly.spec)
    chosen.load(model, loaded.model)
    return LoadedRun(config, assembly.data, chosen, model, loaded)


def check_fits(spec: Spec, checkpoint: Checkpoint) -> None:
    """CheckpointError, naming the checkpoint, unless it holds the table's parameters for this very frozen LM."""
    now, then = llm_sha256(spec), checkpoint.state.get("llm_sha256")
    if then is not None and now != then:
        raise CheckpointError(
            f"{checkpoint.path} was trained with another frozen LM (sha256 {then[:12]} in {STATE}, given "
            f"{str(now)[:12]}); set model.llm_id to the one it was trained with"
        )
    given = {name: array.shape for name, array in checkpoint.model.items()}
    check_shapes({name: param.shape for name, param in spec.params().items()}, given, checkpoint.path / MODEL)


def llm_sha256(spec: Spec) -> str | None:
    """Fingerprint of the frozen LM, if there is one."""
    return spec.llm.sha256 if isinstance(spec, PretrainedSpec) else None


def open_backend(config: RunConfig, name: str | None = None) -> Backend:
    """The configured backend (or `name` in its place) with the configured device and precision."""
    levers = config.performance.model_dump()
    runtime = Runtime(config.device, config.training.precision, config.training.gradient_checkpointing, **levers)
    return backends.get(resolve_backend(name or config.backend), runtime)


def validate(config: RunConfig) -> dict[str, Any]:
    """Everything that can be checked without a framework; a summary for people."""
    assembly = assemble(config)
    spec, data = assembly.spec, assembly.data
    first = data.train_batches().batch(0)
    groups: dict[str, int] = {}
    for param in spec.params().values():
        groups[param.group] = groups.get(param.group, 0) + param.size
    summary: dict[str, Any] = {
        "config": config.experiment.name,
        "backend": config.backend,
        "family": config.model.family,
        "trainable_parameters": groups,
        "vocabulary": data.tokenizer.vocab_size,
        "rows": {name: len(rows) for name, rows in data.splits.items()},
        "first_batch": {"tokens": list(first.tokens.shape), "supervised": first.num_supervised},
    }
    summary |= {"text": data.summary()} if isinstance(data, TextData) else {}
    found = notes(config.model, spec, data.tokenizer.vocab_size)
    return summary | ({"notes": found} if found else {})


def _max_length(config: RunConfig, spec: PretrainedSpec) -> int | None:
    """Most tokens of a row. ConfigError for more than learned positions allow."""
    given, most = config.dataset.max_length, spec.max_length
    if given is not None and most is not None and given > most:
        raise ConfigError(
            f"dataset.max_length: given {given}; {spec.llm.directory} has positions for {most} tokens (they are "
            f"learned); give at most {most}"
        )
    return given or longest_text(spec)


def _augmentation(given: Augment | None) -> Augmentation | None:
    if given is None:
        return None
    degrees = given.rotation_degrees
    x, y, z = degrees if isinstance(degrees, tuple) else (degrees,) * 3
    return Augmentation((x, y, z), given.roll_fraction, given.scale, given.jitter)


def _row_splits(config: RunConfig) -> dict[str, Sequence[Row]]:
    data = config.dataset
    limits = {name: getattr(data, f"num_samples_{name}") for name in SPLITS}
    if data.format == "questions":
        seed = config.experiment.seed
        return {name: QuestionDataset(seed, name, limits[name]) for name in SPLITS}
    assert data.path is not None and data.splits is not None, "the configuration checks this"
    options = data.options.model_dump(exclude_none=True)
    splits = load_splits(data.path, data.format, SplitSpec(**data.splits.model_dump(exclude_none=True)), **options)
    return {name: rows[: limits[name]] for name, rows in splits.items()}


def _pick(splits: dict[str, Any], name: str) -> Any:
    if name not in splits:
        raise DataError(f"this run has no split {name!r}; it has: {', '.join(splits)} (dataset.splits defines them)")
    return splits[name]
