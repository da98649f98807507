"""Every parameter of the shipped models, by name, shape and initialisation, as committed text.

A change of a golden file is a change of what checkpoints hold. Refresh with:
    .venv/bin/python tests/unit/test_golden.py
"""

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from mlx_training.config import load_config
from mlx_training.config_model import LanguageConfig, ModelConfig
from mlx_training.config_presets import PRESETS
from mlx_training.pretrained import pretrained_spec
from mlx_training.spec import AdapterSpec, EncoderSpec, FrozenLM, ProjectorSpec, Spec, TimeSeriesSpec

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
VOCABULARY = 50_257  # of presets: GPT-2's
PRESET_CASES = {
    f"preset_{name}": (family, name) for family, sizes in PRESETS.items() if family != "timeseries" for name in sizes
}
CASES = (
    "quick_test",
    "tiny_llama",
    "timeseries_har",
    "opentslm_sp_llama_3_2_1b",
    "language_lora_instruct",
    "language_unet",
    *PRESET_CASES,
)


def spec_of(case: str) -> Spec:
    if case == "opentslm_sp_llama_3_2_1b":
        return TimeSeriesSpec(FrozenLM(Path(), 2048, 128256), EncoderSpec(), ProjectorSpec())
    if case in PRESET_CASES:
        return preset_spec(*PRESET_CASES[case], VOCABULARY)
    model = load_config(case.replace("timeseries_", "timeseries/").replace("language_", "language/")).model
    return model.spec(768) if isinstance(model, LanguageConfig) else pretrained_spec(model)


def preset_spec(family: str, name: str, vocab_size: int) -> Spec:
    """The spec of a preset of a language family."""
    section: dict[str, Any] = {"family": family, **PRESETS[family][name]}
    return TypeAdapter(ModelConfig).validate_python(section).spec(vocab_size)


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


def test_size_of_lora_on_llama_3_2_1b() -> None:
    """Rank 16 on the seven matrices of 16 layers, as PEFT counts them."""
    sizes = {"q": (2048, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 2048)}
    sizes |= {"gate": (8192, 2048), "up": (8192, 2048), "down": (2048, 8192)}
    linears = tuple((f"model.layers.{i}.{name}_proj", *size) for i in range(16) for name, size in sizes.items())
    lora = AdapterSpec(linears, rank=16)
    assert sum(param.size for param in lora.params().values()) == 11_272_192


if __name__ == "__main__":
    for name in CASES:
        (GOLDEN / f"{name}.txt").write_text(table(spec_of(name)))
