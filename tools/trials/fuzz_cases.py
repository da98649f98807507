"""The cases of the trial `fuzz`: a command, and the spoilt files that it reads."""

import hashlib
import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow
from hypothesis import strategies as st

from tools.trials.fuzz_archives import spoil_arrays, spoil_npz
from tools.trials.fuzz_material import MATERIAL, TIMESERIES, Format, cheap, config_texts, content, formats
from tools.trials.fuzz_mutations import (
    SCALARS,
    Draw,
    index,
    pick,
    several,
    spoil_bytes,
    spoil_json,
    spoil_yaml,
)

FORMATS = formats()
CONFIGS = config_texts()
RUN_FILES = ("config.yaml", "result.json", "metrics.jsonl", "gradients.jsonl", "train.lock", "env.json")
STEP = "checkpoints/step_00000002"
CHECKPOINT_FILES = (f"{STEP}/state.json", f"{STEP}/manifest.json", "checkpoints/latest", "checkpoints/best")
LLM_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
ROWS = f"{TIMESERIES}dataset: {{path: {MATERIAL}/rows.jsonl, splits: {{fraction: {{validation: 0.2, test: 0.2}}}}}}\n"
KEYS = """\
experiment.name experiment.seed experiment.tags output_dir backend device model model.family model.preset model.layout
model.llm_id model.llm_weights model.train_lm_head model.encoder model.encoder.patch_size model.encoder.hidden_size
model.encoder.max_patches model.encoder.max_series model.encoder.dropout model.encoder.pos_init_std model.projector
model.projector.norm_output model.decoder model.decoder.rope_theta model.decoder.rope_scaling model.tokenizer dataset
dataset.path dataset.format dataset.splits dataset.splits.file dataset.splits.group dataset.splits.fraction
dataset.splits.fraction.test dataset.splits.by_group dataset.splits.seed dataset.num_samples_train dataset.normalize
dataset.stats_in_text dataset.max_length dataset.options dataset.options.label_names dataset.options.channel_names
training training.max_steps training.batch_size training.betas training.eps training.learning_rate training.schedule
training.warmup_fraction training.weight_decay training.grad_clip_norm training.precision training.init_from evaluation
training.early_stopping_patience evaluation.every_steps evaluation.split evaluation.test_split evaluation.metrics
evaluation.max_rows checkpoint.every_steps checkpoint.keep checkpoint.best logging.every_steps logging.wandb
diagnostics.probe_every_steps diagnostics.max_skipped_steps diagnostics.spike_factor trainig . .. a.b.c a..b é
""".split()  # noqa: SIM905
FLAGS = """\
--resume --resume=auto --resume=run/checkpoints/step_00000002 --resume=.. --allow-change --allow-change=training
--allow-change=a.b --backend=both --backend --json -- -x --help --full
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Case:
    """One command and its files, relative to the case's folder. `run`: the trained run that `run/` is a copy of."""

    kind: str
    argv: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    run: str = ""
    writes: str = ""  # the output_dir that was asked for, where it is another
    spoilt: str = ""  # the file to show


@st.composite
def cases(draw: Draw) -> Case:
    """Any case: two in five spoil rows, the others configurations, words of the command line, runs and LMs."""
    make = pick(draw, (rows, rows, rows, rows, yaml, yaml, yaml, overrides, checkpoint, checkpoint, checkpoint, llm))
    case = make(draw)
    return replace(case, argv=tuple(word.replace("\0", "") for word in case.argv))


def yaml(draw: Draw) -> Case:
    """A shipped configuration, spoilt."""
    name = pick(draw, sorted(CONFIGS))
    text = several(draw, CONFIGS[name], spoil_yaml)
    files = {f"inputs/{other}": CONFIGS[other].encode() for other in ("stage1.yaml",)}
    files[f"inputs/{name}"] = text.encode("utf-8", "surrogateescape")
    verb = pick(draw, ("validate", "validate", "validate", "plan", "train"))
    small = [] if verb == "plan" else cheap(CONFIGS[name])
    return Case("yaml", (verb, f"inputs/{name}", *small, *_place()), files, spoilt=f"inputs/{name}")


def overrides(draw: Draw) -> Case:
    """Words after a sound configuration, and words in its place."""
    family = pick(draw, ("timeseries", "timeseries", "decoder"))
    config = pick(
        draw, (f"{MATERIAL}/{family}.yaml",) * 12 + ("quick_tset", "inputs", "pipe", "/dev/zero", "x" * 5000, "é")
    )
    words = []
    writes = ""
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.integers(0, 9))
        if kind <= 6:
            key, value = pick(draw, KEYS), pick(draw, SCALARS)
            writes = value if key == "output_dir" else writes
            words.append(f"{key}={value}")
        else:
            words.append(pick(draw, FLAGS) if kind <= 8 else draw(st.text(max_size=20)))
    verb = pick(draw, ("validate",) * 5 + ("train", "train", "plan", "plan", "chekpoint", "checkpoint ls"))
    small = [] if verb == "plan" else cheap(f"family: {family}")
    place = [] if writes and not any(word.startswith("output_dir=") for word in words[:-1]) else _place()
    return Case("overrides", (*verb.split(), config, *words, *small, *place), writes=writes)


def rows(draw: Draw) -> Case:
    """A file of rows, spoilt, in any format; read by training, or by a run that is there."""
    form = pick(draw, FORMATS)
    name = f"inputs/{form.file}"
    files = {f"inputs/{other}": data for other, data in form.others.items()}
    files[name] = _spoilt_rows(draw, form)
    if form.others and draw(st.booleans()):
        other = pick(draw, sorted(form.others))
        files[f"inputs/{other}"] = several(draw, form.others[other], spoil_bytes)
    if form.name in ("jsonl", "parquet", "csv", "npz") and draw(st.integers(0, 5)) == 0:
        verb = pick(draw, (("evaluate", "--data"), ("generate", "--rows")))
        return Case(f"rows/{form.name}", (verb[0], "run", verb[1], name), files, "timeseries", spoilt=name)
    files["inputs/config.yaml"] = form.config(name).encode()
    verb = pick(draw, ("validate",) * 12 + ("train", "plan"))
    return Case(f"rows/{form.name}", (verb, "inputs/config.yaml", *_place()), files, spoilt=name)


def _spoilt_rows(draw: Draw, form: Format) -> bytes:
    """As text and bytes, or as values that are then written."""
    suffix = Path(form.file).suffix
    data = content(form, form.value)
    if suffix == ".npz":
        with np.load(io.BytesIO(data)) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return content(form, several(draw, arrays, spoil_arrays)) if draw(st.booleans()) else spoil_npz(draw, data)
    if not isinstance(form.value, list) or draw(st.integers(0, 3)) == 0:
        is_text = suffix != ".parquet" and draw(st.booleans())
        return (
            several(draw, data.decode(), _spoil_text).encode("utf-8", "surrogateescape")
            if is_text
            else several(draw, data, spoil_bytes)
        )
    at = index(draw, len(form.value))
    if suffix == ".json":
        return spoil_json(draw, form.value).encode()
    if suffix == ".jsonl":
        lines = data.decode().splitlines()
        lines[at] = spoil_json(draw, form.value[at])
        return "\n".join(lines).encode()
    try:
        return content(form, [*form.value[:at], json.loads(spoil_json(draw, form.value[at])), *form.value[at + 1 :]])
    except (ValueError, TypeError, RecursionError, OverflowError, AttributeError, pyarrow.ArrowException):
        return several(draw, data, spoil_bytes)  # the format cannot hold it


def _spoil_text(draw: Draw, text: str) -> str:
    """Numbers, words and lines replaced, as in YAML."""
    return spoil_yaml(draw, text.replace(",", ", ")) if draw(st.booleans()) else spoil_yaml(draw, text)


def checkpoint(draw: Draw) -> Case:
    """A run with a spoilt file; half of the time the sums are made again, so that what it says is believed."""
    run = pick(draw, ("timeseries", "timeseries", "decoder"))
    name = pick(draw, (*CHECKPOINT_FILES, *CHECKPOINT_FILES, *RUN_FILES))
    data = (material() / run / name).read_bytes() if (material() / run / name).exists() else b'{"pid": 1}\n'
    data = _spoilt_json(draw, name, data)
    files = {f"run/{name}": data, "inputs/config.yaml": (material() / f"{run}.yaml").read_bytes()}
    if name.endswith("state.json") and draw(st.integers(0, 3)):
        files[f"run/{STEP}/manifest.json"] = _manifest(run, data)
    resume = ("train", "inputs/config.yaml", "--resume", "auto", "output_dir=run", "training.max_steps=3")
    generate = ("generate", "run", "--rows", f"{MATERIAL}/rows.jsonl")
    looks = (
        ("checkpoint", "ls", "run"),
        ("checkpoint", "verify", "run"),
        ("checkpoint", "diff", "run", f"{MATERIAL}/{run}"),
    )
    form = "hf" if run == "decoder" else "opentslm"
    export = ("checkpoint", "export", "run", "--to", "run/export", "--format", form)
    argv = pick(draw, (resume, resume, resume, ("evaluate", "run"), generate, *looks, export, ("doctor", "run")))
    argv = resume if argv[0] == "doctor" and draw(st.integers(0, 5)) else argv
    kind = "checkpoint" if name in CHECKPOINT_FILES else "run"
    return Case(
        f"{kind}/{Path(name).name}",
        (*argv, *(("--json",) if draw(st.booleans()) else ())),
        files,
        run,
        spoilt=f"run/{name}",
    )


def _spoilt_json(draw: Draw, name: str, data: bytes) -> bytes:
    if name.endswith((".yaml", "latest", "best")) or draw(st.integers(0, 3)) == 0:
        text = data.decode() if name.endswith(".yaml") else ""
        return several(draw, text, spoil_yaml).encode("utf-8", "surrogateescape") if text else spoil_bytes(draw, data)
    if not name.endswith(".jsonl"):
        return spoil_json(draw, json.loads(data)).encode()
    lines = data.decode().splitlines()
    at = index(draw, len(lines))
    lines[at] = spoil_json(draw, json.loads(lines[at]))
    return "\n".join(lines).encode()


def _manifest(run: str, state: bytes) -> bytes:
    """What the program itself writes for these files."""
    files = {}
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        data = state if name == "state.json" else (material() / run / STEP / name).read_bytes()
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    return (json.dumps({"format": 1, "files": files}, indent=1) + "\n").encode()


def llm(draw: Draw) -> Case:
    """A frozen LM's directory with a spoilt file."""
    name = pick(draw, LLM_FILES)
    files = {f"inputs/llm/{other}": (material() / "llm" / other).read_bytes() for other in LLM_FILES}
    data = files[f"inputs/llm/{name}"]
    if name.endswith(".safetensors"):  # its header
        size = int.from_bytes(data[:8], "little")
        header = spoil_json(draw, json.loads(data[8 : 8 + size])).encode()
        size = len(header) if draw(st.booleans()) else draw(st.integers(0, 2**64 - 1))
        data = size.to_bytes(8, "little") + header + data[8 + size :]
    else:
        value = json.loads(data)
        data = spoil_json(draw, value).encode() if draw(st.integers(0, 3)) else spoil_bytes(draw, data)
    files[f"inputs/llm/{name}"] = data
    verb = pick(draw, ("validate", "validate", "plan", "train"))
    return Case(
        f"llm/{name}",
        (verb, f"{MATERIAL}/timeseries.yaml", "model.llm_id=inputs/llm", *_place()),
        files,
        spoilt=f"inputs/llm/{name}",
    )


def material() -> Path:
    """The folder that `prepare` filled, from a case's folder."""
    return Path(MATERIAL)


def _place() -> tuple[str, ...]:
    return ("output_dir=run",)
