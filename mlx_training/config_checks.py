"""What one key says about another: defaults that depend on other keys, and keys that contradict each other."""

import copy
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import reduce
from typing import TYPE_CHECKING, Any, cast

from mlx_training.config_model import FAMILIES, DecoderConfig, LanguageConfig, PretrainedConfig
from mlx_training.config_model_checks import Conflict, model_conflicts
from mlx_training.config_objectives import objective_conflicts
from mlx_training.config_performance import performance_conflicts
from mlx_training.config_presets import PRESETS
from mlx_training.optim import SETTINGS as OPTIM
from mlx_training.schedule import SETTINGS as SCHEDULE

if TYPE_CHECKING:
    from mlx_training.config_schema import RunConfig

GENERATED = ("questions", "corpus")  # formats that the project makes itself: no file
TEXT = ("corpus", "text")  # formats of language models; all others are rows about time series
PROMPTS = ("instruct", "jsonl", "parquet")  # formats of rows that need no series
CLASSES = ("question", "post_prompt", "channel_names", "label_names")
OPTIONS: dict[str, tuple[str, ...]] = {  # what each format reads of dataset.options
    "ts": CLASSES,
    "npz": (*CLASSES, "x", "y", "labels", "group"),
    "csv": (
        *CLASSES,
        *("series_columns", "value_columns", "answer_column"),
        *("question_column", "id_column", "group_column", "type_column"),
    ),
    "timeseriesexam": ("answer_with",),
    "m4": ("captions",),
    "ecg_qa_cot": ("records", "template_answers"),
    "text": ("text_column", "separator"),
}
ROWS = (  # keys that rows do not read
    *("dataset.sources", "dataset.packing", "dataset.cache_dir", "dataset.splits.unit"),
    *("training.objective", "training.fim_rate", "training.fim_spm_rate", "training.mask_rate", "evaluation.samples"),
)
# Keys that mean nothing there: changing one is an error, as it would be ignored.
UNREAD = {
    "timeseries": ROWS,
    "corpus": ("dataset.sources", "dataset.cache_dir"),
    "language": (  # every family on text
        *("dataset.augment", "dataset.normalize", "dataset.stats_in_text", "dataset.max_length", "training.batch_by"),
        *("evaluation.max_new_tokens", "evaluation.save_predictions"),
    ),
    "pretrained": (*ROWS, "dataset.augment", "dataset.normalize", "dataset.stats_in_text", "model.context_length"),
    "text": (
        *("dataset.num_samples_train", "dataset.num_samples_validation", "dataset.num_samples_test"),
        *("dataset.splits.group", "dataset.splits.by_group"),
    ),
}
RECOMPUTED = ("decoder", "pretrained", "timeseries")  # families that training.gradient_checkpointing is for
NUM_GENERATED = {"train": 100_000, "validation": 500, "test": 1000}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: mappings merge key by key, anything else (numbers, lists, null) replaces."""
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            merged[key] = merge(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def fill_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """Add the defaults that depend on other keys. Values of a wrong type are left for the type check."""
    filled = copy.deepcopy(dict(data))

    def section(name: str, within: dict[str, Any] = filled) -> dict[str, Any]:
        value = within.setdefault(name, {})
        return value if isinstance(value, dict) else {}

    def default(mapping: dict[str, Any], key: str, value: Any) -> None:
        if mapping.get(key) is None:
            mapping[key] = value

    default(filled, "output_dir", f"runs/{section('experiment').get('name', 'run')}")
    model, dataset = section("model"), section("dataset")
    family, preset = model.get("family"), model.get("preset")
    if isinstance(family, str) and isinstance(preset, str) and preset in PRESETS.get(family, {}):
        filled["model"] = model = merge(PRESETS[family][preset], model)
    decoder = model.get("decoder")
    if isinstance(decoder, dict) and "rms_norm_eps" in decoder:  # its name when older runs were made
        decoder.setdefault("norm_eps", decoder.pop("rms_norm_eps"))
    if model.get("layout") == "opentslm":
        default(section("encoder", model), "numeric_scale", False)
    if isinstance(family, str) and family in FAMILIES and family != "timeseries":
        default(section("evaluation"), "metrics", ["loss"])
        if dataset.get("format", "auto") == "auto":
            dataset["format"] = "text"
    training = section("training")
    for name, table in (("optimizer", OPTIM), ("schedule", SCHEDULE)):
        chosen = training.get(name, next(iter(table)))
        for key, value in (table.get(chosen, {}) if isinstance(chosen, str) else {}).items():
            default(training, key, value)
    if dataset.get("format") in [*GENERATED]:  # a list compares: what was given may not be hashable
        for split, num_samples in NUM_GENERATED.items():
            default(dataset, f"num_samples_{split}", num_samples)
    else:
        default(dataset, "splits", {})
        if not any(section("splits", dataset).get(kind) for kind in ("file", "group", "fraction")):
            section("splits", dataset)["fraction"] = {"validation": 0.1, "test": 0.1}
    return filled


def find_conflicts(config: "RunConfig") -> Iterator[Conflict]:
    """Every contradiction between keys that are each valid alone."""
    yield from model_conflicts(config.model)
    yield from _dataset_conflicts(config)
    yield from _training_conflicts(config)
    yield from objective_conflicts(config)
    yield from performance_conflicts(config)
    if isinstance(config.model, LanguageConfig):
        yield from _text_conflicts(config, config.model)


def _dataset_conflicts(config: "RunConfig") -> Iterator[Conflict]:
    data, family = config.dataset, config.model.family
    reads_text = _reads_text(config)
    readers = {"model.family": "language" if reads_text else family, "dataset.format": data.format}
    for reader, key in readers.items():
        for unread in UNREAD.get(key, ()):
            *sections, name = unread.split(".")
            section: Any = reduce(lambda node, part: getattr(node, part, None), sections, cast(Any, config))
            if section is None:  # generated data has no splits
                continue
            value, default = getattr(section, name), type(section).model_fields[name].default
            if value != default:
                named = family if reader == "model.family" else key
                if key == "language" and family == "pretrained":  # which reads rows as well
                    reader, named = "dataset.format", f"{data.format} (with family pretrained)"
                yield Conflict((unread, reader), f"{reader}: {named} does not read it; remove it")
    if isinstance(config.model, PretrainedConfig) and reads_text and data.packing == "documents":
        message = "documents is read by the decoder family; a frozen LM reads windows"
        yield Conflict(("dataset.packing", "model.family"), message)
    if isinstance(config.model, PretrainedConfig) and data.format not in TEXT + PROMPTS:
        message = f"given {data.format}; the pretrained family reads {', '.join(TEXT + PROMPTS)}"
        yield Conflict(("dataset.format", "model.family"), message)
    elif (data.format in TEXT) != reads_text and data.format != "auto":
        formats = ", ".join(TEXT) if reads_text else "rows about time series (questions, jsonl, npz, ...)"
        yield Conflict(("dataset.format", "model.family"), f"given {data.format}; the {family} family reads {formats}")
    if data.format != "auto":
        readable = OPTIONS.get(data.format, ())
        for name in data.options.model_dump(exclude_none=True):
            if name not in readable:
                message = f"the format {data.format} does not read it; it reads {', '.join(readable) or 'no options'}"
                yield Conflict((f"dataset.options.{name}", "dataset.format"), message)
    if data.format in GENERATED:
        for key, value in {"path": data.path, "splits": data.splits}.items():
            if value is not None:
                message = f"{data.format} is generated and has no {key}; remove this key or change dataset.format"
                yield Conflict((f"dataset.{key}", "dataset.format"), message)
    else:
        if data.path is not None and data.sources is not None:
            message = "both say where the text is; keep one of them (null removes a key)"
            yield Conflict(("dataset.sources", "dataset.path"), message)
        elif data.path is None and data.sources is None:
            message = "missing; give the file or folder of the data, as in dataset.path=FILE"
            yield Conflict(("dataset.path", "dataset.format"), message)
        yield from _split_conflicts(config)


def _text_conflicts(config: "RunConfig", model: LanguageConfig) -> Iterator[Conflict]:
    data, tokenizer = config.dataset, model.tokenizer
    if not isinstance(tokenizer, str):
        if (tokenizer.train is None) == (tokenizer.load is None):
            given = "neither is given" if tokenizer.train is None else "both are given (null removes a key)"
            message = f"{given}; exactly one of train and load"
            yield Conflict(("model.tokenizer.load", "model.tokenizer.train", "model.tokenizer"), message)
        elif tokenizer.pattern is not None and tokenizer.load is None:
            message = "it is read with the tiktoken file that model.tokenizer.load names; remove it"
            yield Conflict(("model.tokenizer.pattern", "model.tokenizer.load"), message)
    if data.packing == "documents" and not model.reads_segments:
        message = f"documents is read by the decoder family; {config.model.family} reads windows"
        yield Conflict(("dataset.packing", "model.family"), message)
    if data.packing == "documents" and isinstance(model, DecoderConfig) and "fixed" in model.decoder.mixers:
        message = "the blocks of fixed attention would cut documents; give packing: windows, or other mixers"
        yield Conflict(("dataset.packing", "model.decoder.mixers"), message)
    if data.sources is not None:
        weights = [source.weight is None for source in data.sources]
        if any(weights) and not all(weights):
            yield Conflict(("dataset.sources",), "some sources have a weight and some have none; give all or none")
        if data.splits is not None and data.splits.file is not None:
            message = "files per split go with dataset.path; sources are divided by fraction"
            yield Conflict(("dataset.splits.file", "dataset.sources"), message)


def _reads_text(config: "RunConfig") -> bool:
    is_text = config.dataset.format in TEXT
    return isinstance(config.model, LanguageConfig) or (isinstance(config.model, PretrainedConfig) and is_text)


def _split_conflicts(config: "RunConfig") -> Iterator[Conflict]:
    splits = config.dataset.splits
    assert splits is not None, "filled by fill_defaults"
    named: dict[str, str] = {}
    kinds = splits.model_dump(include={"file", "group", "fraction"}, exclude_none=True)
    for kind, entries in kinds.items():
        for name in entries:
            if name in named and name != "train":
                keys = (f"dataset.splits.{kind}.{name}", f"dataset.splits.{named[name]}.{name}")
                yield Conflict(keys, f"also defined by {named[name]}; remove one of them (null removes a key)")
            named.setdefault(name, kind)
    if (total := sum(kinds.get("fraction", {}).values())) >= 1:
        yield Conflict(("dataset.splits.fraction",), f"given {total:g} in all; it must leave some rows to train on")
    if splits.by_group and "fraction" not in kinds:
        yield Conflict(("dataset.splits.by_group",), "given true; it says how fractions are drawn, and none is given")
    seen: dict[str, str] = {}
    for name, groups in kinds.get("group", {}).items():
        for group in map(str, groups):
            if seen.setdefault(group, name) != name:
                keys = (f"dataset.splits.group.{name}", f"dataset.splits.group.{seen[group]}")
                yield Conflict(keys, f"group {group} is in {seen[group]} too; a group belongs to one split")
    for key in ("split", "test_split"):
        name = getattr(config.evaluation, key)
        if name not in (None, "train", *named):
            hint = f"name it in dataset.splits, e.g. dataset.splits.fraction.{name}=0.1"
            hint += " (or set this key to null)" if key == "test_split" else ""
            yield Conflict((f"evaluation.{key}", "dataset.splits"), f"the split {name} has no rows; {hint}")


def _training_conflicts(config: "RunConfig") -> Iterator[Conflict]:
    training, groups = config.training, config.model.groups
    if (training.max_steps is None) == (training.num_epochs is None):
        keys = ("training.max_steps", "training.num_epochs")
        steps, epochs = (f"{name}={getattr(training, name.removeprefix('training.'))}" for name in keys)
        message = f"both are given; to train {steps} add {keys[1]}=null, to train {epochs} add {keys[0]}=null"
        if training.max_steps is None:
            message = "neither is given; exactly one of max_steps and num_epochs"
        yield Conflict(keys, message)
    if isinstance(training.learning_rate, dict):
        for name in training.learning_rate:
            if name not in groups:
                hint = f"; did you mean {close[0]}?" if (close := get_close_matches(name, groups, 1)) else ""
                message = f"unknown group; the groups that train are {', '.join(groups)}{hint}"
                yield Conflict((f"training.learning_rate.{name}", "model.family"), message)
        if missing := [name for name in groups if name not in training.learning_rate]:
            message = f"no rate for {', '.join(missing)}; give every group that trains ({', '.join(groups)})"
            yield Conflict(("training.learning_rate", "model.family"), message)
    yield from _optimizer_conflicts(config)
    if not any(config.learning_rates.values()):
        yield Conflict(("training.learning_rate",), "every rate is 0, so nothing would train; give one above 0")
    evaluation, best = config.evaluation, config.checkpoint.best
    if best.removeprefix("eval/") not in evaluation.metrics:
        message = f"given {best}; evaluation.metrics has only {', '.join(evaluation.metrics) or 'nothing'}"
        yield Conflict(("checkpoint.best", "evaluation.metrics"), message)
    if (samples := evaluation.samples) and not samples.temperature:
        for key in ("top_k", "top_p", "min_p"):
            if getattr(samples, key) is not None:
                message = "temperature 0 always takes the most probable token; give a temperature above 0, e.g. 1"
                yield Conflict((f"evaluation.samples.{key}", "evaluation.samples.temperature"), message)
    if _reads_text(config) and {*evaluation.metrics} - {"loss"}:
        message = f"a {config.model.family} has no answers to score; give [loss]"
        yield Conflict(("evaluation.metrics", "model.family"), message)


def _optimizer_conflicts(config: "RunConfig") -> Iterator[Conflict]:
    training = config.training
    for name, table in (("optimizer", OPTIM), ("schedule", SCHEDULE)):
        chosen = getattr(training, name)
        for key in {key: None for settings in table.values() for key in settings if key not in table[chosen]}:
            if getattr(training, key) != type(training).model_fields[key].default:
                reads = ", ".join(table[chosen]) or "only the warm-up"
                message = f"{name}: {chosen} does not read it; it reads {reads}. Remove this key (null removes it)"
                yield Conflict((f"training.{key}", f"training.{name}"), message)
    if training.nesterov and not training.momentum:
        yield Conflict(
            ("training.nesterov", "training.momentum"), "given true without momentum; give e.g. momentum: 0.9"
        )
    if training.warmup_steps is not None:
        keys = ("training.warmup_steps", "training.warmup_fraction")
        if training.warmup_fraction != type(training).model_fields["warmup_fraction"].default:
            yield Conflict(keys, "both say how long the warm-up is; keep one of them")
        if training.max_steps is not None and training.warmup_steps > training.max_steps:
            message = f"given {training.warmup_steps}; the run has only {training.max_steps} steps (training.max_steps)"
            yield Conflict(("training.warmup_steps", "training.max_steps"), message)
    elif training.warmup_fraction + (training.decay_fraction or 0) > 1:
        keys = ("training.decay_fraction", "training.warmup_fraction")
        yield Conflict(keys, "warmup_fraction and decay_fraction make more than 1; lower one of them")
    if list(training.milestones or ()) != sorted({*(training.milestones or ())}):
        yield Conflict(("training.milestones",), f"given {list(training.milestones or ())}; they must rise")
    if training.gradient_checkpointing and config.model.family not in RECOMPUTED:
        message = (
            f"the {config.model.family} family has no such layers; it is for {', '.join(RECOMPUTED)}. Set it to false"
        )
        yield Conflict(("training.gradient_checkpointing", "model.family"), message)
    if training.gradient_checkpointing and isinstance(config.model, DecoderConfig) and config.model.decoder.experts:
        message = "given true; the balance of experts would get lost on the way. Set it to false"
        yield Conflict(("training.gradient_checkpointing", "model.decoder.experts"), message)
