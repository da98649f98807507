"""Messages and edges: what is said of mistakes that are made once a week, and what they leave behind."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from mlx_training import trainer
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import load_config
from mlx_training.diagnostics import subject
from mlx_training.errors import UserError
from mlx_training.run_directory import claim_run_directory, write_atomic
from tests.e2e.test_guards import spoil
from tests.e2e.workbench import CONFIG, DATA, Workbench

MEMORY = 5  # exit code


def test_a_change_that_comes_too_late_is_refused(bench: Workbench) -> None:
    bench.train()
    again = "train", bench.config, "--resume", "auto", "training.eps=1e-6", "--allow-change", "training.eps"
    assert "training.eps: the run has ended at step 4" in bench.refused(CONFIG, *again)
    assert bench.json(*again, "training.max_steps=5")["steps"] == 5


@pytest.mark.parametrize("key", ["max_steps", "num_epochs"])
def test_two_lengths(bench: Workbench, key: str) -> None:
    bench.config.write_text(bench.config.read_text().replace("max_steps: 4", "num_epochs: 4, max_steps: null"))
    given = ["training.max_steps=3"] if key == "max_steps" else ["training.max_steps=4", "training.num_epochs=3"]
    message = bench.refused(CONFIG, "validate", bench.config, *given)
    assert f"to train training.{key}=3 add training." in message and message.count("=null") == 2
    fixed = re.search(rf"training\.{key}=3 add (\S+=null)", message)
    assert fixed and bench.main("validate", bench.config, *given, fixed[1])[0] == 0


def test_what_validate_and_plan_note(bench: Workbench) -> None:
    bench.use_decoder()
    sparse = "model.decoder.mixers=[local]", "model.decoder.window=16"
    for verb in ("validate", "plan"):
        assert "window 16: not below context_length 16" in bench.json(verb, bench.config, *sparse)["notes"][0]
    assert "note: model.decoder.window 16" in bench.main("plan", bench.config, *sparse)[1]
    large = bench.main("train", bench.config, "model.tokenizer={train: 16000}", "training.max_steps=1")[2]
    assert large.count("note: model.tokenizer.train 16000: the training text has merges for ") == 1


def test_keys_of_another_family_and_keys_that_are_none(bench: Workbench) -> None:
    bench.use_language("kgram")
    message = bench.refused(CONFIG, "validate", bench.config, "model.decoder={num_layers: 2}")
    assert "; it belongs to the family decoder, and model.family is kgram" in message
    bench.train()
    allow = "train", bench.config, "--resume", "auto", "--allow-change"
    assert "did you mean training.learning_rate?" in bench.refused(CONFIG, *allow, "training.lr")


def test_files_and_checkpoints_that_are_not_of_the_run(bench: Workbench) -> None:
    bench.use_decoder()
    bench.train()
    assert "give the file of rows, or of text" in bench.refused(DATA, "evaluate", bench.run, "--data", "nowhere")
    bench.use_language("kgram")
    other = bench.folder / "other"
    bench.train(f"output_dir={other}")
    ask = "generate", bench.run, "--prompt", "The", "--checkpoint", other / "checkpoints/step_00000004"
    message = bench.refused(DATA, *ask)
    assert f"it is not one of {bench.run} and does not fit it" in message and "llm_id" not in message
    assert bench.json("generate", bench.run, "--prompt", "The", "--device", "cpu", "--max-new-tokens", 1)["samples"]
    code, _, err = bench.main("evaluate", bench.run, "--device", "cuda", "--backend", "torch")
    assert code == CONFIG and "cuda" in err, "the device is another than the run's"


def test_a_batch_larger_than_the_text(bench: Workbench) -> None:
    bench.use_decoder()
    few = "dataset.num_samples_train=1", "model.decoder.context_length=4000", "training.batch_size=2"
    assert re.search(
        r"make 1 row of 4000; set training.batch_size to 1 or less, or ",
        bench.refused(DATA, "validate", bench.config, *few),
    )


def test_nothing_finite_before_the_first_save(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 1, 2)
    assert tiny.train("training.max_steps=2")["loss"] is None
    assert CheckpointStore(tiny.run).load().state["progress"]["loss"] is None
    assert tiny.train("training.max_steps=3", "--resume", "auto")["loss"] > 0


def test_a_second_ctrl_c_names_what_is_kept(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = trainer.learning_rates

    def pressed(config: Any, step: int, total_steps: int) -> Any:
        for _ in range(2 * (step == 3)):
            signal.raise_signal(signal.SIGINT)
        return rates(config, step, total_steps)

    monkeypatch.setattr(trainer, "learning_rates", pressed)
    code, _, err = bench.main("train", bench.config)
    assert code == 130 and "step_00000002 is the last checkpoint; continue with --resume auto" in err


def test_the_doctor_without_memory(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError("cannot allocate 9 GB")

    monkeypatch.setattr(subject, "open_backend", refuse)
    assert "out of memory: cannot allocate 9 GB" in bench.refused(MEMORY, "doctor", bench.config)


def test_two_processes_may_write_the_same_file(tmp_path: Path) -> None:
    """Each to a name of its own; what a dead one has left behind is removed, what a living one writes is not."""
    theirs, dead = tmp_path / f".tmp-a.{os.getppid()}", tmp_path / f".tmp-a.{2**22 + 1}"
    for path in (theirs, dead):
        path.write_text("half")
    write_atomic(tmp_path / "a", "whole")
    assert (theirs.read_text(), dead.read_text(), (tmp_path / "a").read_text()) == ("half", "half", "whole")
    claim_run_directory(tmp_path, resume=True)
    assert theirs.exists() and not dead.exists()


def test_long_values_are_shortened(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model: {family: decoder}\n")
    with pytest.raises(UserError) as error:
        load_config(
            config, [f"training.{'x' * 5000}=1", f"experiment.seed={'y' * 5000}", f"output_dir=[{'z, ' * 5000}]"]
        )
    assert len(str(error.value)) < 6000 and "characters)..." in str(error.value)
    assert len(str(UserError("a" * 300))) == 300


def test_a_finished_run_keeps_saying_what_was_trained(tiny: Workbench) -> None:
    """Another report of it is made, with other limits of the evaluation, but its configuration stays."""
    tiny.train()
    before = (tiny.run / "config.yaml").read_bytes()
    again = tiny.train("training.max_steps=2", "evaluation.max_new_tokens=1", "--resume", "auto")
    assert again["steps"] == 4 and (tiny.run / "config.yaml").read_bytes() == before
