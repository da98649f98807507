"""The main job, as users run it, on each backend (minutes; `make proof`)."""

import os
import time
from pathlib import Path

import pytest

from mlx_training.config import load_config
from mlx_training.trainer import train


@pytest.mark.proof
def test_quick_test_learns_to_read_series(backend_name: str, tmp_path: Path) -> None:
    config = load_config("quick_test", [f"output_dir={tmp_path / 'run'}", f"backend={backend_name}"])
    started = time.monotonic()
    scores = train(config)["eval"]
    print(f"{backend_name}: {scores}, {time.monotonic() - started:.0f} s, {os.environ['OMP_NUM_THREADS']} thread")
    assert scores["rows"] == 1000
    assert scores["accuracy"] >= 0.92, scores
    assert min(scores["by_type"].values()) >= 0.75, scores
    assert scores["chance"] <= 0.35, scores
    assert scores["accuracy_without_series"] <= scores["chance"] + 0.10, scores
