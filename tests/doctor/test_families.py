"""No false alarm over frozen language models of every architecture, dense and packed, and over the parity cases."""

from pathlib import Path

import pytest

from mlx_training.config import load_config
from mlx_training.diagnostics.doctor import examine
from mlx_training.diagnostics.plan import bytes_needed
from mlx_training.diagnostics.subject import Subject
from mlx_training.objectives.lm import lm
from mlx_training.spec import EncoderSpec, FrozenLM, Spec, TimeSeriesSpec
from tests.doctor.cases import by_turns
from tests.parity import cases
from tests.parity.tiny_checkpoints import FAMILIES, save_tiny, save_tiny_quantized

SCALED = EncoderSpec(**(vars(cases.ENCODER) | {"numeric_scale": True, "max_series": 2, "dropout": 0.2}))


def subject_of(spec: Spec, backend_name: str) -> Subject:
    """A subject without a configuration, on the batches of the parity suite."""
    backend, model = cases.realise(backend_name, spec)
    made = cases.batches(spec, 6)
    return Subject(
        backend=backend,
        spec=spec,
        model=model,
        objective=lm,
        batch=lambda index: made[index % len(made)],
        optim=cases.OPTIM,
        rates=lambda step: cases.rates(spec, step, 100),
        total_steps=100,
        fresh=getattr(spec, "adapter", None) is None,  # those are away from zero
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model of every architecture, and a Llama in 4 bits."""
    folder = tmp_path_factory.mktemp("lm")
    for family in FAMILIES:
        save_tiny(family, folder / family)
    save_tiny_quantized("llama", folder / "llama-4bit")
    return folder


@pytest.mark.parametrize(("family", "backend"), by_turns(FAMILIES))
def test_frozen_families(family: str, backend: str, models: Path) -> None:
    spec = TimeSeriesSpec(FrozenLM(models / family, 64, cases.VOCAB), SCALED)
    report = examine(subject_of(spec, backend))
    assert not report.failed, str(report)
    batch = cases.batches(spec, 1)[0]
    assert 1e6 < bytes_needed(load_config("quick_test"), spec, batch, len(batch.tokens), backend) < 1e9


@pytest.mark.parametrize(("case", "backend"), by_turns(cases.CASES))
def test_parity_cases(case: str, backend: str, models: Path) -> None:
    spec = cases.specs(models / "llama-4bit")[case]
    report = examine(subject_of(spec, backend), full=backend == "torch")  # MLX: test_faults.py, as configured
    assert not report.failed, str(report)
