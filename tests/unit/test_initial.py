"""training.init_from: strict names and shapes, from every kind of source, and no adapter is dropped."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_training.adapters import Adapter, describe_adapter, peft_name, write_mlx_lm, write_peft
from mlx_training.checkpoint import CheckpointStore
from mlx_training.errors import CheckpointError
from mlx_training.init import initialise
from mlx_training.initial import load_initial
from mlx_training.opentslm import write_opentslm
from mlx_training.spec import AdapterSpec, EncoderSpec, FrozenLM, Param, PretrainedSpec, Spec, TimeSeriesSpec

ENCODER = EncoderSpec(hidden_size=8, num_layers=1, num_heads=2, ffn_size=16, max_patches=26)
LORA = AdapterSpec((("model.layers.0.self_attn.q_proj", 6, 12), ("model.layers.0.mlp.up_proj", 20, 12)), 2, 3.0)
PLAIN = TimeSeriesSpec(FrozenLM(Path("lm"), 12, 96, "a" * 64), ENCODER)
ADAPTED = replace(PLAIN, adapter=LORA)
TEXT = PretrainedSpec(PLAIN.llm, adapter=LORA)


@dataclass(frozen=True)
class Scalars(Spec):
    names: tuple[str, ...] = ("b",)

    def params(self) -> dict[str, Param]:
        return {name: Param((1,), "zeros") for name in self.names}


def fresh(spec: Spec) -> dict[str, np.ndarray]:
    return initialise(spec, 0)


def trained(spec: PretrainedSpec) -> dict[str, np.ndarray]:
    return {name: array + 1 for name, array in fresh(spec).items()}


def adapter(**changes: Any) -> Adapter:
    return replace(Adapter(trained(TEXT), 2, 3.0, llm_sha256="a" * 64), **changes)


def save_run(run: Path, spec: PretrainedSpec) -> Path:
    state = {"adapter": describe_adapter(spec), "llm_sha256": spec.llm.sha256}
    CheckpointStore(run).save(1, trained(spec), {}, state, best=True, keep=1)
    return run


def save_adapter(folder: Path, form: str, **changes: Any) -> Path:
    folder.mkdir()
    if form == "peft":
        write_peft(folder, adapter(**changes), "tiny")
    else:
        write_mlx_lm(folder, adapter(**changes), 1)
    return folder


def test_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    store, spec = CheckpointStore(tmp_path), Scalars()
    store.save(10, {"b": np.array([10], np.float32)}, {}, {}, best=True, keep=2)
    last = store.save(20, {"b": np.array([20], np.float32)}, {}, {}, best=False, keep=2)
    assert load_initial(tmp_path, spec, fresh(spec))["b"] == 10  # the best of the run
    assert load_initial(last, spec, fresh(spec))["b"] == 20
    with pytest.raises(CheckpointError, match=r"missing: d \(1,\)"):
        load_initial(tmp_path, spec, fresh(Scalars(("b", "d"))))
    with pytest.raises(CheckpointError, match=r"run directory .* checkpoint directory .* model_checkpoint\.pt"):
        load_initial(tmp_path / "nowhere", spec, fresh(spec))
    (last / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing[\s\S]*newest good one is .*step_00000010"):
        load_initial(last, spec, fresh(spec))


def test_a_chain_of_runs_keeps_its_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stage without, one whose adapters start afresh, one that goes on with them, and one that would drop them."""
    start = load_initial(save_run(tmp_path / "stage2", PLAIN), ADAPTED, fresh(ADAPTED))
    assert "no adapters in it; those of this run start afresh" in capsys.readouterr().err
    assert not start["lm.model.layers.0.mlp.up_proj.lora_B.weight"].any()
    assert start["encoder.pos_embed"].tolist() == trained(PLAIN)["encoder.pos_embed"].tolist()
    stage3 = save_run(tmp_path / "stage3", ADAPTED)
    for name, array in load_initial(stage3, ADAPTED, fresh(ADAPTED)).items():
        np.testing.assert_array_equal(array, trained(ADAPTED)[name])
    with pytest.raises(
        CheckpointError, match=r"not apply; set model.lora={rank: 2, alpha: 3, dora: false, targets: \["
    ):
        load_initial(stage3, PLAIN, fresh(PLAIN))


def test_lora_that_an_earlier_version_kept_beside_a_run(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", PLAIN)
    arrays = {peft_name(name, "default"): array for name, array in trained(TEXT).items()}
    save_file(arrays, run / "lora.safetensors")
    (run / "lora.json").write_text('{"r": 2, "lora_alpha": 3}')
    assert load_initial(run, ADAPTED, fresh(ADAPTED)).keys() == ADAPTED.params().keys()
    with pytest.raises(CheckpointError, match="which this run would not apply"):
        load_initial(run, PLAIN, fresh(PLAIN))


def test_an_opentslm_file_with_lora_is_applied_or_refused(tmp_path: Path) -> None:
    write_opentslm(tmp_path / "in.pt", trained(PLAIN), lora=adapter(llm_sha256=None))
    found = load_initial(tmp_path / "in.pt", ADAPTED, fresh(ADAPTED))
    assert found.keys() == ADAPTED.params().keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, trained(ADAPTED)[name])
    with pytest.raises(CheckpointError, match=r"would not apply; set model.lora=.*targets: \[q_proj, up_proj\]}"):
        load_initial(tmp_path / "in.pt", PLAIN, fresh(PLAIN))


def test_an_older_position_table_says_the_size_to_use(tmp_path: Path) -> None:
    write_opentslm(tmp_path / "in.pt", trained(PLAIN))
    spec = replace(PLAIN, encoder=replace(ENCODER, max_patches=10))
    with pytest.raises(CheckpointError, match=r"max_patches 26[\s\S]*pos_embed is \(1, 26, 8\), expected \(1, 10, 8\)"):
        load_initial(tmp_path / "in.pt", spec, fresh(spec))


@pytest.mark.parametrize("form", ["peft", "mlx-lm"])
def test_a_directory_of_adapters(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_adapter(tmp_path / form, form)
    found = load_initial(folder, TEXT, fresh(TEXT))
    assert found.keys() == TEXT.params().keys() and capsys.readouterr().err == ""
    for name, array in found.items():
        np.testing.assert_array_equal(array, trained(TEXT)[name])
    beside = load_initial(folder, ADAPTED, fresh(ADAPTED))
    assert "adapters only; " in capsys.readouterr().err
    np.testing.assert_array_equal(beside["encoder.pos_embed"], fresh(ADAPTED)["encoder.pos_embed"])


@pytest.mark.parametrize("form", ["peft", "mlx-lm"])
def test_adapters_of_something_else_are_refused(form: str, tmp_path: Path) -> None:
    other = TEXT.llm.sha256.replace("a", "b")
    wider = replace(TEXT, adapter=replace(LORA, linears=(("model.layers.0.self_attn.q_proj", 6, 12),)))
    for number, (changes, spec, message) in enumerate(
        (
            (
                {"llm_sha256": other},
                TEXT,
                r"adapters for another base \(sha256 bbbbbbbbbbbb, given aaaa.*model\.llm_id",
            ),
            ({"alpha": 4.0}, TEXT, r"alpha 4.*, where model.lora says 3.0; set model.lora.alpha=4"),
            ({}, wider, r"unknown: lm.model.layers.0.mlp.up_proj.*\n[\s\S]*targets=\[q_proj, up_proj\]"),
        )
    ):
        folder = save_adapter(tmp_path / str(number), form, **changes)
        with pytest.raises(CheckpointError, match=message):
            load_initial(folder, spec, fresh(spec))


def test_kinds_of_adapters_that_are_not_known_are_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "peft", "peft")
    config = (folder / "adapter_config.json").read_text()
    for old, new, message in (
        ('"bias": "none"', '"bias": "all"', "with bias; only plain LoRA and DoRA"),
        ('"r": 2', '"use_rslora": true, "r": 2', "with use_rslora; only plain"),
        ('"r": 2', '"r": "two"', "its settings have r 'two'; expected a number"),
        ("{", "", "is not valid JSON"),
    ):
        (folder / "adapter_config.json").write_text(config.replace(old, new, 1))
        with pytest.raises(CheckpointError, match=message):
            load_initial(folder, TEXT, fresh(TEXT))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="adapter_model.bin, are not read"):
        load_initial(folder, TEXT, fresh(TEXT))
