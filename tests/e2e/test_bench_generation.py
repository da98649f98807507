"""The sides of `tools/bench.py generation` on a trained run: the same prompts are answered, and read."""

from collections import Counter

import pytest

from mlx_training.data.batch import Batch
from tests.e2e.workbench import Workbench
from tools.benchmarks import ours, reading


def test_answers_and_reading_alone_take_the_same_prompts(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.train()
    loaded, rows = ours.questions(str(tiny.run), tiny.backend)
    seen: Counter[str] = Counter()
    to_device = type(loaded.backend).to_device

    def counted(backend: object, batch: Batch) -> Batch:
        seen["tokens"] += int(batch.lengths.sum())
        return to_device(backend, batch)

    monkeypatch.setattr(type(loaded.backend), "to_device", counted)
    expected = sum(len(loaded.data.encode_prompt(row)) for row in rows)
    assert expected > 0
    for batch_size in (1, 3):
        for side in (ours.evaluation, reading.kernels):
            seen.clear()
            assert side(str(tiny.run), batch_size, tiny.backend)(1) == {}
            assert seen["tokens"] == expected, side
