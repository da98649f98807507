"""Tools: the random Llama, a step at real size with its proof, and the report on real sensors."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from mlx_training import backend as backends_module
from mlx_training.assemble import RowData
from mlx_training.backend import Runtime
from mlx_training.config import RunConfig
from mlx_training.data.rows import Row
from mlx_training.errors import ConfigError
from mlx_training.llm_source import describe_llm
from mlx_training.spec import DecoderSpec, FrozenLM, RopeScaling, TimeSeriesSpec
from tools import har_control, har_folds, har_report, real_size
from tools.make_llama import LLAMA_3_2_1B, make_llama

TINY = LLAMA_3_2_1B | {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ACTIVITIES = ["WALKING", "WALKING_UPSTAIRS", "WALKING_DOWNSTAIRS", "SITTING", "STANDING", "LAYING"]
SIZES = ["model.encoder.patch_size=4", "model.encoder.hidden_size=16", "model.encoder.ffn_size=32"]
SMALL = [*SIZES, "backend=torch", "training.batch_size=12"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama of the preset's kind."""
    directory = tmp_path_factory.mktemp("llama") / "tiny"
    make_llama(TINY, directory, group_size=32)
    return directory


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows whose class is the level of one channel, for the subjects that har.yaml names."""
    rng = np.random.default_rng(0)
    subject = np.repeat([1, 2, 3, 4, 21, 22, 23, *range(25, 31)], 12)
    y = np.tile(np.arange(6), subject.size // 6)
    X = rng.normal(size=(subject.size, 32, 3))
    X[np.arange(y.size), :, y // 2] += np.where(y % 2, 5, -5)[:, None]
    path = tmp_path_factory.mktemp("har") / "windows.npz"
    np.savez(path, X=X.astype(np.float32), y=y, subject=subject, labels=np.array(ACTIVITIES))
    return path


def test_preset_is_llama_3_2_1b() -> None:
    shape = dict(LLAMA_3_2_1B)
    scaling = shape["rope_scaling"]
    spec = DecoderSpec(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        head_dim=shape["head_dim"],
        context_length=shape["max_position_embeddings"],
        rope_theta=shape["rope_theta"],
        rope_scaling=RopeScaling(
            scaling["factor"],
            scaling["low_freq_factor"],
            scaling["high_freq_factor"],
            scaling["original_max_position_embeddings"],
        ),
        norm_eps=shape["rms_norm_eps"],
        tie_word_embeddings=True,
    )
    assert spec.num_parameters == 1_235_814_400  # what the model card calls 1.23B
    assert (spec.rope_theta, spec.rope_scaling) == (500000.0, RopeScaling(32.0, 1.0, 4.0, 8192))


def test_random_llama_is_the_same_model_on_both_backends(llama: Path, both_backends: list[str]) -> None:
    info = describe_llm(llama)
    assert (info.num_layers, info.tie, info.quantization) == (2, True, {"group_size": 32, "bits": 4})
    spec = TimeSeriesSpec(FrozenLM(llama, info.hidden_size, info.vocab_size))
    hashes = set()
    for name in both_backends:
        backend = backends_module.get(name, Runtime(device="cpu"))
        hashes.add(backend.frozen_hash(backend.build(spec)))
    assert len(hashes) == 1


def test_make_llama_refuses_what_does_not_fit(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ConfigError, match="group size 48"):
        make_llama(TINY, tmp_path / "new", group_size=48)
    with pytest.raises(ConfigError, match=r"\[64, 128\].*group size 128"):
        make_llama(TINY, tmp_path / "new", group_size=128)
    with pytest.raises(ConfigError, match="holds a model already"):
        make_llama(TINY, llama, group_size=32)


def test_a_step_at_real_size_builds_logits_at_labels_only(llama: Path, backend_name: str) -> None:
    report = real_size.real_size(llama, backend_name, num_samples=32, num_text_tokens=8, runtime=Runtime(device="cpu"))
    batch, first, second = report["batch"], *report["steps"]
    assert report["proven"] and math.prod(report["largest_logits"]) == 4 * batch["labels"] * 2048
    assert report["trainable"] == {"encoder": 2_110_976, "projector": 256 + 128 * 64 + 64}
    assert first["loss"] == pytest.approx(math.log(2048), abs=0.5) and second["loss"] < first["loss"]
    assert 0 < report["memory_gb"]["imported"] <= report["memory_gb"]["loaded"] <= report["memory_gb"]["peak"]
    assert "proven" in real_size.describe(json.loads(json.dumps(report)))


def test_full_sequence_logits_are_noticed(llama: Path, backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wasteful(model: Any, batch: Any) -> Any:
        return {"loss": model.logits(batch).logsumexp(-1).sum(), "weight": batch.mask.sum()}

    monkeypatch.setattr(real_size, "lm", wasteful)
    report = real_size.real_size(llama, backend_name, num_samples=32, num_steps=1, runtime=Runtime(device="cpu"))
    assert not report["proven"]
    assert math.prod(report["largest_logits"]) == math.prod(report["full_sequence_logits"])


def har_config(windows: Path, llama: Path, run: Path, steps: int) -> RunConfig:
    budget = ["training.num_epochs=null", f"training.max_steps={steps}", "evaluation.every_steps=20"]
    return har_report.configure(windows, run, 1, [f"model.llm_id={llama}", *budget, *SMALL])


def test_control_learns_from_its_own_rows(windows: Path, llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    result = har_control.train_control(har_config(windows, llama, tmp_path, 160), tmp_path)
    assert result["eval"]["rows"] == 72 and result["eval"]["chance"] == pytest.approx(1 / 6)
    assert result["eval"]["accuracy"] >= 0.9
    lines = (tmp_path / "predictions_test.jsonl").read_text(encoding="utf-8").splitlines()
    right = [line["answer"] == line["prediction"] for line in map(json.loads, lines)]
    assert sum(right) / len(right) == result["eval"]["accuracy"]


def test_control_pools_real_patches_of_each_channel(windows: Path, llama: Path, tmp_path: Path) -> None:
    """What a shorter row gives is the same beside a longer one, and channels are told apart."""
    torch = pytest.importorskip("torch")
    from mlx_training.assemble import assemble, open_backend
    from mlx_training.data.batch import Batch
    from mlx_training.init import initialise

    config = har_config(windows, llama, tmp_path, 1)
    spec = har_control.ControlSpec(assemble(config).spec.encoder, 3, 6)  # type: ignore[attr-defined]
    backend: Any = open_backend(config, "torch")
    model = har_control.build_control(spec)
    backend.load(model, initialise(spec, 0))

    def logits(series: np.ndarray, num_patches: list[int]) -> np.ndarray:
        rows = len(series) // 3
        none = np.zeros((rows, 1), np.int32)
        scale, patches = np.zeros((len(series), 2), np.float32), np.array(num_patches, np.int32)
        places = np.tile(np.arange(3, dtype=np.int32), rows)
        batch = Batch(none, none, none, none[:, 0], None, series, scale, patches, places, rows=tuple(range(rows)))
        with torch.no_grad():
            return model(backend.to_device(batch)).numpy()

    short, long = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    short[:, 8:] = 0
    together = logits(np.concatenate([short, long]), [2, 2, 2, 4, 4, 4])
    np.testing.assert_allclose(together[0], logits(short[:, :8], [2, 2, 2])[0], rtol=1e-5, atol=1e-6)
    assert np.abs(logits(long[::-1].copy(), [4, 4, 4])[0] - together[1]).max() > 1e-3


def test_report_runs_every_variant_once(
    windows: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    overrides = [f"model.llm_id={llama}", "training.num_epochs=null", "training.max_steps=2", *SMALL]
    overrides.append("evaluation.max_new_tokens=2")
    results = har_report.run_all(windows, tmp_path, [1, 2], overrides)
    assert {name: list(runs) for name, runs in results.items()} == {name: [1, 2] for name in har_report.VARIANTS}
    assert all(r["steps"] == 2 and r["eval"]["rows"] == 72 for runs in results.values() for r in runs.values())

    har_report.write_report(tmp_path, results)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert np.sum(report["confusion"]["counts"]) == 2 * 72
    assert set(report["accuracy"]) == {*har_report.VARIANTS, "series_removed", "chance"}
    gaps, accuracy = report["by_subject"], report["accuracy"]
    assert list(gaps["differences"]) == ["25", "26", "27", "28", "29", "30"]  # as many windows each
    assert gaps["mean"] == pytest.approx(accuracy["main"]["mean"] - accuracy["control"]["mean"])
    table = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"| {report['accuracy']['control']['mean']:.3f} |" in table and "At least 0.86: no" in table
    assert (tmp_path / "confusion.png").stat().st_size > 5000

    monkeypatch.setattr(har_report, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(har_report, "train_control", lambda *_: pytest.fail("trained again"))
    assert har_report.run_all(windows, tmp_path, [1, 2], overrides)["control"][2] == results["control"][2]
    with pytest.raises(ConfigError, match="main_seed1 holds a run of another configuration"):
        har_report.run_all(windows, tmp_path, [1], [*overrides, "training.batch_size=8"])


def test_differences_by_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [SimpleNamespace(group=group) for group in ("9", "9", "30", "30")]
    data = Mock(spec=RowData, rows=lambda _: rows)
    monkeypatch.setattr(har_report, "assemble", lambda _: SimpleNamespace(data=data))
    answers = {"main": "xxxy", "control": "xyyy", "again": "xyxx"}  # x is right
    for name, given in answers.items():
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps({"answer": "x", "prediction": letter}) + "\n" for letter in given)
        (tmp_path / name / "predictions_test.jsonl").write_text(lines)
    found = har_report.by_subject(Mock(), [tmp_path / "main"], [tmp_path / "control", tmp_path / "again"])
    assert found == {"9": 0.5, "30": 0.0}


def test_differences_that_all_have_one_sign_are_rare() -> None:
    """Two of the four ways to flip the signs of two subjects' differences are as far from 0."""
    found = har_report.against_chance({"30": 0.25, "9": 0.5})
    assert found == {"differences": {"30": 0.25, "9": 0.5}, "mean": 0.375, "p": 0.5}
    assert "by subject: 9: +0.500, 30: +0.250; mean over subjects +0.375, p = 0.500" in har_report.gaps_line(found)
    assert har_report.against_chance({str(n): 0.1 for n in range(10)})["p"] == 2 / 2**10
    assert har_report.against_chance({"3": 0.5})["p"] == 1


def test_lying_windows_are_turned_to_all_sides() -> None:
    lying = np.array([[0.1], [1.0], [0.0]], np.float32) + np.zeros((3, 8), np.float32)
    rows = [Row("", tuple(lying), ("",) * 3, "", answer) for answer in ("laying", "standing")]
    turned = np.array([row.series for row in har_folds.on_any_side(rows)])
    assert turned.shape == (12, 3, 8) and turned.dtype == np.float32
    np.testing.assert_allclose(turned[:, 0], 0.1, rtol=1e-6, err_msg="x is what it turns about")
    sides = np.degrees(np.arctan2(turned[:, 2, 0], turned[:, 1, 0])) % 360
    np.testing.assert_allclose(sides, np.arange(12) * 30, atol=1e-3)


def test_folds_leave_the_test_subjects_out(
    windows: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ["training.num_epochs=null", "training.max_steps=2", "evaluation.every_steps=2", f"model.llm_id={llama}"]
    argv = ["har_folds", "--data", str(windows), "--out", str(tmp_path / "out"), *SMALL, *budget]
    monkeypatch.setattr("sys.argv", argv)
    assert har_folds.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and lines[-2].startswith("mean: main 0.") and "), control 0." in lines[-2]
    assert all(re.search(r"[01]\.\d{3} \(lying on any side [01]\.\d{3}\)$", line) for line in lines[:-1])
    assert re.findall(r"(\d+): [+-]", lines[-1]) == ["1", "2", "3", "4", "21", "22", "23"]
    left = np.load(tmp_path / "out" / "without_test.npz")["subject"]
    assert set(left.tolist()) == {1, 2, 3, 4, 21, 22, 23}
    tested = [json.loads(line)["id"] for line in (tmp_path / "out/main_seed1_fold0/predictions_test.jsonl").open()]
    assert len(tested) == 24  # subjects 1 and 22: every fifth

    monkeypatch.setattr(har_report, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr("sys.argv", [*argv, "--folds", "3", "0", "3", "--models", "main"])
    assert har_folds.main() == 0
    again = capsys.readouterr().out.splitlines()
    assert again[:2] == [line for k in (3, 0) for line in lines if line.startswith(f"fold {k} ") and "main:" in line]
    assert len(again) == 3 and again[2].startswith("mean: main 0.") and "control" not in again[2]

    moved = tmp_path / "moved.npz"
    np.savez(moved, **{**(arrays := dict(np.load(windows))), "X": arrays["X"][::-1]})
    refused = [
        ([*argv, "training.batch_size=8", "--folds", "0"], 2, "main_seed1_fold0 holds a run of another configuration"),
        (["har_folds", "--data", str(moved), *argv[3:]], 2, "holds folds of other data than"),
        (["har_folds", "--data", "nowhere.npz", *argv[3:]], 3, "no data file"),
        ([*argv, "--folds", "7"], 2, "invalid choice"),
        ([*argv, f"dataset.path={windows}"], 2, "the tool sets dataset.path itself"),
        ([*argv, "evaluation.save_predictions=false"], 2, "the tool sets evaluation.save_predictions itself"),
        (["har_folds", "--data", str(windows), "--out", str(windows), *argv[5:]], 2, "give another --data or --out"),
    ]
    for given, code, message in refused:
        monkeypatch.setattr("sys.argv", given)
        with pytest.raises(SystemExit) as ended:
            har_folds.main()
        assert ended.value.code == code and message in capsys.readouterr().err


def test_folds_in_which_nobody_lies(
    windows: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    arrays = dict(np.load(windows))
    up = arrays["y"] != ACTIVITIES.index("LAYING")
    np.savez(tmp_path / "up.npz", **{name: a[up] if a.shape[:1] == up.shape else a for name, a in arrays.items()})
    budget = ["training.num_epochs=null", "training.max_steps=2", "evaluation.every_steps=2", f"model.llm_id={llama}"]
    argv = ["har_folds", *SMALL, *budget, "--data", str(tmp_path / "up.npz"), "--folds", "0", "--models", "control"]
    monkeypatch.setattr("sys.argv", [*argv, "--out", str(tmp_path / "out")])
    assert har_folds.main() == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("(nobody lies)")
    monkeypatch.setattr(har_report, "train_control", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr("sys.argv", [*argv, "--out", str(tmp_path / "again")])
    with pytest.raises(SystemExit, match="130"):
        har_folds.main()
    assert "the same command goes on from here" in capsys.readouterr().err
