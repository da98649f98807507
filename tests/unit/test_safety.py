"""Hostile material: archives, weights, configurations and run directories that want more than to be read."""

import json
import os
import pickle
import shutil
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_training import backend as backends
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import load_config
from mlx_training.data.importers import load_rows
from mlx_training.data.splits import SplitSpec
from mlx_training.errors import CheckpointError, ConfigError, DataError, UserError, without_secrets
from mlx_training.llm_config import normalize_llm_config
from mlx_training.llm_source import resolve_llm, safetensors_header, weight_files
from mlx_training.opentslm import read_opentslm
from mlx_training.run_directory import claim_run_directory, write_atomic
from mlx_training.run_lock import locked
from mlx_training.spec import FrozenLM
from mlx_training.torch_archive import read_archive, write_archive
from tests.e2e.tiny import save_tiny_llama

CANARY = "canary-5fd1c9d2"

# PyTorch archives


class Stub:
    """What a pickle may ask for: a global that is called."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def archive(path: Path, content: bytes, members: dict[str | zipfile.ZipInfo, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", content)
        for name, data in (members or {}).items():
            file.writestr(name, data)
    return path


def storage(key: str, size: int = 2) -> bytes:
    """A pickle of one tensor in the storage `key`."""
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX"
    tensor += struct.pack("<I", len(key)) + key.encode() + b"X\x03\x00\x00\x00cpuK" + bytes([size])
    return tensor + b"tQK\x00K" + bytes([size]) + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"


@pytest.mark.parametrize("key", ["../../evil", "/etc/evil", "../../../../../../etc/hostname", "link"])
def test_members_are_read_by_name_and_never_extracted(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    link = zipfile.ZipInfo("x/link")
    link.external_attr = 0o120777 << 16
    eight = np.ones(2, "<f4").tobytes()
    path = archive(Path("a.pt"), b"\x80\x02" + storage(key) + b".", {f"x/data/{key}": eight, link: b"/etc/pwd"})
    assert read_archive(path).shape == (2,), "bytes of the archive, whatever they are called"
    archive(path, b"\x80\x02" + storage(key) + b".")
    with pytest.raises(CheckpointError, match="damaged PyTorch archive"):
        read_archive(path)  # not there: nothing outside is looked at
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "a.pt"]


@pytest.mark.parametrize(
    "function", [os.system, eval, exec, open, getattr, __import__, pickle.loads, shutil.rmtree, OrderedDict.fromkeys]
)
def test_a_pickle_runs_nothing(tmp_path: Path, function: Any) -> None:
    attack = Stub(function, f"{tmp_path / 'ran'}")
    with pytest.raises(CheckpointError, match=r"refused: it asks to run .*nothing was executed|damaged"):
        read_archive(archive(tmp_path / "a.pt", pickle.dumps({"epoch": attack}, protocol=2)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02ccollections\nOrderedDict.fromkeys\n.",
        b"\x80\x02cpeft\nX\n)\x81}(X\x01\x00\x00\x00aK\x01ub.",  # a stand-in's fields are data
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}(X\x0c\x00\x00\x00__defaults__)u\x86b.",  # change our function
        b"\x80\x02cpeft\nX\nN}(X\x0c\x00\x00\x00__setstate__K\x01u\x86b0K\x01.",
        b"\x80\x04" + b"\x8c\x08builtins\x8c\x04eval\x93.",  # STACK_GLOBAL
        b"(" * 100_000 + b".",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # an integer of 2 GB
        b"\x80\x02]q\x00h\x00a0h\x00.",  # a list that holds itself
        b"\x80\x02Q.",
        b"",
    ],
)
def test_opcodes_that_a_tensor_does_not_need(tmp_path: Path, content: bytes) -> None:
    from mlx_training import torch_archive

    before = dict(vars(torch_archive.Inert)), torch_archive._Unpickler._rebuild_tensor.__defaults__
    with pytest.raises(CheckpointError, match=r"a\.pt: "):
        read_opentslm(archive(tmp_path / "a.pt", content))
    assert (dict(vars(torch_archive.Inert)), torch_archive._Unpickler._rebuild_tensor.__defaults__) == before


def test_a_bomb_does_not_go_off(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", bytes(50_000_000))
    with pytest.raises(CheckpointError, match="its members are compressed"):
        read_archive(tmp_path / "a.pt")

    many = b"\x80\x02](" + storage("0", 200) * 2000 + b"e."  # of one storage: 1.6 MB of tensors in 0.2 MB
    once = b"\x80\x02]" + storage("0", 200) + b"a."
    assert len(read_archive(archive(tmp_path / "b.pt", once, {"x/data/0": bytes(800)}))) == 1
    with pytest.raises(CheckpointError, match="more than 4 times as large as the file"):
        read_archive(archive(tmp_path / "b.pt", many, {"x/data/0": bytes(800)}))

    write_archive(tmp_path / "c.pt", {"shared": np.ones(9, np.float32)})
    assert read_archive(tmp_path / "c.pt")["shared"].sum() == 9


def test_a_configuration_that_contains_itself_ends(tmp_path: Path) -> None:
    bomb: Any = "x"
    for _ in range(6):
        bomb = [bomb] * 100
    state = {"encoder_state": {}, "projector_state": {}, "lora_enabled": True, "lora_state": {}, "lora_config": bomb}
    from mlx_training.opentslm import _lora

    started = time.monotonic()
    with pytest.raises(CheckpointError, match="its settings have r None"):
        _lora(tmp_path, state)
    assert time.monotonic() - started < 5


# Weights


def header(path: Path, value: Any, data: bytes = b"") -> Path:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


HEADERS = {
    "size": struct.pack("<Q", 2**62) + b"{}",
    "nested": b"[" * 200_000,
    "list": [],
    "number": 7,
    "text": "x",
    "no offsets": {"w": {"dtype": "F32", "shape": [1], "data_offsets": []}},
    "text offsets": {"w": {"dtype": "F32", "shape": [1], "data_offsets": ["a", "b"]}},
    "entry": {"w": 3},
    "too large a shape": {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}},
    "outside": {"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 4]}},
    "type": {"w": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}},
    "overlap": {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"},
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_hostile_safetensors_header(tmp_path: Path, what: str) -> None:
    path, value = tmp_path / "model.safetensors", HEADERS[what]
    if what == "size":
        path.write_bytes(value)
    else:
        header(path, value, b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*download it again"):
        safetensors_header(path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/{}/secret.safetensors", "a/../../secret.safetensors", ".."]
)
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    (model / "a").mkdir(parents=True)
    save_file({"w": np.ones(1, np.float32)}, tmp_path / "secret.safetensors")
    name = name.format(str(tmp_path).strip("/"))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="weight files stand beside it. Not opened"):
        weight_files(model)


@pytest.mark.parametrize("name", ["../data", "..", ".", "tiny-llama-4bit/..", "../../../etc"])
def test_builtin_names_no_other_directory(name: str) -> None:
    with pytest.raises(ConfigError, match="no builtin model is called"):
        resolve_llm(f"builtin/{name}")


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, backend_name: str) -> None:
    llm = save_tiny_llama(tmp_path / "llm")
    for name in ("model.py", "modeling_x.py", "configuration_x.py", "tokenization_x.py"):
        (llm / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((llm / "config.json").read_text())
    for code in ({"model_file": "model.py"}, {"auto_map": {"AutoModel": "modeling_x.X", "AutoConfig": "x.C"}}):
        with pytest.raises(ConfigError, match=f"{next(iter(code))} asks for Python code .* is never run here"):
            normalize_llm_config(config | code, "config.json")
    asking = {
        "trust_remote_code": True,
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
    }
    (llm / "config.json").write_text(json.dumps(config | asking | {"_name_or_path": "someone/model"}))
    tokenizer = llm / "tokenizer_config.json"
    own_code = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | own_code))
    package = sys.modules[type(backends.get(backend_name)).__module__]
    lm = package.load_frozen(FrozenLM(llm, 32, 384, "", "dequantized"))
    assert lm.num_layers == 1 and not (tmp_path / "ran").exists()


# Data


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    np.savez(tmp_path / "a.npz", X=np.array([Stub(os.system, f"touch {target}")], object), y=np.zeros(1))
    with pytest.raises(DataError, match="not a readable npz archive of plain arrays"):
        load_rows(tmp_path / "a.npz", "npz")
    assert not target.exists()


@pytest.mark.parametrize("file", ["../x.jsonl", "/etc/passwd", "a/../../x.jsonl"])
def test_split_files_stay_in_their_folder(file: str) -> None:
    with pytest.raises(ConfigError, match="outside the folder of dataset.path"):
        SplitSpec(file={"train": file})
    SplitSpec(file={"train": "sub/train.jsonl"})


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['id']", "!!python/name:os.system", "!x 1"])
def test_yaml_makes_no_objects(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"experiment: {{name: {text}}}\n")
    with pytest.raises(ConfigError, match="c.yaml:1: not valid YAML: "):
        load_config(path)


# Run directories


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.yaml", ".tmp-config.yaml", "checkpoints", "predictions_test.jsonl"]
)
@pytest.mark.parametrize("dangling", [True, False])
def test_a_run_does_not_write_through_links(tmp_path: Path, name: str, dangling: bool) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    if not dangling:
        outside.write_text("mine")
    (run / name).symlink_to(outside)
    with pytest.raises(ConfigError, match=r"holds links .*nothing was changed"):
        claim_run_directory(run, resume=True)
    assert outside.exists() != dangling
    if name != "checkpoints":
        write_atomic(run / name.removeprefix(".tmp-"), "new")
        assert outside.exists() != dangling and (dangling or outside.read_text() == "mine")
        assert (run / name.removeprefix(".tmp-")).read_text() == "new"


def test_the_lock_is_not_taken_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run/train.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match="cannot be written"), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("pointer", ["../../other/checkpoints/step_00000001", "/etc", "..", "", "step_00000009"])
def test_a_pointer_names_a_checkpoint_of_its_run(tmp_path: Path, pointer: str) -> None:
    for run, value in (("other", 7.0), ("run", 1.0)):
        CheckpointStore(tmp_path / run).save(1, {"w": np.full(1, value, np.float32)}, {}, {}, best=True, keep=1)
    store = CheckpointStore(tmp_path / "run")
    for which in ("latest", "best"):
        (store.directory / which).write_text(pointer)
    assert store.load("latest").model["w"] == 1.0  # the newest here
    with pytest.raises(CheckpointError, match="there is no 'best' checkpoint"):
        store.load("best")


# Secrets in messages


@pytest.mark.parametrize(
    "override",
    [
        f"logging.wandb_api_key={CANARY}",
        f"logging.wandb_api_key='{CANARY}",
        f"logging.wandb_api_key={{a: {CANARY}",
        f"logging.hf_token=[{CANARY}, 1]",
        f"hf_token: {CANARY}",
        f"experiment.tags={{password: {CANARY}}}",
        f"logging={{project: {{api_key: {CANARY}}}}}",
    ],
)
def test_a_secret_among_the_settings_is_not_repeated(override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("quick_test", [override])
    assert CANARY not in str(refused.value)


def test_a_secret_in_a_file_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text in (f"wandb_api_key: {CANARY}", f"logging: {{api_key: [{CANARY}]}}", f"hf_token: '{CANARY}"):
        path.write_text(text)
        with pytest.raises(ConfigError) as refused:
            load_config(path)
        assert CANARY not in str(refused.value)


def test_messages_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", CANARY)
    monkeypatch.setenv("SHORT_TOKEN", "1")
    monkeypatch.setenv("TOKENIZER_NAME", "llama-tokenizer")
    given = f"1 llama-tokenizer https://me:pw@host/x {CANARY} doctor logging.hf_token=abc eos_token: </s>"
    expected = "1 llama-tokenizer https://***@host/x *** doctor logging.hf_token=*** eos_token: </s>"
    assert without_secrets(given) == expected == str(UserError(given))
