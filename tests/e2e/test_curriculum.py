"""OpenTSLM's five stages in sequence, on generated rows in each stage's raw format; its checkpoints out and back."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.checkpoint import CheckpointStore
from tests.e2e.workbench import Workbench
from tools.opentslm_checkpoint import export_run, import_file

STAGE = "timeseries/curriculum/stage"
NUM_ROWS = 10  # one of them validates, one tests
PUBLISHED = 2_110_976  # parameters of the encoder


def raw_rows(i: int) -> dict[str, dict[str, Any]]:
    """Row `i` of every stage's file, in the words of its data set; lengths are no multiple of the patch."""
    wave = np.round(np.sin(np.arange(30 + i) / (2 + i % 3)) * (i + 1), 4).tolist()
    label = ("walking", "sitting")[i % 2]
    return {
        "tsqa": {"Task": "trend", "Question": "Is it rising?", "Answer": ("yes", "no")[i % 2], "Series": str(wave)},
        "m4": {"id": f"m{i}", "frequency": "Daily", "series": wave, "caption": f"A wave of {i + 1}."},
        "har_cot": {f"{axis}_axis": wave for axis in "xyz"} | {"rationale": f"It moves. Answer: {label}"},
        "sleep_cot": {"time_series": [wave], "rationale": "Slow waves. Answer: Wake"},
        "ecg_qa_cot": {
            "question": "Is it normal?",
            "template_id": 1,
            "question_type": "single-verify",
            "ecg_id": f"[{i + 1}]",
            "clinical_context": "",
            "series": [wave] * 2,
            "rationale": "It is regular. Answer: yes",
        },
    }


@pytest.fixture
def stages(bench: Workbench, backend_name: str) -> Workbench:
    """A working directory with the data where the shipped configurations expect it."""
    bench.backend = backend_name
    Path("data").mkdir()
    made = [raw_rows(i) for i in range(NUM_ROWS)]
    for name in made[0]:
        Path("data", f"{name}.jsonl").write_text("".join(json.dumps(row[name]) + "\n" for row in made))
    return bench


def test_five_stages_in_sequence(stages: Workbench) -> None:
    """The shipped files as they are, but for the LM, the number of steps and the length of the answers."""
    small = [f"model.llm_id={stages.llm}", "training={num_epochs: null, max_steps: 1}", "evaluation.max_new_tokens=2"]
    small += [f"backend={stages.backend}", "device=cpu"]
    before: dict[str, np.ndarray] = {}
    for number in range(1, 6):
        result = stages.json("train", f"{STAGE}{number}", *small, f"experiment.seed={number}")
        assert (result["run"], result["steps"]) == (f"runs/curriculum/stage{number}", 1)
        assert math.isfinite(result["loss"]) and result["eval"]["rows"] == 1
        after = CheckpointStore(result["run"]).best_or_latest().model
        assert sum(a.size for name, a in after.items() if name.startswith("encoder.")) == PUBLISHED
        for name, array in before.items():  # one step at 2e-4 and 1e-4 from where the last stage ended
            assert 0 < np.abs(after[name] - array).max() < 2.5e-4, name
        before = after
    assert sum(".lora_" in name for name in before) == 14, "seven matrices of the one layer"

    # out, and back in: as a file, and as a run
    Path("out").mkdir()
    print(export_run(Path("runs/curriculum/stage5"), Path("out/model_checkpoint.pt")))
    print(import_file(Path("out/model_checkpoint.pt"), Path("back")))
    still = ["training.learning_rate={encoder: 1e-12, projector: 0, lora: 0}", "training.weight_decay=0"]
    for source in ("out/model_checkpoint.pt", "back"):
        stages.json(
            *("train", f"{STAGE}3", *small, *still),
            *(f"training.init_from={source}", f"output_dir={Path('again', Path(source).name)}"),
        )
        after = CheckpointStore(Path("again", Path(source).name)).load().model
        assert after.keys() == before.keys()
        for name, array in before.items():
            assert np.abs(after[name] - array).max() < 1e-6, name
    message = stages.refused(3, "train", f"{STAGE}3", *small, "--resume", "back/checkpoints/step_00000000")
    assert "training.init_from instead of --resume" in message


def test_a_stage_that_does_not_fit_the_one_before(stages: Workbench) -> None:
    small = [f"model.llm_id={stages.llm}", "training={num_epochs: null, max_steps: 1}", "evaluation.max_new_tokens=2"]
    small += [f"backend={stages.backend}", "device=cpu", "model.encoder={num_layers: 1, hidden_size: 16, ffn_size: 16}"]
    stages.json("train", f"{STAGE}1", *small)
    message = stages.refused(3, "train", f"{STAGE}2", *small, "model.encoder.max_patches=512")
    assert "shape: encoder.pos_embed is (1, 1024, 16), expected (1, 512, 16)" in message and "stage1" in message
    message = stages.refused(3, "train", f"{STAGE}3", *small)
    assert "runs/curriculum/stage2: nothing to start from" in message
