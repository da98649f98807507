"""Every parameter of the shipped models, by name, shape and initialisation, as committed text.

A change of a golden file is a change of what checkpoints hold. Refresh with:
    .venv/bin/python tests/unit/test_golden.py
"""

from pathlib import Path

import pytest

from mlx_training.assemble import timeseries_spec
from mlx_training.config import load_config
from mlx_training.config_model import LanguageConfig
from mlx_training.spec import EncoderSpec, FrozenLM, ProjectorSpec, Spec, TimeSeriesSpec

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CASES = ("quick_test", "tiny_llama", "timeseries_har", "opentslm_sp_llama_3_2_1b")


def spec_of(case: str) -> Spec:
    if case == "opentslm_sp_llama_3_2_1b":
        return TimeSeriesSpec(FrozenLM(Path(), 2048, 128256), EncoderSpec(), ProjectorSpec())
    model = load_config(case.replace("timeseries_", "timeseries/")).model
    return model.spec(768) if isinstance(model, LanguageConfig) else timeseries_spec(model)


def table(spec: Spec) -> str:
    lines = []
    for name, p in spec.params().items():
        shape, decay = "x".join(map(str, p.shape)), "decay" if p.decay else "no decay"
        lines.append(f"{name}  {shape}  {p.init}({p.scale:.6g})  {decay}  {p.group}")
    return "\n".join([*lines, f"{spec.num_parameters} parameters", ""])


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_golden_file(case: str) -> None:
    assert table(spec_of(case)) == (GOLDEN / f"{case}.txt").read_text()


def test_published_sizes() -> None:
    sizes = {"encoder": 0, "projector": 0}
    for param in spec_of("opentslm_sp_llama_3_2_1b").params().values():
        sizes[param.group] += param.size
    assert sizes == {"encoder": 2_110_976, "projector": 264_448}


if __name__ == "__main__":
    for name in CASES:
        (GOLDEN / f"{name}.txt").write_text(table(spec_of(name)))
