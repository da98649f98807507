"""Every key of the configuration is read: changed alone, it changes what a run does, or raises.

What a run *does* is observed where it happens (batches, parameters, losses, files, predictions, what a tracker is
told), never in the configuration that is written back. A new key without a case fails the first test.
"""

import hashlib
import json
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from mlx_training import assemble as assembling
from mlx_training import generate
from mlx_training.assemble import TextData, assemble, open_backend
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import RunConfig, load_config
from mlx_training.data.rows import row_to_dict, write_rows
from mlx_training.errors import UserError
from mlx_training.tracking import read_metrics
from mlx_training.trainer import train
from tests.e2e.tiny import decoder_config, rows, save_tiny_llama, timeseries_config

HUB_ID = "someone/something"
SPLIT_FILES = "dataset={path: ., splits: {fraction: null, file: {train: rows.jsonl, validation: a.jsonl, test: a.jsonl}}}"

# Variations of the tiny configurations that a key needs beside it, as overrides.
BASES: dict[str, tuple[str, ...]] = {
    "rows": (),
    "epochs": ("training.max_steps=null", "training.num_epochs=1"),
    "early stop": ("training.max_steps=6", "training.early_stopping_patience=1", "training.early_stopping_min_delta=9"),
    "tracked": ("logging.wandb=offline",),
    "hub": (f"model.llm_id={HUB_ID}",),
    "untied stats": ("dataset.normalize=none",),
    "files": (SPLIT_FILES.replace("test: a.jsonl", "test: b.jsonl"),),
    "groups": ("dataset.splits={fraction: null, group: {validation: [g1], test: [g2]}}",),
    "npz": ("dataset={path: windows.npz, format: npz}",),
    "csv": ("dataset={path: table.csv, format: csv}",),
    "m4": ("dataset={path: m4.jsonl, format: m4}",),
    "ecg": ("dataset={path: ecg.jsonl, format: ecg_qa_cot, options: {records: records}}", "model.encoder.max_patches=12"),
    "decoder": (),
    "rope": ("model.decoder.rope_scaling={original_context_length: 16}",),
    "text": ("dataset={path: text.jsonl, format: text}", *(f"dataset.num_samples_{s}=null" for s in ("train", "test")),
             "dataset.num_samples_validation=null"),
    "text file": ("dataset={path: text.txt, format: text}", *(f"dataset.num_samples_{s}=null" for s in ("train", "test")),
                  "dataset.num_samples_validation=null"),
}  # fmt: skip
DECODERS = ("decoder", "rope", "text", "text file")

# key, base, overrides, and where the change must show
CASES: list[tuple[str, str, str, str]] = [
    ("experiment.name", "tracked", "experiment.name=other", "tracker"),
    ("experiment.seed", "rows", "experiment.seed=8", "losses"),
    ("experiment.tags", "tracked", "experiment.tags=[a, b]", "tracker"),
    ("experiment.notes", "tracked", "experiment.notes=why", "tracker"),
    ("output_dir", "rows", "output_dir=elsewhere", "place"),
    ("backend", "rows", "backend={other}", "backend"),
    ("device", "rows", "device={absent}", "error"),
    ("model.family", "rows", "model.family=decoder", "error"),
    ("model.preset", "rows", "model.preset=opentslm-sp", "data"),
    ("model.layout", "rows", "model.layout=opentslm", "data"),
    ("model.llm_id", "rows", "model.llm_id=other-llm", "losses"),
    ("model.llm_revision", "hub", "model.llm_revision=v2", "losses"),
    ("model.llm_weights", "rows", "model.llm_weights=resident", "frozen"),
    ("model.train_lm_head", "rows", "model.train_lm_head=true", "shapes"),
    ("model.encoder.patch_size", "rows", "model.encoder.patch_size=2", "data"),
    ("model.encoder.hidden_size", "rows", "model.encoder.hidden_size=16", "shapes"),
    ("model.encoder.num_layers", "rows", "model.encoder.num_layers=2", "shapes"),
    ("model.encoder.num_heads", "rows", "model.encoder.num_heads=4", "losses"),
    ("model.encoder.ffn_size", "rows", "model.encoder.ffn_size=12", "shapes"),
    ("model.encoder.max_patches", "rows", "model.encoder.max_patches=12", "shapes"),
    ("model.encoder.max_patches", "rows", "model.encoder={max_patches: 4, patch_size: 2}", "error"),
    ("model.encoder.dropout", "rows", "model.encoder.dropout=0.5", "losses"),
    ("model.encoder.numeric_scale", "rows", "model.encoder.numeric_scale=false", "shapes"),
    ("model.projector.norm_output", "rows", "model.projector.norm_output=false", "shapes"),
    ("model.projector.dropout", "rows", "model.projector.dropout=0.5", "losses"),
    ("model.decoder.hidden_size", "decoder", "model.decoder.hidden_size=32", "shapes"),
    ("model.decoder.intermediate_size", "decoder", "model.decoder.intermediate_size=32", "shapes"),
    ("model.decoder.num_layers", "decoder", "model.decoder.num_layers=2", "shapes"),
    ("model.decoder.num_heads", "decoder", "model.decoder.num_heads=4", "losses"),
    ("model.decoder.num_kv_heads", "decoder", "model.decoder.num_kv_heads=1", "shapes"),
    ("model.decoder.head_dim", "decoder", "model.decoder.head_dim=16", "shapes"),
    ("model.decoder.context_length", "decoder", "model.decoder.context_length=24", "data"),
    ("model.decoder.rope_theta", "decoder", "model.decoder.rope_theta=50", "losses"),
    ("model.decoder.rope_scaling.factor", "rope", "model.decoder.rope_scaling.factor=2", "losses"),
    ("model.decoder.rope_scaling.low_freq_factor", "rope", "model.decoder.rope_scaling.low_freq_factor=0.1", "losses"),
    ("model.decoder.rope_scaling.high_freq_factor", "rope", "model.decoder.rope_scaling.high_freq_factor=9", "losses"),
    ("model.decoder.rope_scaling.original_context_length", "rope",
     "model.decoder.rope_scaling.original_context_length=64", "losses"),
    ("model.decoder.rms_norm_eps", "decoder", "model.decoder.rms_norm_eps=0.1", "losses"),
    ("model.decoder.tie_word_embeddings", "decoder", "model.decoder.tie_word_embeddings=false", "shapes"),
    ("model.decoder.init_std", "decoder", "model.decoder.init_std=0.1", "losses"),
    ("model.tokenizer", "decoder", "model.tokenizer=other-llm", "data"),
    ("model.tokenizer.train", "decoder", "model.tokenizer.train=320", "data"),
    ("dataset.path", "rows", "dataset.path=a.jsonl", "data"),
    ("dataset.format", "rows", "dataset.format=parquet", "error"),
    ("dataset.splits.file.train", "files", "dataset.splits.file.train=c.jsonl", "data"),
    ("dataset.splits.file.validation", "files", "dataset.splits.file.validation=c.jsonl", "data"),
    ("dataset.splits.file.test", "files", "dataset.splits.file.test=c.jsonl", "data"),
    ("dataset.splits.group.train", "groups", "dataset.splits.group.train=[g0]", "data"),
    ("dataset.splits.group.validation", "groups", "dataset.splits.group.validation=[g3]", "data"),
    ("dataset.splits.group.test", "groups", "dataset.splits.group.test=[g2, g3]", "data"),
    ("dataset.splits.fraction.validation", "rows", "dataset.splits.fraction.validation=0.5", "data"),
    ("dataset.splits.fraction.test", "rows", "dataset.splits.fraction.test=0.5", "data"),
    ("dataset.splits.by_group", "rows", "dataset.splits.by_group=true", "data"),
    ("dataset.splits.seed", "rows", "dataset.splits.seed=1", "data"),
    ("dataset.num_samples_train", "rows", "dataset.num_samples_train=5", "data"),
    ("dataset.num_samples_validation", "rows", "dataset.num_samples_validation=5", "data"),
    ("dataset.num_samples_test", "rows", "dataset.num_samples_test=5", "data"),
    ("dataset.num_samples_train", "decoder", "dataset.num_samples_train=50", "data"),
    ("dataset.num_samples_validation", "decoder", "dataset.num_samples_validation=5", "data"),
    ("dataset.num_samples_test", "decoder", "dataset.num_samples_test=5", "data"),
    ("dataset.normalize", "rows", "dataset.normalize=none", "data"),
    ("dataset.stats_in_text", "rows", "dataset.stats_in_text=false", "data"),
    ("dataset.max_length", "rows", "dataset.max_length=45", "data"),
    ("dataset.max_length", "rows", "dataset.max_length=20", "error"),
    ("dataset.options.question", "npz", "dataset.options.question=Which?", "data"),
    ("dataset.options.post_prompt", "npz", "dataset.options.post_prompt=So?", "data"),
    ("dataset.options.channel_names", "npz", "dataset.options.channel_names=[left, right]", "data"),
    ("dataset.options.label_names", "npz", "dataset.options.label_names={up: rising}", "data"),
    ("dataset.options.x", "npz", "dataset.options.x=X2", "data"),
    ("dataset.options.y", "npz", "dataset.options.y=y2", "data"),
    ("dataset.options.labels", "npz", "dataset.options.labels=labels2", "data"),
    ("dataset.options.group", "npz", "dataset.options.group=recording", "data"),
    ("dataset.options.series_columns", "csv", "dataset.options.series_columns=[series2]", "data"),
    ("dataset.options.value_columns", "csv", "dataset.options.value_columns=[v0, v3]", "data"),
    ("dataset.options.answer_column", "csv", "dataset.options.answer_column=kind", "data"),
    ("dataset.options.question_column", "csv", "dataset.options.question_column=ask", "data"),
    ("dataset.options.id_column", "csv", "dataset.options.id_column=name", "data"),
    ("dataset.options.group_column", "csv", "dataset.options.group_column=kind", "data"),
    ("dataset.options.type_column", "csv", "dataset.options.type_column=kind", "data"),
    ("dataset.options.captions", "m4", "dataset.options.captions=captions.csv", "data"),
    ("dataset.options.records", "ecg", "dataset.options.records=other", "error"),
    ("dataset.options.template_answers", "ecg", "dataset.options.template_answers=answers.csv", "data"),
    ("dataset.options.text_column", "text", "dataset.options.text_column=other", "data"),
    ("dataset.options.separator", "text file", "dataset.options.separator='---'", "data"),
    ("training.max_steps", "rows", "training.max_steps=3", "steps"),
    ("training.num_epochs", "epochs", "training.num_epochs=2", "steps"),
    ("training.batch_size", "rows", "training.batch_size=3", "data"),
    ("training.grad_accumulation_steps", "rows", "training.grad_accumulation_steps=2", "losses"),
    ("training.optimizer", "rows", "training.optimizer=sgd", "error"),
    ("training.betas", "rows", "training.betas=[0.5, 0.999]", "parameters"),
    ("training.betas", "rows", "training.betas=[0.9, 0.5]", "parameters"),
    ("training.eps", "rows", "training.eps=1e-3", "parameters"),
    ("training.learning_rate", "rows", "training.learning_rate=2e-2", "parameters"),
    ("training.learning_rate", "rows", "training.learning_rate={encoder: 1e-2, projector: 0}", "parameters"),
    ("training.schedule", "rows", "training.schedule=constant", "rates"),
    ("training.warmup_fraction", "rows", "training.warmup_fraction=0.5", "rates"),
    ("training.min_lr_fraction", "rows", "training.min_lr_fraction=0.5", "rates"),
    ("training.weight_decay", "rows", "training.weight_decay=0.5", "parameters"),
    ("training.grad_clip_norm", "rows", "training.grad_clip_norm=1e-6", "parameters"),
    ("training.precision", "rows", "training.precision=bfloat16", "losses"),
    ("training.early_stopping_patience", "early stop", "training.early_stopping_patience=2", "steps"),
    ("training.early_stopping_min_delta", "early stop", "training.early_stopping_min_delta=0", "steps"),
    ("training.init_from", "rows", "training.init_from=start", "losses"),
    ("evaluation.every_steps", "rows", "evaluation.every_steps=1", "evaluations"),
    ("evaluation.split", "rows", "evaluation.split=test", "evaluations"),
    ("evaluation.test_split", "rows", "evaluation.test_split=null", "predictions"),
    ("evaluation.metrics", "rows", "evaluation.metrics=[loss, macro_f1]", "evaluations"),
    ("evaluation.max_new_tokens", "rows", "evaluation.max_new_tokens=2", "predictions"),
    ("evaluation.batch_size", "rows", "evaluation.batch_size=3", "evaluation batches"),
    ("evaluation.max_rows", "rows", "evaluation.max_rows=2", "evaluations"),
    ("evaluation.save_predictions", "rows", "evaluation.save_predictions=false", "files"),
    ("checkpoint.every_steps", "rows", "checkpoint.every_steps=3", "files"),
    ("checkpoint.keep", "rows", "checkpoint.keep=1", "files"),
    ("checkpoint.best", "rows", "checkpoint.best=eval/accuracy", "best"),
    ("logging.every_steps", "rows", "logging.every_steps=4", "lines"),
    ("logging.wandb", "tracked", "logging.wandb=online", "tracker"),
    ("logging.project", "tracked", "logging.project=other", "tracker"),
]  # fmt: skip

# A change in what a run is made of shows everywhere; these keys act later and must leave it alone.
LATER = ("parameters", "rates", "evaluations", "predictions", "evaluation batches", "files", "best", "lines", "tracker")


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys; of a union, those of every branch."""
    for name, field in section.model_fields.items():
        for branch in branches(field.annotation):
            if isinstance(branch, type) and issubclass(branch, BaseModel):
                yield from leaves(branch, f"{prefix}{name}.")
            elif branch is not type(None):
                yield prefix + name


def branches(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from branches(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from branches(argument)
    else:
        yield annotation


def test_every_key_has_a_case() -> None:
    keys = set(leaves(RunConfig))
    assert len(keys) > 100 and {"training.learning_rate", "model.tokenizer.train", "model.encoder.dropout"} <= keys
    assert {key for key, *_ in CASES} == keys


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_llm: Path) -> Path:
    """A folder with every file that a case names."""
    folder = tmp_path_factory.mktemp("keys")
    save_tiny_llama(folder / "other-llm", vocab_size=400)
    for name, start in (("rows", 0), ("a", 100), ("b", 200), ("c", 300)):
        write_rows(folder / f"{name}.jsonl", rows(32, start=start))
    (folder / "rows.yaml").write_text(timeseries_config(tiny_llm, Path("rows.jsonl"), Path("run")))
    (folder / "decoder.yaml").write_text(decoder_config(Path("run")))

    rng = np.random.default_rng(0)
    arrays = {
        **{name: rng.standard_normal((32, 12, 2)) for name in ("X", "X2")},
        **{name: rng.integers(0, 2, 32) for name in ("y", "y2")},
        "labels": np.array(["down", "up"]), "labels2": np.array(["low", "up"]),
        "subject": np.arange(32), "recording": np.arange(32) // 2,
    }
    np.savez(folder / "windows.npz", **arrays)
    lines = ["name,kind,label,ask,series,series2,v0,v1,v2,v3"]
    for i, row in enumerate(rows(32)):
        series = json.dumps(row.series[0].tolist())
        lines.append(f'n{i},{row.type},{row.answer},Why {i % 3},"{series}","[{i}, 1.0]",1,2,3,{i}')
    (folder / "table.csv").write_text("\n".join(lines) + "\n")

    series = [row_to_dict(row)["series"][0] for row in rows(32)]
    write_objects(folder / "m4.jsonl", [{"id": f"m{i}", "series": s, "caption": "up"} for i, s in enumerate(series)])
    (folder / "captions.csv").write_text("id,caption\n" + "".join(f"m{i},down\n" for i in range(32)))
    ecg = {"template_id": "t", "question_type": "q", "rationale": "Answer: yes", "question": "Is it?"}
    write_objects(folder / "ecg.jsonl", [{**ecg, "ecg_id": i + 1} for i in range(32)])
    (folder / "answers.csv").write_text('template_id,classes\nt,"[""yes"", ""no""]"\n')
    (folder / "records/00000").mkdir(parents=True)
    for i in range(1, 33):
        (folder / f"records/00000/{i:05d}_hr.hea").write_text(f"{i:05d}_hr 1 500 40\n{i:05d}_hr.dat 16 1000.0(0)/mV 16 0\n")
        rng.integers(-99, 99, 40).astype("<i2").tofile(folder / f"records/00000/{i:05d}_hr.dat")
    texts = [{"text": f"The {i} is less than {i + 1}.", "other": f"Then {i * i} follows."} for i in range(40)]
    write_objects(folder / "text.jsonl", texts)
    (folder / "text.txt").write_text("---".join(text["text"] for text in texts))
    return folder


def write_objects(path: Path, objects: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in objects))


class FakeWandb(types.ModuleType):
    """Remembers what a tracker is told, without the configuration, which is an echo."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.told: dict[str, Any] = {}

    def init(self, **given: Any) -> Any:
        self.told = {key: value for key, value in given.items() if key not in ("config", "dir")}
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)


@pytest.fixture(scope="module")
def observe(world: Path, tiny_llm: Path) -> Iterator[Any]:
    """observe(base, *overrides): everything that a run does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        wandb = FakeWandb()
        patch.setitem(sys.modules, "wandb", wandb)
        revisions = {None: tiny_llm, "v2": world / "other-llm"}
        patch.setattr("huggingface_hub.snapshot_download", lambda _, *, revision, **__: str(revisions[revision]))
        sizes: list[int] = []
        for module in (assembling, generate):
            patch.setattr(module, "eval_batches", recording(module.eval_batches, sizes))
        runs = iter(range(1000))

        def observe(base: str, *overrides: str) -> dict[str, Any]:
            sizes.clear()
            wandb.told = {}
            place = [f"output_dir=run{next(runs)}"]
            config = "decoder.yaml" if base in DECODERS else "rows.yaml"
            try:
                return look(load_config(config, [*BASES[base], *place, *overrides]), sizes, wandb)
            except UserError as error:
                return {"error": str(error)}

        train(load_config("rows.yaml", ["output_dir=start", "experiment.seed=9"]))  # for training.init_from
        yield cache(observe)


def recording(eval_batches: Any, sizes: list[int]) -> Any:
    def record(*args: Any) -> Any:
        for batch in eval_batches(*args):
            sizes.append(len(batch.rows))
            yield batch

    return record


def look(config: RunConfig, sizes: list[int], wandb: FakeWandb) -> dict[str, Any]:
    """Train, and say what was done."""
    result = train(config)
    run = Path(config.output_dir)
    records = read_metrics(run / "metrics.jsonl")
    training = [record for record in records if "loss" in record]
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    model = CheckpointStore(run).load().model
    return {
        "error": None,
        "place": run,
        "backend": result["backend"],
        "steps": result["steps"],
        "data": fingerprint_data(config),
        "shapes": {name: array.shape for name, array in model.items()},
        "parameters": hashlib.sha256(b"".join(model[name].tobytes() for name in sorted(model))).hexdigest(),
        "losses": [record["loss"] for record in training],
        "rates": [{k: v for k, v in record.items() if k.startswith("lr/")} for record in training],
        "lines": [(record["step"], sorted(record)) for record in records],
        "evaluations": [
            {k: v for k, v in record.items() if k == "step" or k.startswith("eval/")}
            for record in records
            if "loss" not in record
        ],
        "files": files,
        "best": (run / "checkpoints/best").read_text(),
        "predictions": {name: (run / name).read_text() for name in files if name.startswith("predictions")},
        "evaluation batches": list(sizes),
        "tracker": wandb.told,
    }


def fingerprint_data(config: RunConfig) -> str:
    """Every row or token of every split, and the first two training batches."""
    data = assemble(config).data
    digest = hashlib.sha256()
    for name, split in data.splits.items():
        content = split.tokens.tolist() if isinstance(data, TextData) else [row_to_dict(row) for row in split]
        digest.update(f"{name}: {content}".encode())
    for index in range(2):
        for name, array in data.train_batches().batch(index).arrays().items():
            digest.update(f"{name}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(("key", "base", "override", "where"), CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_the_key_is_read(key: str, base: str, override: str, where: str, observe: Any, backends: list[str]) -> None:
    before = observe(base)
    assert before.get("error") is None, before["error"]
    if where == "frozen":
        hashes = {frozen_hash(*BASES[base], *extra) for extra in ((), (override,))}
        assert len(hashes) == 2
        return
    other = "mlx" if before["backend"] == "torch" else "torch"
    absent = "mps" if before["backend"] == "mlx" or sys.platform != "darwin" else "cuda"
    after = observe(base, override.replace("{other}", other).replace("{absent}", absent))
    if where == "backend" and other not in backends:
        where = "error"
    if where != "error":
        assert after["error"] is None, after["error"]
    assert after[where] != before[where]
    if where in LATER:
        assert (after["data"], after["shapes"]) == (before["data"], before["shapes"])


def frozen_hash(*overrides: str) -> str:
    config = load_config("rows.yaml", overrides)
    backend = open_backend(config)
    return backend.frozen_hash(backend.build(assemble(config).spec))
