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
from mlx_training.json_lines import read_metrics
from mlx_training.samples import SAMPLES
from mlx_training.trainer import train
from tests.e2e.every_key_cases import BASES, CASES, DECODERS, FILES, PRETRAINED
from tests.e2e.tiny import (
    decoder_config,
    language_config,
    pretrained_config,
    rows,
    save_tiny_llama,
    timeseries_config,
)

# A change in what a run is made of shows everywhere; these keys act later and must leave it alone.
LATER = (
    "parameters",
    "rates",
    "evaluations",
    "predictions",
    "evaluation batches",
    "files",
    "best",
    "lines",
    "tracker",
    "samples",
)


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
    for file in {*FILES.values()}:
        (folder / file).write_text(language_config(Path("run"), file.removesuffix(".yaml")))
    (folder / "pretrained.yaml").write_text(pretrained_config(tiny_llm, Path("text.jsonl"), Path("run")))

    rng = np.random.default_rng(0)
    arrays = {
        **{name: rng.standard_normal((32, 12, 2)) for name in ("X", "X2")},
        **{name: rng.integers(0, 2, 32) for name in ("y", "y2")},
        "axes": np.arange(32 * 12 * 3.0).reshape(32, 12, 3),
        "labels": np.array(["down", "up"]),
        "labels2": np.array(["low", "up"]),
        "subject": np.arange(32),
        "recording": np.arange(32) // 2,
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
    exam = {"question": "Which way?", "options": "['up', 'down']", "answer": "up"}
    (folder / "exam.json").write_text(json.dumps([{**exam, "ts": s} for s in series]))
    ecg = {"template_id": "t", "question_type": "q", "rationale": "Answer: yes", "question": "Is it?"}
    write_objects(folder / "ecg.jsonl", [{**ecg, "ecg_id": i + 1} for i in range(32)])
    (folder / "answers.csv").write_text('template_id,classes\nt,"[""yes"", ""no""]"\n')
    (folder / "records/00000").mkdir(parents=True)
    for i in range(1, 33):
        record = folder / f"records/00000/{i:05d}_hr"
        record.with_suffix(".hea").write_text(f"{record.name} 1 500 30\n{record.name}.dat 16 1000.0(0)/mV 16 0\n")
        rng.integers(-99, 99, 30).astype("<i2").tofile(record.with_suffix(".dat"))
    texts = [{"text": f"The {i} is less than {i + 1}.", "other": f"Then {i * i} follows."} for i in range(40)]
    write_objects(folder / "text.jsonl", texts)
    tasks = [
        {"instruction": f"Add one to {i}. " * (1 + i % 3 * 3), "input": "", "output": f"That is {i + 1}."}
        for i in range(16)
    ]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    (folder / "text.txt").write_text("---".join(text["text"] for text in texts))
    (folder / "other.txt").write_text("---".join(text["other"] for text in texts))
    return folder


def write_objects(path: Path, objects: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in objects))


class FakeWandb(types.ModuleType):
    """Remembers what a tracker is told, without the configuration, which is an echo."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.told: dict[str, Any] = {}

    def init(self, **given: Any) -> Any:
        self.told = {key: value for key, value in given.items() if key not in ("config", "dir", "id")}
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
            files = FILES | dict.fromkeys(DECODERS, "decoder.yaml") | dict.fromkeys(PRETRAINED, "pretrained.yaml")
            config = files.get(base, "rows.yaml")
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
        "samples": (run / SAMPLES).read_text() if (run / SAMPLES).exists() else "",
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
    if where in BUILT:
        found = {BUILT[where](*built(*BASES[base], *extra)) for extra in ((), (override,))}
        assert len(found) == 2
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


def built(*overrides: str) -> tuple[Any, Any]:
    config = load_config("rows.yaml", overrides)
    backend = open_backend(config)
    return backend, backend.build(assemble(config).spec)


BUILT = {  # what shows in the model before it has done anything
    "frozen": lambda backend, model: backend.frozen_hash(model),
    "chunks": lambda _, model: model.head_chunks,
    "encoder_chunks": lambda _, model: model.encoder_chunks,
}
