"""What a user can get wrong: one clear message, the promised exit code, and nothing lost."""

import builtins
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training import environment
from mlx_training.checkpoint import CheckpointStore
from mlx_training.data.rows import row_to_dict, write_rows
from tests.e2e.conftest import Workbench
from tests.e2e.tiny import rows, save_tiny_llama

CONFIG, DATA = 2, 3  # exit codes


def no_step_was_taken(bench: Workbench) -> bool:
    return not (bench.run / "metrics.jsonl").exists() and not (bench.run / "config.yaml").exists()


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


# The language model


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids that were looked for on the hub."""
    hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []

    def snapshot_download(repo_id: str, **_: Any) -> str:
        asked.append(repo_id)
        raise OSError("no network in tests")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(
    "llm_id", ["models/lama", "modles/llama", "./models/lama", "models/llama/../lama", "llama", "~/no/such/llama"]
)
def test_a_mistyped_path_is_never_looked_up_on_the_hub(bench: Workbench, no_hub: list[str], llm_id: str) -> None:
    shutil.copytree(bench.llm, bench.folder / "models/llama")
    message = bench.refused(CONFIG, "train", bench.config, f"model.llm_id={llm_id}")
    assert not no_hub
    assert f"there is no directory {llm_id!r}" in message and "Give an existing directory" in message
    if llm_id in ("models/lama", "modles/llama"):
        assert "did you mean models/llama?" in message


def test_a_hub_id_that_cannot_be_had(bench: Workbench, no_hub: list[str]) -> None:
    message = bench.refused(CONFIG, "train", bench.config, "model.llm_id=someone/something")
    assert no_hub == ["someone/something"]
    assert "no network in tests" in message and "give the directory" in message


def test_vocabularies_that_disagree(bench: Workbench) -> None:
    llm = save_tiny_llama(bench.folder / "llm", vocab_size=301, tokenizer_size=302)
    message = bench.refused(DATA, "train", bench.config, f"model.llm_id={llm}")
    assert "the tokenizer has 302 ids but the model embeds 301" in message and "Use the tokenizer" in message
    assert no_step_was_taken(bench)
    llm = save_tiny_llama(bench.folder / "padded", vocab_size=302, tokenizer_size=301)  # an embedding padded to a size
    assert bench.train(f"model.llm_id={llm}", "training.max_steps=1")["steps"] == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokenizer.json", "looked for tokenizer.json and tokenizer.model"),
        ("tokenizer_config.json", ""),  # config.json names BOS and EOS too
        ("model.safetensors", "holds no model*.safetensors"),
        ("config.json", "has no config.json"),
    ],
)
def test_missing_files_of_the_language_model(bench: Workbench, name: str, words: str) -> None:
    llm = Path(shutil.copytree(bench.llm, bench.folder / "llm"))
    (llm / name).unlink()
    if not words:
        assert bench.train(f"model.llm_id={llm}", "training.max_steps=1")["steps"] == 1
        return
    message = bench.refused(DATA, "train", bench.config, f"model.llm_id={llm}")
    assert words in message and str(llm) in message
    assert no_step_was_taken(bench)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json"])
def test_cut_off_files_of_the_language_model(bench: Workbench, name: str) -> None:
    llm = Path(shutil.copytree(bench.llm, bench.folder / "llm"))
    content = (llm / name).read_bytes()
    (llm / name).write_bytes(content[: len(content) // 2])
    message = bench.refused(DATA, "train", bench.config, f"model.llm_id={llm}")
    assert str(llm / name) in message
    assert no_step_was_taken(bench)


@pytest.mark.parametrize("content", ["{cut", "[]", "{}", '{"weight_map": {"a": 3}}'])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
def test_garbled_files_of_the_language_model(bench: Workbench, name: str, content: str) -> None:
    llm = Path(shutil.copytree(bench.llm, bench.folder / "llm"))
    (llm / name).write_text(content)
    if name == "tokenizer_config.json" and content[-2:] in ("{}", "}}"):
        assert bench.train(f"model.llm_id={llm}", "training.max_steps=1")["steps"] == 1
        return
    code, _, err = bench.main("train", bench.config, f"model.llm_id={llm}")
    assert code in (CONFIG, DATA) and err.startswith("error: ") and str(llm) in err
    assert no_step_was_taken(bench)


def test_another_language_model_than_the_soft_prompt_was_trained_for(bench: Workbench) -> None:
    bench.train()
    llm = Path(shutil.copytree(bench.llm, bench.folder / "llm"))
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))
    message = bench.refused(DATA, "train", bench.config, f"model.llm_id={llm}", "--resume", "auto")
    assert "was trained with another frozen LM" in message and "set model.llm_id" in message


# Checkpoints

MISFITS = [
    ("model.encoder.num_layers=2", "missing: encoder.layers.1.norm2.bias (8,)"),
    ("model.encoder.numeric_scale=false", "unknown: encoder.scale_in.weight (8, 2)"),
    ("model.encoder.ffn_size=12", "shape: encoder.layers.0.linear1.bias is (8,), expected (12,)"),
]


@pytest.mark.parametrize(("override", "problem"), MISFITS)
def test_parameters_that_do_not_fit(bench: Workbench, override: str, problem: str) -> None:
    bench.train()
    step = bench.run / "checkpoints/step_00000004"
    other = f"output_dir={bench.folder / 'other'}"
    for argv in (["--resume", "auto"], ["--resume", step], [f"training.init_from={bench.run}", other]):
        message = bench.refused(DATA, "train", bench.config, override, *argv)
        assert problem in message and str(step) in message and "model section" in message
    assert not (bench.folder / "other/config.yaml").exists()
    assert bench.train("--resume", "auto")["steps"] == 4


@pytest.mark.parametrize(("fault", "problem"), [("missing", "missing"), ("extra", "unknown"), ("shape", "shape")])
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_checkpoints_that_do_not_fit(bench: Workbench, fault: str, problem: str, part: str) -> None:
    """Whole, with right sums, but of another program."""
    bench.train()
    checkpoint = CheckpointStore(bench.run).load("latest")
    arrays = {"model": checkpoint.model, "optimizer": checkpoint.optimizer}
    name = "encoder.pos_embed" + (".m" if part == "optimizer" else "")
    if fault == "missing":
        del arrays[part][name]
    elif fault == "extra":
        arrays[part][name + ".old"] = np.zeros(3, np.float32)
    else:
        arrays[part][name] = arrays[part][name][:, :4]
    other = CheckpointStore(bench.folder / "other")
    path = other.save(4, arrays["model"], arrays["optimizer"], checkpoint.state, best=True, keep=1)
    message = bench.refused(DATA, "train", bench.config, "--resume", path)
    assert f"{problem}: {name}" in message and str(path) in message
    if part == "model":
        shutil.copy(bench.run / "config.yaml", bench.folder / "other")
        assert f"{problem}: {name}" in bench.refused(DATA, "evaluate", bench.folder / "other")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint(bench: Workbench, name: str, damage: Callable[[Path], None]) -> None:
    bench.train()
    checkpoints = bench.run / "checkpoints"
    damage(checkpoints / "step_00000004" / name)
    message = bench.refused(DATA, "train", bench.config, "--resume", checkpoints / "step_00000004")
    assert name in message and f"--resume {checkpoints / 'step_00000002'}" in message

    code, _, err = bench.main("train", bench.config, "--resume", "auto")  # goes on from the one before
    assert code == 0 and f"using the older checkpoint {checkpoints / 'step_00000002'}" in err
    assert bench.json("evaluate", bench.run)["rows"] == 8

    for step in checkpoints.glob("step_*"):
        truncate(step / "model.safetensors")
    for argv in (["train", bench.config, "--resume", "auto"], ["evaluate", bench.run]):
        assert "model.safetensors" in bench.refused(DATA, *argv)


def test_what_is_no_run(bench: Workbench) -> None:
    (bench.folder / "empty").mkdir()
    for run, words in (("empty", "no config.yaml"), ("nowhere", "is not a directory"), ("rows.jsonl", "directory")):
        for argv in (["evaluate", run], ["generate", run, "--rows", bench.data]):
            assert words in bench.refused(DATA, *argv)
    assert "nothing to start from" in bench.refused(DATA, "train", bench.config, "training.init_from=empty")
    assert "no such directory" in bench.refused(DATA, "train", bench.config, "--resume", "nowhere")


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
    assert no_step_was_taken(bench)


def test_no_answer_is_left_after_truncation(bench: Workbench) -> None:
    message = bench.refused(DATA, "train", bench.config, "dataset.max_length=20")
    assert "max_length 20 leaves no place for the answer" in message and "raise dataset.max_length" in message
    spoil(bench, pre_prompt="long " * 2400)
    message = bench.refused(DATA, "train", bench.config)
    assert "row 'r31'" in message and "max_length 2048" in message
    assert no_step_was_taken(bench)


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
    assert no_step_was_taken(bench)


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
    assert no_step_was_taken(bench)


def test_missing_data(bench: Workbench) -> None:
    message = bench.refused(DATA, "train", bench.config, "dataset.path=row.jsonl")
    assert "no data file 'row.jsonl'" in message and "check dataset.path" in message
    assert "not a file" in bench.refused(DATA, "evaluate", bench.folder, "--data", "row.jsonl")


def test_batch_larger_than_the_data(bench: Workbench) -> None:
    for verb in ("train", "validate"):
        message = bench.refused(DATA, verb, bench.config, "training.batch_size=17")
        assert "training.batch_size 17 is larger than the training data (16 rows)" in message and "smaller" in message
    assert no_step_was_taken(bench)
    assert bench.train("training.batch_size=16", "training.max_steps=1")["steps"] == 1


def test_rows_to_evaluate_need_answers_and_rows_to_generate_do_not(bench: Workbench) -> None:
    bench.train("training.max_steps=1")
    write_rows(bench.folder / "open.jsonl", [replace(row, answer="") for row in rows(3)])
    assert "row 'r0': no answer" in bench.refused(DATA, "evaluate", bench.run, "--data", "open.jsonl")
    assert len(bench.json("generate", bench.run, "--rows", "open.jsonl")["rows"]) == 3


def test_text_too_short_for_its_splits(bench: Workbench) -> None:
    bench.use_decoder()
    Path("tiny.txt").write_text("a b")
    dataset = "dataset={format: text, path: tiny.txt, splits: {fraction: {validation: 0.1, test: 0.1}}}"
    cleared = [f"dataset.num_samples_{split}=null" for split in ("train", "validation", "test")]
    message = bench.refused(DATA, "train", bench.config, dataset, *cleared)
    assert "would hold" in message and "use more text" in message
    assert no_step_was_taken(bench)
    Path("tiny.txt").write_text("some more text than before. " * 40)  # and the tokenizer is trained on it, not kept
    assert bench.train(dataset, *cleared, "model.tokenizer.train=280", "training.batch_size=2")["steps"] == 4
    kept = json.loads((bench.run / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    assert any("more" in token for token in kept)


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
    assert no_step_was_taken(bench)
