"""OpenTSLM's .pt files: read and written without PyTorch, names mapped, LoRA kept, nothing executed."""

import os
import pickle
import runpy
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.adapters import Adapter
from mlx_training.errors import CheckpointError
from mlx_training.opentslm import read_opentslm, write_opentslm
from mlx_training.spec.timeseries import EncoderSpec, ProjectorSpec
from mlx_training.torch_archive import read_archive, write_archive

ENCODER = EncoderSpec(hidden_size=8, num_layers=2, num_heads=2, ffn_size=16, max_patches=26)
TABLE = ENCODER.params() | ProjectorSpec().params(8, 12)
SHAPES = {name: param.shape for name, param in TABLE.items()}
Q_PROJ = "model.layers.0.self_attn.q_proj"
LORA = Adapter({f"lm.{Q_PROJ}.lora_A.weight": np.ones((2, 12), np.float32)}, rank=2, alpha=4)
THEIRS = f"base_model.model.{Q_PROJ}.lora_A.default.weight"


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def published_encoder(torch: Any) -> Any:
    """The published encoder, of PyTorch's own modules."""
    module = torch.nn.Module()
    module.patch_embed = torch.nn.Conv1d(1, 8, 4, 4, bias=False)
    module.pos_embed = torch.nn.Parameter(torch.randn(1, 26, 8))
    module.input_norm = torch.nn.LayerNorm(8)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
    module.encoder = torch.nn.TransformerEncoder(layer, 2)
    return module


def assert_lora(found: Adapter | None) -> None:
    assert found is not None and (found.rank, found.alpha, found.dora) == (2, 4, False)
    assert {n: a.tolist() for n, a in found.arrays.items()} == {n: a.tolist() for n, a in LORA.arrays.items()}


@pytest.fixture
def fake_peft(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """PEFT's configuration as it is pickled: an object with fields, among them string enums and a set."""
    import enum

    types_module, config_module = types.ModuleType("peft.utils.peft_types"), types.ModuleType("peft.tuners.lora.config")
    task = enum.StrEnum("TaskType", {"CAUSAL_LM": "CAUSAL_LM"})
    task.__module__ = types_module.__name__
    types_module.TaskType = task  # type: ignore[attr-defined]

    class LoraConfig:
        def __init__(self) -> None:
            self.r, self.lora_alpha, self.task_type = 2, 4, task.CAUSAL_LM  # type: ignore[attr-defined]
            self.target_modules, self.revision = {"q_proj", "k_proj"}, None

    LoraConfig.__module__, LoraConfig.__qualname__ = config_module.__name__, "LoraConfig"
    config_module.LoraConfig = LoraConfig  # type: ignore[attr-defined]
    for module in (types_module, config_module):
        for name in ("peft", "peft.utils", "peft.tuners", "peft.tuners.lora", module.__name__):
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, types_module.__name__, types_module)
    return config_module


def test_reads_what_the_reference_writes(tmp_path: Path, fake_peft: types.ModuleType) -> None:
    torch = pytest.importorskip("torch")
    encoder = published_encoder(torch).state_dict()
    linear = torch.nn.Linear(8, 12)
    projector = {"projector.0.weight": torch.ones(8), "projector.0.bias": torch.zeros(8)}
    projector |= {"projector.1.weight": linear.weight.detach().bfloat16(), "projector.1.bias": linear.bias.detach()}
    torch.save(
        {
            "encoder_state": encoder,
            "projector_state": projector,
            "optimizer_state": torch.optim.AdamW([linear.weight]).state_dict(),
            "val_loss": 0.25,
            "epoch": 7,
            "lora_enabled": True,
            "lora_state": {THEIRS: torch.ones(12, 2).t()},  # not contiguous
            "lora_config": {"default": fake_peft.LoraConfig()},
        },
        tmp_path / "model_checkpoint.pt",
    )
    for module in [m for m in sys.modules if m.split(".")[0] == "peft"]:
        del sys.modules[module]
    found = read_opentslm(tmp_path / "model_checkpoint.pt")
    assert {n: a.shape for n, a in found.arrays.items()} == SHAPES
    for theirs, tensor in encoder.items():
        ours = theirs if theirs.startswith("encoder.") else f"encoder.{theirs}"
        np.testing.assert_array_equal(found.arrays[ours], tensor.numpy())
    np.testing.assert_array_equal(
        found.arrays["projector.linear.weight"], linear.weight.detach().bfloat16().float().numpy()
    )
    assert (found.epoch, found.extras) == (7, {"val_loss": 0.25})
    assert found.sizes == {
        "patch_size": 4, "hidden_size": 8, "num_layers": 2, "ffn_size": 16, "max_patches": 26, "llm_hidden_size": 12
    }  # fmt: skip
    assert_lora(found.lora)


def test_what_is_written_loads_safely_in_torch_and_round_trips(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    given, path = arrays(), tmp_path / "out.pt"
    write_opentslm(path, given, lora=LORA, epoch=300, extras={"val_loss": -1.5})
    content = torch.load(path, weights_only=True)
    assert content["epoch"] == 300 and content["lora_enabled"] is True and content["val_loss"] == -1.5
    assert set(content["encoder_state"]) == set(published_encoder(torch).state_dict())
    assert content["lora_config"]["default"]["lora_alpha"] == 4 and list(content["lora_state"]) == [THEIRS]
    torch.testing.assert_close(
        content["projector_state"]["projector.1.weight"], torch.from_numpy(given["projector.linear.weight"])
    )
    found = read_opentslm(path)
    assert_lora(found.lora)
    for name, array in given.items():
        np.testing.assert_array_equal(found.arrays[name], array)


def test_our_encoder_computes_what_the_published_one_does(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from torch_backend.timeseries import Encoder

    torch.manual_seed(0)
    theirs, ours = published_encoder(torch), Encoder(ENCODER)
    projector = {"projector.1.weight": torch.ones(12, 8)}
    torch.save({"encoder_state": theirs.state_dict(), "projector_state": projector}, tmp_path / "model_checkpoint.pt")
    read = read_opentslm(tmp_path / "model_checkpoint.pt").arrays
    state = {n.removeprefix("encoder."): torch.from_numpy(a) for n, a in read.items() if n.startswith("encoder.")}
    ours.load_state_dict(state, strict=True)
    series = torch.randn(2, 40)
    x = theirs.patch_embed(series[:, None]).transpose(1, 2) + theirs.pos_embed[:, :10]
    with torch.no_grad():
        expected = theirs.encoder.train()(theirs.input_norm(x))
        torch.testing.assert_close(ours(series, torch.zeros(2, 2), torch.tensor([10, 10]), torch.zeros(2)), expected)


def test_reading_needs_no_framework(tmp_path: Path) -> None:
    write_opentslm(tmp_path / "a.pt", arrays(), lora=LORA)
    code = (
        "import sys; from mlx_training.opentslm import read_opentslm; read_opentslm(sys.argv[1]);"
        "assert not {'torch', 'mlx', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pt")], cwd=Path(__file__).parents[2], check=True)


class Malicious:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        lambda target: Malicious(os.system, f"touch {target}"),
        lambda target: Malicious(eval, f"open({str(target)!r}, 'w')"),
        lambda target: Malicious(getattr, "", "join"),
        lambda target: Malicious(pickle.loads, pickle.dumps(Malicious(os.system, f"touch {target}"))),
    ],
)
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, attack: Any) -> None:
    target, path = tmp_path / "ran", tmp_path / "model_checkpoint.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"encoder_state": {}, "epoch": attack(target)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"refused: it asks to run .*nothing was executed"):
        read_opentslm(path)
    assert not target.exists()


def test_a_tensor_cannot_look_outside_its_storage(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.pt", {"w": np.arange(4, dtype=np.float32)})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    shape = b"(\x8a\x01\x04t"  # the tuple (4,), a LONG1 of one byte
    for forged in (b"(\x8a\x01\x05t", b"(\x8a\x01\xfct", b"(\x8a\x04\xff\xff\xff\x7ft"):
        assert members["a/data.pkl"].count(shape) == 1
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data.replace(shape, forged))
        with pytest.raises(CheckpointError, match="damaged PyTorch archive"):
            read_archive(tmp_path / "b.pt")


def test_truncated_flipped_and_foreign_files_are_clear_errors(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    write_opentslm(good, arrays())
    data = good.read_bytes()
    for damaged in (data[: len(data) // 2], data[:1000] + bytes([data[1000] ^ 1]) + data[1001:], b"", b"not a zip"):
        bad.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"bad\.pt: "):
            read_opentslm(bad)
    write_archive(bad, {"model_state": {}, "epoch": 1})
    with pytest.raises(CheckpointError, match=r"expected encoder_state .* Flamingo"):
        read_opentslm(bad)
    write_archive(bad, {"encoder_state": {"surprise": np.ones(1, np.float32)}, "projector_state": {}})
    with pytest.raises(CheckpointError, match=r"encoder_state\[surprise\].*missing: encoder.patch_embed.weight"):
        read_opentslm(bad)


def test_only_the_published_model_can_be_exported(tmp_path: Path) -> None:
    for name in ("encoder.scale_in.weight", "projector.gain", "lm_head.weight", "encoder.encoder.layers.0.norm1.bias"):
        with pytest.raises(CheckpointError, match=f"no place for the parameter {name}.*opentslm-sp"):
            write_opentslm(tmp_path / "out.pt", {**arrays(), name: np.ones(1, np.float32)})


def test_the_tool_converts_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tool(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["opentslm_checkpoint.py", *map(str, words)])
        return int(runpy.run_path(str(Path(__file__).parents[2] / "tools" / "opentslm_checkpoint.py"))["main"]())

    write_opentslm(tmp_path / "in.pt", arrays(), lora=LORA)
    assert tool("import", tmp_path / "in.pt", tmp_path / "run") == 0
    assert tool("export", tmp_path / "run", tmp_path / "out.pt") == 0
    before, after = read_opentslm(tmp_path / "in.pt"), read_opentslm(tmp_path / "out.pt")
    assert before.arrays.keys() == after.arrays.keys()
    assert_lora(after.lora)
    np.testing.assert_array_equal(before.arrays["encoder.pos_embed"], after.arrays["encoder.pos_embed"])
    assert tool("import", tmp_path / "in.pt", tmp_path / "run") == 2
    assert "already holds a run" in capsys.readouterr().err
