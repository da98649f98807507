"""How runs end: diverged, out of memory, without their data. A clear message, the exit code, and nothing lost."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_training import trainer
from mlx_training.checkpoint import CheckpointStore, verify
from mlx_training.data.rows import write_rows
from mlx_training.errors import MemoryExhaustedError
from mlx_training.generate import Generator
from mlx_training.json_lines import read_metrics
from mlx_training.memory import full_memory_explained, is_out_of_memory
from tests.e2e.tiny import rows
from tests.e2e.workbench import CONFIG, DATA, Workbench, contents

DIVERGED, MEMORY = 4, 5  # exit codes
REPOSITORY = Path(__file__).resolve().parents[2]


def whole(run: Path) -> bool:
    """Whether a run has checkpoints, all of them good, and nothing half-written."""
    paths = CheckpointStore(run).paths()
    return bool(paths) and not any(map(verify, paths)) and not list(run.rglob(".tmp-*"))


# Divergence


def test_a_diverged_run_says_so_in_its_metrics(tiny: Workbench) -> None:
    tiny.train("training.max_steps=2")
    hot = (
        "training.learning_rate=1e30",
        "training.max_steps=10",
        "training.schedule=constant",
        "evaluation.every_steps=10",
    )
    hot += ("checkpoint.every_steps=10", "diagnostics.max_skipped_steps=2")
    allow = [word for key in ("learning_rate", "schedule") for word in ("--allow-change", f"training.{key}")]
    code, out, err = tiny.main("train", tiny.config, *hot, "--resume", "auto", *allow, "--json")
    assert (code, out) == (DIVERGED, "") and "error: diverged by step " in err
    last = read_metrics(tiny.run / "metrics.jsonl")[-1]
    assert list(last) == ["step", "diverged"] and f"error: {last['diverged']}\n" in err
    assert whole(tiny.run) and CheckpointStore(tiny.run).load().step == 2
    assert tiny.train("--resume", "auto", "training.max_steps=10", *allow)["steps"] == 10
    assert not any("diverged" in record for record in read_metrics(tiny.run / "metrics.jsonl"))


# Memory

LIMITED = """
import resource, sys
from mlx_training import cli, trainer

def limited(*given):
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + 150_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return learning_rates(*given)

learning_rates, trainer.learning_rates = trainer.learning_rates, limited
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space cannot be limited elsewhere")
def test_a_batch_that_does_not_fit_into_memory(tiny: Workbench) -> None:
    """On the CPU MLX 0.32 does not ask whether it was given memory and crashes; what was saved is intact."""
    tiny.use_decoder()
    many = "dataset.num_samples_train=500", "evaluation.batch_size=4", "model.decoder.intermediate_size=2048"
    tiny.train(*many, "training.max_steps=2")
    larger = "training.batch_size=1000", "--resume", "auto", "--allow-change", "training.batch_size"
    command = [sys.executable, "-c", LIMITED, "train", str(tiny.config), *many, *larger, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    if tiny.backend == "mlx":
        assert done.returncode in (MEMORY, -signal.SIGSEGV, -signal.SIGABRT), done.stderr
    else:
        assert (done.returncode, done.stdout) == (MEMORY, ""), done.stderr
        assert "Traceback" not in done.stderr
        message = done.stderr[done.stderr.index("error: ") :]
        assert "out of memory" in message and "can't allocate memory: you tried to allocate" in message
        assert "GB of the machine's memory" in message and "`mlx-training plan CONFIG` predicts" in message
        assert f"{tiny.run / 'checkpoints/step_00000002'} is intact; continue: " in message
        advice = message.partition("continue: ")[2].split()
        assert advice[:3] == ["training.batch_size=500", "training.grad_accumulation_steps=2", "--resume"]
    assert whole(tiny.run)
    go_on = ["--resume", "auto", "--allow-change", "training.batch_size"] if tiny.backend == "mlx" else advice[2:]
    assert tiny.train(*many, *go_on)["steps"] == 4


def refuse_memory(*_: object, **__: object) -> None:
    np.ones(10**15)


@pytest.mark.parametrize("place", ["step", "evaluation", "checkpoint"])
def test_memory_refused_while_training(tiny: Workbench, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.train("training.max_steps=2")
    owner: Any = {"step": trainer, "evaluation": trainer.Evaluator, "checkpoint": CheckpointStore}[place]
    name = {"step": "learning_rates", "evaluation": "during_training", "checkpoint": "save"}[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse_memory)
        code, out, err = tiny.main("train", tiny.config, "--resume", "auto", "--json")
    assert (code, out) == (MEMORY, "") and "Traceback" not in err
    assert "out of memory: Unable to allocate" in err and "step_00000002 is intact; continue: " in err
    assert whole(tiny.run)
    assert tiny.train("--resume", "auto")["steps"] == 4


@pytest.mark.parametrize("verb", [("evaluate",), ("generate", "--rows", "rows.jsonl")])
def test_memory_refused_while_answering(
    bench: Workbench, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.train("training.max_steps=1")
    monkeypatch.setattr(Generator, "answers", refuse_memory)
    message = bench.refused(MEMORY, verb[0], bench.run, *verb[1:])
    assert "Lower evaluation.batch_size" in message and str(bench.run / "config.yaml") in message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.1 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1.2 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[malloc_or_wait] Unable to allocate 83886080000 bytes."),
        RuntimeError(
            "[metal::malloc] Attempting to allocate 91 bytes which is greater than the maximum allowed buffer size of 9"
        ),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU...)"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    with (
        pytest.raises(MemoryExhaustedError, match=r"^out of memory: .+\. This process had used \d+\.\d\d GB .* Do so$"),
        full_memory_explained(lambda: "Do so"),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), OSError(28, "No space left"), ValueError("out of memory")]
)
def test_what_does_not(error: Exception) -> None:
    with pytest.raises(type(error)) as found, full_memory_explained(lambda: "Do so"):
        raise error
    assert found.value is error


# Data that is gone, or is no longer the same


def test_a_data_file_that_is_gone(bench: Workbench) -> None:
    bench.train("training.max_steps=2")
    bench.data.rename(bench.folder / "elsewhere.jsonl")
    for verb in (("train", bench.config, "--resume", "auto"), ("evaluate", bench.run)):
        message = bench.refused(DATA, *verb)
        assert f"no data file {str(bench.data)!r}" in message and "dataset.path" in message
    (bench.folder / "elsewhere.jsonl").rename(bench.data)
    assert bench.train("--resume", "auto")["steps"] == 4


def test_a_language_model_that_is_gone(bench: Workbench) -> None:
    llm = Path(shutil.copytree(bench.llm, bench.folder / "llm"))
    bench.train("training.max_steps=2", f"model.llm_id={llm}")
    llm.rename(bench.folder / "renamed")
    train = "train", bench.config, f"model.llm_id={llm}", "--resume", "auto"
    for verb in (train, ("evaluate", bench.run), ("generate", bench.run, "--rows", bench.data)):
        message = bench.refused(CONFIG, *verb)
        assert f"there is no directory {str(llm)!r}" in message
    assert whole(bench.run)


def other_row(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0].replace('"Trend?"', '"Which trend?"'), *lines[1:]]))


def other_value(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[5]["series"][0][3] += 0.001
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def other_order(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def more_rows(path: Path) -> None:
    write_rows(path, rows(33))


@pytest.mark.parametrize("change", [other_row, other_value, other_order, more_rows])
def test_other_rows_under_the_same_name_are_refused(bench: Workbench, change: Any) -> None:
    bench.train("training.max_steps=2")
    change(bench.data)
    go_on = "train", bench.config, "--resume", "auto"
    message = bench.refused(CONFIG, *go_on)
    assert 'dataset.path: "16 train, 8 validation, 8 test; sha256 ' in message
    assert "(--allow-change dataset.path)" in message and "Nothing was changed" in message
    assert bench.train("--resume", "auto", "--allow-change", "dataset.path")["steps"] == 4
    assert bench.main("train", bench.config, "--resume", "auto")[0] == 0, "the run is one of the new rows now"


def test_rows_that_moved_or_were_written_again_are_the_same(bench: Workbench) -> None:
    bench.train("training.max_steps=2")
    before = contents(bench.folder)[bench.data]
    bench.data.write_bytes(before.replace(b'": ', b'":  '))
    assert bench.train("training.max_steps=3", "--resume", "auto")["steps"] == 3


def test_other_text_under_the_same_name_is_refused(bench: Workbench) -> None:
    bench.use_decoder()
    text = bench.folder / "text.txt"
    text.write_text("The rain falls and the sun shines. " * 60)
    on_text = "dataset.format=text", f"dataset.path={text}", "dataset.splits.fraction.validation=0.2"
    on_text += (
        "dataset.splits.fraction.test=0.2",
        *(f"dataset.num_samples_{n}=null" for n in ("train", "validation", "test")),
    )
    bench.train(*on_text, "training.max_steps=2")
    text.write_text(text.read_text().replace("rain", "snow", 1))
    message = bench.refused(CONFIG, "train", bench.config, *on_text, "--resume", "auto")
    assert "(--allow-change dataset.path)" in message
    text.unlink()
    assert str(text) in bench.refused(DATA, "train", bench.config, *on_text, "--resume", "auto")


# Weights & Biases


def test_a_resumed_run_continues_its_wandb_run(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that has lost its checkpoints, or continues another run's, is a new one."""
    ids: list[str] = []
    logged: list[int] = []

    def init(**options: Any) -> Any:
        ids.append(options["id"])
        assert options["resume"] == "allow"
        return SimpleNamespace(log=lambda _, step: logged.append(step), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    bench.train("logging.wandb=offline", "training.max_steps=2")
    bench.train("logging.wandb=offline", "--resume", "auto")
    assert logged == [1, 2, 2, 3, 4, 4], "steps 2 and 4 are evaluated too"
    other = bench.folder / "other/checkpoints/step_00000002"
    bench.train("output_dir=other", "training.max_steps=2")
    shutil.rmtree(bench.run / "checkpoints")
    bench.train("logging.wandb=offline", "--resume", other)
    shutil.rmtree(bench.run / "checkpoints")
    bench.train("logging.wandb=offline", "--resume", "auto")
    assert ids[0] == ids[1] and len(set(ids[1:])) == 3
