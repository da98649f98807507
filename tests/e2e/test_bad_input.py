"""What a user can get wrong: one clear message, the promised exit code, and nothing lost."""

import builtins
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training import environment
from mlx_training.data.rows import row_to_dict, write_rows
from tests.e2e.tiny import rows
from tests.e2e.workbench import CONFIG, DATA, Workbench, flip_a_bit, truncate

# Configuration


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("training: {max_steps: 4, batchsize: 8}", ["training.batchsize: unknown key", "training.batch_size"]),
        ("training: {max_steps: 4, batch_size: 4, batch_size: 8}", ["training.batch_size: given twice", "keep one"]),
        ("training: {max_steps: 4, batch_size: four}", ["training.batch_size: given the text 'four'", "whole number"]),
        ("training: {max_steps: 4, schedule: cosin}", ["given the text 'cosin'", "did you mean cosine?"]),
    ],
)
def test_wrong_keys(bench: Workbench, line: str, words: list[str]) -> None:
    bench.config.write_text(f"model: {{family: timeseries}}\ndataset: {{format: questions}}\n{line}\n")
    message = bench.refused(CONFIG, "train", bench.config)
    assert f"{bench.config}:3: " in message
    for word in words:
        assert word in message
    assert not Path("runs").exists()


def test_all_mistakes_are_reported_at_once(bench: Workbench) -> None:
    message = bench.refused(
        CONFIG, "train", bench.config, "trainig.max_steps=3", "training.eps=0", "backend=jax", "--backend=torch"
    )
    assert message.startswith("error: 2 problems")  # --backend wins over backend=jax
    assert "did you mean training?" in message and "training.eps: given 0; allowed: a number > 0" in message


@pytest.mark.parametrize("rate", ["0", "{encoder: 0, projector: 0}"])
def test_everything_frozen(bench: Workbench, rate: str) -> None:
    message = bench.refused(CONFIG, "train", bench.config, f"training.learning_rate={rate}")
    assert "training.learning_rate: every rate is 0, so nothing would train; give one above 0" in message


# Data


def spoil(bench: Workbench, **changes: Any) -> None:
    """Change fields of the last row of the file."""
    *good, last = [row_to_dict(row) for row in rows(32)]
    bench.data.write_text("".join(json.dumps(row) + "\n" for row in [*good, {**last, **changes}]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"series": [[1.0, math.nan, 2.0]]}, ["rows.jsonl:32", "nan at position 1 of 3", "remove the row or fill"]),
        ({"series": [[1.0, 2.0, math.inf]]}, ["rows.jsonl:32", "inf at position 2 of 3"]),
        ({"series": [[1.0, None]]}, ["rows.jsonl:32", "nan at position 1 of 2"]),
        ({"series": [[]]}, ["rows.jsonl:32", "the series is empty"]),
        ({"series": [[0.0] * 33]}, ["row 'r31'", "33 samples", "at most 32", "raise model.encoder.max_patches"]),
        ({"series": [["1", "2"]]}, ["rows.jsonl:32", "list of numbers"]),
        ({"answer": " "}, ["row 'r31'", "no answer"]),
        ({"answer": None}, ["row 'r31'", "no answer"]),
        ({"answers": "rising"}, ["rows.jsonl:32", "did you mean 'answer'?"]),
        ({"post_prompt": None}, ["rows.jsonl:32", "missing field 'post_prompt'"]),
        ({"series_text": []}, ["rows.jsonl:32", "1 series but 0 series_text"]),
    ],
)
def test_bad_rows_are_found_before_the_first_step(bench: Workbench, changes: dict[str, Any], words: list[str]) -> None:
    spoil(bench, **changes)
    for verb in ("train", "validate"):
        message = bench.refused(DATA, verb, bench.config)
        for word in words:
            assert word in message
    assert bench.no_step_was_taken


def test_no_answer_is_left_after_truncation(bench: Workbench) -> None:
    message = bench.refused(DATA, "train", bench.config, "dataset.max_length=20")
    assert "max_length 20 leaves no place for the answer" in message and "raise dataset.max_length" in message
    spoil(bench, pre_prompt="long " * 2400)
    message = bench.refused(DATA, "train", bench.config)
    assert "row 'r31'" in message and "max_length 2048" in message
    assert bench.no_step_was_taken


def test_odd_rows_that_are_fine(bench: Workbench) -> None:
    """Constant series, one sample, a length that is no multiple of the patch, no series, several series."""
    odd = [[5.0] * 12], [[1.0]], [[1.0, 2.0, 4.0, 3.0, 5.0]], [], [[0.0, 1.0], [1e30, -1e30, 0.0]]
    given = [
        replace(row, series=tuple(np.array(s, np.float32) for s in odd[i % 5]), series_text=("s",) * len(odd[i % 5]))
        for i, row in enumerate(rows(40))
    ]
    write_rows(bench.data, given)
    result = bench.train("training.batch_size=20", "training.max_steps=2")
    assert math.isfinite(result["loss"]) and result["eval"]["rows"] == 10


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "rows.jsonl"),
        ("{not json}\n", "rows.jsonl:1: not JSON"),
        ("[1, 2]\n", "rows.jsonl:1: expected an object"),
        ("\xff\xfe", "not UTF-8"),
    ],
)
def test_files_that_hold_no_rows(bench: Workbench, content: str, words: str) -> None:
    bench.data.write_bytes(content.encode("latin-1"))
    assert words in bench.refused(DATA, "train", bench.config)
    assert bench.no_step_was_taken


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("windows.npz", truncate),
        ("windows.npz", flip_a_bit),
        ("packed.npz", truncate),
        ("packed.npz", flip_a_bit),
        ("rows.parquet", truncate),  # parquet files carry no checksums
    ],
)
def test_damaged_data_files(bench: Workbench, name: str, damage: Callable[[Path], None]) -> None:
    if name == "rows.parquet":
        write_rows(bench.folder / name, rows(32))
    else:
        save = np.savez if name == "windows.npz" else np.savez_compressed
        save(bench.folder / name, X=np.random.default_rng(0).standard_normal((32, 9)), y=np.arange(32) % 2)
    damage(bench.folder / name)
    message = bench.refused(DATA, "train", bench.config, f"dataset={{path: {name}, format: auto}}")
    assert name in message
    assert bench.no_step_was_taken


def test_missing_data(bench: Workbench) -> None:
    message = bench.refused(DATA, "train", bench.config, "dataset.path=row.jsonl")
    assert "no data file 'row.jsonl'" in message and "check dataset.path" in message
    assert "not a file" in bench.refused(DATA, "evaluate", bench.folder, "--data", "row.jsonl")


def test_batch_larger_than_the_data(bench: Workbench) -> None:
    for verb in ("train", "validate"):
        message = bench.refused(DATA, verb, bench.config, "training.batch_size=17")
        assert "training.batch_size 17 is larger than the training data (16 rows)" in message and "smaller" in message
    assert bench.no_step_was_taken
    assert bench.train("training.batch_size=16", "training.max_steps=1")["steps"] == 1


def test_rows_to_evaluate_need_answers_and_rows_to_generate_do_not(bench: Workbench) -> None:
    bench.train("training.max_steps=1")
    write_rows(bench.folder / "open.jsonl", [replace(row, answer="") for row in rows(3)])
    assert "row 'r0': no answer" in bench.refused(DATA, "evaluate", bench.run, "--data", "open.jsonl")
    assert len(bench.json("generate", bench.run, "--rows", "open.jsonl")["rows"]) == 3


def test_text_too_short(bench: Workbench) -> None:
    bench.use_decoder()
    text = ["dataset={format: text, path: tiny.txt}", "training.batch_size=2", "model.tokenizer.train=280"]
    text += [f"dataset.num_samples_{split}=null" for split in ("train", "validation", "test")]
    Path("tiny.txt").write_text("a b")
    message = bench.refused(DATA, "train", bench.config, *text)
    assert "would hold 0 of 3" in message and "use more text" in message
    Path("tiny.txt").write_text("few words " * 3)
    message = bench.refused(DATA, "train", bench.config, *text, "training.batch_size=99")
    assert "training.batch_size 99 is larger than the training data" in message
    assert bench.no_step_was_taken
    Path("tiny.txt").write_text("some more text than before. " * 40)
    assert bench.train(*text)["steps"] == 4
    vocabulary = json.loads((bench.run / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    assert any("more" in token for token in vocabulary), "the tokenizer of the attempt before was kept"


# Where the run goes


def test_an_output_directory_that_holds_a_run(bench: Workbench) -> None:
    bench.train()
    message = bench.refused(CONFIG, "train", bench.config)
    for word in (f"{bench.run} already holds a run", "--resume auto", "nothing was changed"):
        assert word in message


@pytest.mark.parametrize("directory", ["/dev/null/run", "/proc/run", "rows.jsonl", "rows.jsonl/run"])
def test_an_output_directory_that_cannot_be_written(bench: Workbench, directory: str) -> None:
    for argv in ([], ["--resume", "auto"]):
        message = bench.refused(CONFIG, "train", bench.config, f"output_dir={directory}", *argv)
        assert f"output_dir: {directory} cannot be written" in message and "Set output_dir" in message


# Backends and devices


def test_a_backend_that_is_not_installed(bench: Workbench, backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.train("--backend", backend_name)
    version = environment.package_version
    absent = (backend_name, *(f"mlx-{kind}" for kind in ("cpu", "cuda-12", "cuda-13") if backend_name == "mlx"))
    monkeypatch.setattr(environment, "package_version", lambda name: None if name in absent else version(name))
    install = f"pip install 'mlx-training[{backend_name}]'"
    for argv in (["train", bench.config, "--backend", backend_name, "output_dir=new"], ["evaluate", bench.run]):
        argv = [*argv, "--backend", backend_name]
        assert install in bench.refused(CONFIG, *argv)
    assert not Path("new/config.yaml").exists()


def test_no_backend_at_all(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_backends", dict)
    message = bench.refused(CONFIG, "train", bench.config)
    assert "no backend is installed" in message and "pip install 'mlx-training[mlx]'" in message


def test_a_framework_that_cannot_be_imported(
    bench: Workbench, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metadata are there, its library is not."""
    package = {"mlx": "mlx_training.mlx_backend", "torch": "torch_backend"}[backend_name]
    for name in list(sys.modules):
        if name == package or name.startswith(package + "."):
            monkeypatch.delitem(sys.modules, name)
    real_import = builtins.__import__

    def broken_import(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == backend_name:
            raise ImportError("libsomething.so: cannot open shared object file")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken_import)
    message = bench.refused(CONFIG, "train", bench.config, "--backend", backend_name)
    assert "libsomething.so" in message and f"pip install 'mlx-training[{backend_name}]'" in message


def test_a_device_that_is_not_present(bench: Workbench, backend_name: str) -> None:
    absent = "mps" if backend_name == "mlx" else "cuda"
    if backend_name == "torch" and __import__("torch").cuda.is_available():
        absent = "mps"
    message = bench.refused(CONFIG, "train", bench.config, f"device={absent}", "--backend", backend_name)
    assert f"device {absent!r} is not present" in message and "usable here: auto, cpu" in message
    assert bench.no_step_was_taken
