"""Valid material for the trial `fuzz` to spoil: shipped configurations, one file of every format, trained runs."""

import contextlib
import csv
import io
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from mlx_training import cli
from mlx_training.configs import shipped_configs
from mlx_training.environment import resolve_backend

MATERIAL = "../material"  # as a case's folder sees it
LLM = f"{MATERIAL}/llm"
BUILTIN_LLM = Path(cli.__file__).parent / "builtin" / "tiny-llama-4bit"
TIMESERIES = f"""\
experiment: {{name: fuzz}}
device: cpu
model:
  family: timeseries
  llm_id: {LLM}
  encoder: {{patch_size: 4, hidden_size: 8, num_layers: 1, num_heads: 2, ffn_size: 8, max_patches: 64}}
training: {{max_steps: 2, batch_size: 2}}
evaluation: {{max_new_tokens: 2}}
"""
DECODER = """\
experiment: {name: fuzz}
device: cpu
model:
  family: decoder
  decoder: {hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, context_length: 16}
  tokenizer: {train: 300}
training: {max_steps: 2, batch_size: 2}
"""
# What a spoilt value may not make expensive: laid over every configuration that is assembled or trained.
CHEAP: tuple[str, ...] = (
    "training.max_steps=2",
    "training.num_epochs=null",
    "training.batch_size=2",
    "evaluation.batch_size=2",
)
CHEAP += ("training.grad_accumulation_steps=1", "logging.wandb=disabled")
CHEAP_FAMILY = {
    "timeseries": (
        *(f"model.encoder.{name}" for name in ("hidden_size=8", "num_layers=1", "num_heads=2", "ffn_size=8")),
        "evaluation.max_new_tokens=2",
    ),
    "decoder": (
        *(f"model.decoder.{name}" for name in ("hidden_size=16", "intermediate_size=24", "num_layers=1")),
        *("model.decoder.num_heads=2", "model.decoder.num_kv_heads=2", "model.decoder.context_length=16"),
        *("model.tokenizer={train: 300}", "model.decoder.head_dim=8"),
    ),
}
CHEAP_DATA = tuple(f"dataset.num_samples_{name}" for name in ("train=8", "validation=2", "test=2"))


@dataclass(frozen=True)
class Format:
    """A file of rows: `value` is what its text or columns were made of, `others` stand beside it."""

    name: str
    file: str
    value: Any
    options: str = ""
    others: dict[str, bytes] = field(default_factory=dict)

    def config(self, path: str) -> str:
        """A configuration that reads the file at this path."""
        options = f", options: {self.options}" if self.options else ""
        data = f"path: {path}, format: {self.name}, splits: {{fraction: {{validation: 0.2, test: 0.2}}}}{options}"
        head = DECODER if self.name == "text" else TIMESERIES
        return f"{head}dataset: {{{data}}}\n" + ("evaluation: {metrics: [loss]}\n" if self.name == "text" else "")


def series(index: int, length: int = 10) -> list[float]:
    """Rising or falling numbers."""
    return [round((-1) ** index * 0.5 * step + 0.1 * index, 3) for step in range(length + index % 3)]


def canonical(index: int) -> dict[str, Any]:
    """One row in the project's own spelling."""
    texts = {"pre_prompt": "Trend?", "series_text": ["The series"], "post_prompt": "Answer:"}
    row = {**texts, "series": [series(index)], "answer": ("rising", "falling")[index % 2]}
    return row | {"options": ["rising", "falling"], "id": f"r{index}", "group": f"g{index % 5}", "type": "trend"}


def raw(name: str, index: int) -> dict[str, Any]:
    """One row as the data set of this name is published."""
    text = "It moves. Answer: walking"
    if name == "tsqa":
        row: dict[str, Any] = {"Task": "trend", "Question": "Up?", "Answer": "(a) yes", "Series": series(index)}
    elif name == "m4":
        row = {"id": f"M{index}", "frequency": "Monthly", "series": series(index), "caption": "It goes up."}
    elif name == "har_cot":
        row = {f"{axis}_axis": series(index) for axis in "xyz"} | {"rationale": text}
    elif name == "sleep_cot":
        row = {"time_series": [series(index)], "rationale": "Slow. Answer: Wake"}
    elif name == "ecg_qa_cot":
        row = {"question": "Normal?", "template_id": 1, "question_type": "verify", "ecg_id": [index]}
        row |= {"clinical_context": "ECG.", "rationale": "Answer: yes", "series": [series(index)] * 3}
    else:
        row = {"question": "Which?", "options": ["up", "down"], "answer": "up", "category": "trend", "id": index}
        row |= {"ts": series(index)} if index % 2 else {"ts1": series(index), "ts2": series(index + 1)}
    return row


def formats() -> list[Format]:
    """Every accepted format, the raw ones in each of their spellings."""
    rows = [canonical(index) for index in range(12)]
    found = [Format("jsonl", "rows.jsonl", rows), Format("parquet", "rows.parquet", rows)]
    records = {
        f"records/00000/{i:05d}_hr.hea": b"x 2 500 5\na 16 1000(0)/mV 16 0\nb 16 1000(0)/mV 16 0\n" for i in range(12)
    }
    records |= {f"records/00000/{i:05d}_hr.dat": np.arange(10, dtype="<i2").tobytes() for i in range(12)}
    answers = {"answers.csv": b'template_id,classes\n1,"[""yes"", ""no""]"\n'}
    for name in ("tsqa", "m4", "har_cot", "sleep_cot", "ecg_qa_cot"):
        rows = [raw(name, index) for index in range(12)]
        found += [Format(name, f"{name}{suffix}", rows) for suffix in (".jsonl", ".csv", ".parquet")]
    bare = [{key: value for key, value in raw("ecg_qa_cot", i).items() if key != "series"} for i in range(12)]
    options = "{records: records, template_answers: answers.csv}"
    found.append(Format("ecg_qa_cot", "ecg_records.jsonl", bare, options, records | answers))
    captions = {"captions.csv": b"id,caption\n" + b"".join(b"M%d,It goes up.\n" % i for i in range(12))}
    found.append(
        Format("m4", "m4_series.jsonl", [raw("m4", i) for i in range(12)], "{captions: captions.csv}", captions)
    )
    found.append(Format("timeseriesexam", "exam.json", [raw("exam", index) for index in range(30)]))
    found.append(Format("csv", "rows.csv", [{"series": series(i), "label": f"c{i % 3}"} for i in range(12)]))
    wide = [{**{f"t{k}": float(k * i) for k in range(6)}, "label": f"c{i % 3}", "who": i % 4} for i in range(12)]
    found.append(Format("csv", "wide.csv", wide, "{value_columns: [t0, t5], group_column: who}"))
    found.append(Format("ts", "rows.ts", ts_text()))
    found.append(Format("npz", "windows.npz", arrays()))
    return [*found, Format("text", "story.txt", "Once upon a time there was a pump. " * 30)]


def ts_text() -> str:
    """Recordings of 12 channels and nine speakers."""
    header = (
        "@problemName x\n@timeStamps false\n@univariate false\n@dimensions 12\n@classLabel true 1 2 3 4 5 6 7 8 9\n"
    )
    lines = [":".join(",".join(map(str, series(i + c))) for c in range(12)) + f":{i % 9 + 1}" for i in range(60)]
    return header + "@data\n" + "\n".join(lines) + "\n"


def arrays() -> dict[str, np.ndarray]:
    """Windows of three channels, one for each of 30 subjects."""
    labels = ["WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING"]
    windows = np.arange(30 * 16 * 3, dtype=np.float32).reshape(30, 16, 3) % 17
    return {"X": windows, "y": np.arange(30) % 6, "subject": np.arange(1, 31), "labels": np.array(labels)}


def content(form: Format, value: Any) -> bytes:
    """A file of this format, as its suffix asks; raises what the writers raise for values they cannot hold."""
    suffix = Path(form.file).suffix
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in value).encode()
    if suffix == ".json":
        return json.dumps(value).encode()
    if suffix == ".csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(dict.fromkeys(key for row in value for key in row)))
        writer.writeheader()
        for row in value:
            writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
        return out.getvalue().encode()
    if suffix in (".parquet", ".npz"):
        buffer = io.BytesIO()
        if suffix == ".npz":
            np.savez(buffer, **value)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(value), buffer)
        return buffer.getvalue()
    return value.encode()


def config_texts() -> dict[str, str]:
    """The shipped configurations by file name, reading this material and the LM that comes with the package."""
    data = {
        "har_total_acc_train.npz": "windows.npz",
        "JapaneseVowels_TRAIN.ts": "rows.ts",
        "qa_dataset.json": "exam.json",
    }
    texts = {}
    for name, path in shipped_configs().items():
        text = re.sub(
            r"llm_id: (meta-llama|mlx-community)/\S+",
            f"llm_id: {LLM}",
            path.read_text().replace("builtin/tiny-llama-4bit", LLM),
        )
        for file in re.findall(r"data/([\w.]+)", text):
            text = text.replace(f"data/{file}", f"{MATERIAL}/{data.get(file, file)}")
        texts[f"{name.rpartition('/')[2]}.yaml"] = text
    return texts


def cheap(text: str) -> list[str]:
    """Overrides that keep a configuration small whatever became of its numbers."""
    family = "decoder" if "family: decoder" in text else "timeseries"
    data = CHEAP_DATA if "format: questions" in text or "format: corpus" in text else ()
    return [*CHEAP, *CHEAP_FAMILY[family], *data]


def prepare(folder: Path, backend: str) -> None:
    """Write everything into `folder`, two trained runs and an LM's directory among it. To be called from beside it."""
    folder.mkdir(parents=True)
    for form in formats():
        for name, data in {form.file: content(form, form.value), **form.others}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    shutil.copytree(BUILTIN_LLM, folder / "llm")
    config = json.loads((folder / "llm" / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (folder / "llm" / "config.json").write_text(json.dumps(config))  # the published prompts are long
    rows = Format("jsonl", "rows.jsonl", None).config(f"{MATERIAL}/rows.jsonl")
    corpus = (
        f"{DECODER}dataset: {{format: corpus, num_samples_train: 8, num_samples_validation: 2, num_samples_test: 2}}\n"
    )
    for name, text in {"timeseries": rows, "decoder": corpus}.items():
        (folder / f"{name}.yaml").write_text(f"{text}diagnostics: {{probe_every_steps: 1}}\nbackend: {backend}\n")
        _train(folder / f"{name}.yaml", folder / name)
    if resolve_backend("auto") != backend:  # what is imported now is not cut short in a case by the clock
        _train(folder / "timeseries.yaml", folder / "warm", "backend=auto")


def _train(config: Path, run: Path, *overrides: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.main(["train", str(config), f"output_dir={run}", *overrides])
    assert code == 0, said.getvalue()
