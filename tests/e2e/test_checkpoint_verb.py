"""`mlx-training checkpoint ls|verify|diff|export` on runs of both families and both backends."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_training import checkpoint_files, checkpoint_tools
from mlx_training.checkpoint import CheckpointStore
from mlx_training.generate import generate_rows
from mlx_training.hf_mamba import read_mamba
from mlx_training.llm_source import describe_llm
from mlx_training.opentslm import read_opentslm
from tests.e2e.tiny import decoder_config, language_config, pretrained_config
from tests.e2e.workbench import CONFIG, DATA, Workbench, contents, flip_a_bit, truncate
from tools.opentslm_checkpoint import import_file

WIDE = "model.decoder.hidden_size=32", "model.decoder.intermediate_size=32"
PUBLISHED = (
    "model.preset=opentslm-sp",
    "model.encoder.hidden_size=8",
    "model.encoder.numeric_scale=false",
    "model.projector.norm_output=false",
    "checkpoint.every_steps=4",
)


def step(bench: Workbench, number: int) -> Path:
    return bench.run / "checkpoints" / f"step_{number:08d}"


def verified(bench: Workbench, path: Path, code: int) -> dict:
    """The report of `checkpoint verify --json`, which changes no file."""
    before = contents(bench.folder)
    given, out, err = bench.main("checkpoint", "verify", path, "--json")
    assert given == code, err
    assert out.count("\n") == 1 and contents(bench.folder) == before
    return json.loads(out)


def test_ls_tells_step_size_and_marks(tiny: Workbench) -> None:
    tiny.train()
    result = tiny.json("checkpoint", "ls", tiny.run)
    two, four = result["checkpoints"]
    assert (two["step"], four["step"]) == (2, 4) and two["complete"] and four["complete"]
    assert (two["latest"], four["latest"]) == (False, True)
    assert [item["best"] for item in (two, four)].count(True) == 1
    assert four["bytes"] == sum(file.stat().st_size for file in step(tiny, 4).iterdir())
    (step(tiny, 2) / "manifest.json").unlink()
    truncate(step(tiny, 4) / "model.safetensors")
    code, out, _ = tiny.main("checkpoint", "ls", tiny.run)
    assert code == 0 and out.count("  NO") == 2 and "step_00000004" in out and "latest" in out


def test_ls_of_a_run_without_checkpoints(bench: Workbench) -> None:
    bench.train()
    shutil.rmtree(bench.run / "checkpoints")
    assert bench.json("checkpoint", "ls", bench.run)["checkpoints"] == []
    assert "no checkpoint was saved yet" in bench.main("checkpoint", "ls", bench.run)[1]
    assert "none was saved" in bench.refused(DATA, "checkpoint", "verify", bench.run)


@pytest.mark.parametrize("family", ["timeseries", "decoder"])
def test_verify_finds_every_damage_and_names_it(tiny: Workbench, family: str) -> None:
    if family == "decoder":
        tiny.use_decoder()
    tiny.train()
    good = verified(tiny, tiny.run, 0)
    assert good["ok"] and good["shapes"] == "checked" and [item["problems"] for item in good["checkpoints"]] == [[], []]
    assert [item["step"] for item in verified(tiny, step(tiny, 2), 0)["checkpoints"]] == [2]
    code, out, _ = tiny.main("checkpoint", "verify", tiny.run)
    assert code == 0 and out.count(": good\n") == 2

    flip_a_bit(step(tiny, 4) / "optimizer.safetensors")
    bad = verified(tiny, tiny.run, 3)
    (problem,) = bad["checkpoints"][1]["problems"]
    assert bad["checkpoints"][0]["ok"] and problem["file"] == "optimizer.safetensors"
    assert problem["expected"]["size"] == problem["found"]["size"]
    assert problem["expected"]["sha256"] != problem["found"]["sha256"]
    code, out, _ = tiny.main("checkpoint", "verify", tiny.run)
    assert code == 3 and "DAMAGED\n  optimizer.safetensors: sha256 is" in out
    assert f"the newest good one is {step(tiny, 2)}: --resume" in out

    (step(tiny, 2) / "state.json").unlink()
    (problem,) = verified(tiny, step(tiny, 2), 3)["checkpoints"][0]["problems"]
    assert (problem["file"], problem["problem"], problem["found"]) == ("state.json", "missing", None)
    assert "none of those checked is good" in tiny.main("checkpoint", "verify", tiny.run)[1]


def test_verify_finds_arrays_that_do_not_fit_the_run(bench: Workbench) -> None:
    """Sums that fit, of a checkpoint of another model."""
    bench.train()
    store = CheckpointStore(bench.run)
    kept = store.load()
    model = dict(kept.model)
    name = next(iter(model))
    model[name] = np.zeros((3, 2), np.float32)
    model["stranger"] = np.zeros(1, np.float32)
    store.save(4, model, kept.optimizer, kept.state | {"llm_sha256": "0" * 64}, best=True, keep=3)
    problems = verified(bench, step(bench, 4), 3)["checkpoints"][0]["problems"]
    assert [item["file"] for item in problems] == ["model.safetensors", "model.safetensors", "state.json"]
    assert problems[0]["found"] == [3, 2] and problems[0]["expected"] == list(kept.model[name].shape)
    assert "stranger" in problems[1]["problem"] and "no such array" in problems[1]["problem"]
    assert problems[2]["found"] == "0" * 64 and problems[2]["expected"] == describe_llm(bench.llm).sha256
    (bench.run / "config.yaml").unlink()
    assert "no config.yaml" in verified(bench, step(bench, 4), 0)["shapes"]


def test_verify_without_the_frozen_lm_still_checks_sums(bench: Workbench) -> None:
    shutil.copytree(bench.llm, bench.folder / "llm")
    bench.train(f"model.llm_id={bench.folder / 'llm'}")
    shutil.rmtree(bench.folder / "llm")
    report = verified(bench, bench.run, 0)
    assert report["ok"] and report["shapes"].startswith("not checked: there is no directory")


def test_verify_finds_a_pointer_to_nothing(bench: Workbench) -> None:
    bench.train()
    (bench.run / "checkpoints" / "best").write_text("step_00000009\n")
    report = verified(bench, bench.run, 3)
    assert not report["ok"] and report["pointers"][0]["found"] == "step_00000009"
    assert (
        "best: names 'step_00000009', expected one of step_00000002, step_00000004"
        in (bench.main("checkpoint", "verify", bench.run)[1])
    )


def test_a_checkpoint_that_the_run_drops_meanwhile_is_no_damage(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.train()

    def verify(path: Path) -> list[str]:
        if path == step(bench, 2):
            shutil.rmtree(path)
        return checkpoint_files.verify(path)

    monkeypatch.setattr(checkpoint_tools, "verify", verify)
    report = bench.json("checkpoint", "verify", bench.run)
    assert [item["step"] for item in report["checkpoints"]] == [4]


def test_diff_tells_what_training_changed(tiny: Workbench) -> None:
    tiny.train()
    same = tiny.json("checkpoint", "diff", step(tiny, 2), step(tiny, 2))
    assert same["identical"] and same["settings"] == {}
    assert all(item["max_abs"] == item["relative"] == 0 for item in same["parameters"]["both"])

    result = tiny.json("checkpoint", "diff", step(tiny, 2), step(tiny, 4))
    assert not result["identical"] and (result["a"]["step"], result["b"]["step"]) == (2, 4)
    two, four = (load_file(step(tiny, n) / "model.safetensors") for n in (2, 4))
    for item in result["parameters"]["both"]:
        gap = np.abs(two[item["name"]] - four[item["name"]])
        assert item["max_abs"] == pytest.approx(float(gap.max()), rel=1e-5)
        assert item["identical"] == (gap.max() == 0) and item["shape_a"] == list(gap.shape)
    moments = {item["name"] for item in result["moments"]["both"]}
    assert moments == {f"{name}.{k}" for name in two for k in "mv"} | {"step"}
    code, out, _ = tiny.main("checkpoint", "diff", step(tiny, 2), step(tiny, 4))
    assert code == 0 and "max |a-b|" in out and "settings: 0 differ" in out


def test_diff_of_two_backends_and_of_two_models(bench: Workbench, both_backends: list[str]) -> None:
    for name in both_backends:
        bench.train(f"backend={name}", f"output_dir={name}")
    result = bench.json("checkpoint", "diff", "mlx", "torch")
    assert result["settings"] == {"backend": ["mlx", "torch"], "output_dir": ["mlx", "torch"]}
    for item in result["parameters"]["both"]:
        if not item["name"].endswith("in_proj_bias"):  # attention does not depend on a key's bias: noise alone
            assert item["relative"] < 1e-4, item
    bench.train("output_dir=wide", "model.encoder.ffn_size=12", "model.encoder.numeric_scale=false")
    other = bench.json("checkpoint", "diff", "mlx", "wide")
    assert other["settings"]["model.encoder.ffn_size"] == [8, 12]
    assert "encoder.scale_in.weight" in other["parameters"]["only_in_a"] and not other["parameters"]["only_in_b"]
    out = bench.main("checkpoint", "diff", "mlx", "wide")[1]
    assert "shape (8, 8) | (12, 8)" in out and "only in a: encoder.scale_in.weight" in out
    assert "  model.encoder.ffn_size: 8 | 12" in out
    (bench.folder / "wide" / "config.yaml").unlink()
    assert bench.json("checkpoint", "diff", "mlx", "wide")["settings"] is None


def test_diff_of_what_is_not_finite(bench: Workbench) -> None:
    store = CheckpointStore(bench.run)
    for number, value in ((1, np.inf), (2, np.nan)):
        arrays = {"a": np.array([value, 0], np.float32), "b": np.zeros(2, np.float32)}
        store.save(number, arrays, {}, {}, best=False, keep=2)
    first, second = bench.json("checkpoint", "diff", step(bench, 1), step(bench, 2))["parameters"]["both"]
    assert not first["identical"] and first["max_abs"] is None and second["identical"] and second["relative"] == 0
    assert "a: (2,): not finite" in bench.main("checkpoint", "diff", step(bench, 1), step(bench, 2))[1]


def test_export_hugging_face_and_mlx(tiny: Workbench) -> None:
    """Without the training data; the quantised one is a frozen LM that the other family starts from."""
    tiny.use_decoder()
    tiny.train(*WIDE, "model.tokenizer.train=384", "model.decoder.context_length=64")
    out = tiny.json("checkpoint", "export", tiny.run, "--to", "out/hf", "--format", "hf")
    assert out["format"] == "hf" and out["written"].startswith("11 float32 arrays of step ")
    best = CheckpointStore(tiny.run).best_or_latest().model
    written = load_file("out/hf/model.safetensors")
    assert written.keys() == best.keys() and all((written[name] == best[name]).all() for name in best)
    info = describe_llm(Path("out/hf"))
    assert (info.model_type, info.hidden_size, info.vocab_size, info.quantization) == ("llama", 32, 384, None)

    folder = ["checkpoint", "export", tiny.run, "--format", "mlx", "--group-size", 32, "--to"]
    assert "8 bits in groups of 32" in tiny.json(*folder, "out/q8", "--bits", 8)["written"]
    tiny.json(*folder, "out/q4")
    assert describe_llm(Path("out/q4")).quantization == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert not list(Path("out").glob(".tmp*")) and not list(Path("out/q4").glob("float*"))
    tiny.__post_init__()
    for packed in ("q4", "q8"):
        tiny.train(f"model.llm_id=./out/{packed}", f"output_dir=on_{packed}", "evaluation.every_steps=4")
    assert len(generate_rows(Path("on_q4"), tiny.data)["rows"]) == 32
    texts = tiny.folder / "texts.txt"
    texts.write_text("The line rises and falls. " * 200)
    book = ["--data", texts, "--context-length", 16, "--backend", tiny.backend]
    dense = tiny.json("evaluate", tiny.run, *book)["loss"]
    for packed, error in (("q4", 0.05), ("q8", 0.003)):  # adapters that have not learned change nothing
        tiny.write(pretrained_config(Path(f"./out/{packed}"), texts, tiny.folder / f"lora_{packed}"))
        tiny.train("training.learning_rate=1e-12")
        assert tiny.json("evaluate", f"lora_{packed}", *book)["loss"] == pytest.approx(dense, abs=error)


def test_export_needs_no_training_text(bench: Workbench) -> None:
    text = bench.folder / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"The {i} quick brown foxes jump over {i * 7} lazy dogs and go home. " * 8)
    dataset = f"dataset: {{path: {text}, format: text, splits: {{fraction: {{validation: 0.2, test: 0.2}}}}}}"
    config = decoder_config(bench.run).splitlines()
    bench.write("\n".join(dataset if line.startswith("dataset:") else line for line in config) + "\n")
    bench.train()
    shutil.rmtree(text)
    bench.json("checkpoint", "export", bench.run, "--to", "hf", "--format", "hf")
    assert verified(bench, bench.run, 0)["shapes"] == "checked"


def test_export_opentslm(tiny: Workbench) -> None:
    tiny.train(*PUBLISHED)
    out = tiny.json("checkpoint", "export", tiny.run, "--to", "out", "--format", "opentslm")
    assert out["written"].endswith("; no LoRA")
    arrays = read_opentslm(Path("out/model_checkpoint.pt")).arrays
    best = CheckpointStore(tiny.run).best_or_latest().model
    assert arrays.keys() == best.keys() and all((arrays[name] == best[name]).all() for name in best)
    import_file(Path("out/model_checkpoint.pt"), Path("imported"))  # weights without a configuration
    assert verified(tiny, Path("imported"), 0)["ok"]
    tiny.json("checkpoint", "export", "imported", "--to", "again", "--format", "opentslm")
    assert tiny.json("checkpoint", "diff", "imported", tiny.run)["parameters"]["both"][0]["identical"]


def test_a_mamba_is_exported(tiny: Workbench) -> None:
    tiny.write(language_config(tiny.run, "ssm"))
    tiny.train("model.ssm={mixers: [mamba], num_layers: 1, head_dim: 64, num_filters: 24, num_heads: 4, window: 256}")
    tiny.json("checkpoint", "export", tiny.run, "--to", "out", "--format", "hf")
    spec, arrays = read_mamba(Path("out"))
    assert arrays.keys() == load_file("out/model.safetensors").keys() and spec.mixers == ("mamba",)
    assert (Path("out") / "tokenizer.json").is_file()
    tiny.train("output_dir=mixed")
    message = tiny.refused(CONFIG, "checkpoint", "export", "mixed", "--to", "no", "--format", "hf")
    assert "Hugging Face's Mamba has no mixers: mamba, mamba2, s4d, stu, local" in message


def test_export_refuses_what_a_format_cannot_hold(bench: Workbench) -> None:
    bench.train()
    export = ["checkpoint", "export", bench.run, "--to"]
    message = bench.refused(CONFIG, *export, "out", "--format", "hf")
    assert (
        "family timeseries; --format hf holds family decoder or ssm or adapters only. Give --format opentslm" in message
    )
    message = bench.refused(DATA, *export, "out", "--format", "opentslm")
    assert message.startswith("error: OpenTSLM has no place for the parameter encoder.scale_in")  # no temporary name
    assert "leave them out" in bench.refused(CONFIG, *export, "out", "--format", "opentslm", "--bits", 4)
    assert "is not empty; give a directory" in bench.refused(CONFIG, *export, ".", "--format", "opentslm")
    assert "is a file; give a directory" in bench.refused(CONFIG, *export, bench.data, "--format", "opentslm")
    assert "cannot be written: " in bench.refused(DATA, *export, bench.data / "x", "--format", "opentslm")
    shutil.rmtree(bench.run / "checkpoints")
    assert "no 'latest' checkpoint" in bench.refused(DATA, *export, "out", "--format", "opentslm")

    bench.use_decoder()
    bench.train("output_dir=lm")
    export = ["checkpoint", "export", "lm", "--to", "out", "--format"]
    assert "family decoder; --format opentslm holds family timeseries only. Give --format hf or mlx" in (
        bench.refused(CONFIG, *export, "opentslm")
    )
    assert "--group-size 64 does not divide this model's hidden_size 16; give --format hf" in (
        bench.refused(CONFIG, *export, "mlx")
    )
    (bench.folder / "lm" / "config.yaml").unlink()
    assert "no config.yaml; expected a run directory" in bench.refused(DATA, *export, "hf")
    assert not (bench.folder / "out").exists() and not list(bench.folder.glob(".tmp*"))


def test_a_damaged_checkpoint_is_neither_compared_nor_exported(bench: Workbench) -> None:
    bench.train(*PUBLISHED)
    for path in CheckpointStore(bench.run).paths():
        flip_a_bit(path / "model.safetensors")
    for command in (["diff", bench.run, bench.run], ["export", bench.run, "--to", "out", "--format", "opentslm"]):
        message = bench.refused(DATA, "checkpoint", *command)
        assert "damaged checkpoint" in message and "sha256 is" in message


def test_what_is_no_run(bench: Workbench) -> None:
    (bench.folder / "empty").mkdir()
    for verb in ("ls", "verify"):
        assert "neither a run (with checkpoints/) nor a checkpoint" in bench.refused(DATA, "checkpoint", verb, "empty")
    assert "A 'nowhere' is not a directory" in bench.refused(DATA, "checkpoint", "diff", "nowhere", "empty")
    assert "B 'nowhere' is not a directory" in bench.refused(DATA, "checkpoint", "diff", "empty", "nowhere")


def test_a_file_this_program_never_wrote(bench: Workbench) -> None:
    """A manifest that fits it."""
    bench.train()
    store = CheckpointStore(bench.run)
    foreign = step(bench, 4)
    (foreign / "model.safetensors").write_bytes(b"pickle")
    (foreign / "manifest.json").write_text(checkpoint_files.manifest_of(foreign))
    report = verified(bench, store.directory / "step_00000004", 3)
    assert report["checkpoints"][0]["problems"][0]["file"] == "model.safetensors"


@pytest.mark.parametrize("thing", ["pipe", "loop"])
def test_what_is_no_file_is_not_waited_for(bench: Workbench, thing: str) -> None:
    bench.train()
    for name in ("model.safetensors", "manifest.json"):
        path = step(bench, 4) / name
        path.unlink()
        os.mkfifo(path) if thing == "pipe" else path.symlink_to(name)
    assert [item["complete"] for item in bench.json("checkpoint", "ls", bench.run)["checkpoints"]] == [True, False]
    code, out, _ = bench.main("checkpoint", "verify", bench.run)
    assert code == 3 and "model.safetensors: missing" in out and "manifest.json: missing" in out


def test_verify_finds_a_state_that_cannot_be_gone_on_from(bench: Workbench) -> None:
    bench.train()
    path = step(bench, 4) / "state.json"
    state = json.loads(path.read_text())
    for wrong in (state | {"progress": state["progress"] | {"evaluated": 9}}, {"step": 4}):
        path.write_text(json.dumps(wrong))
        (path.parent / "manifest.json").write_text(checkpoint_files.manifest_of(path.parent))
        (problem,) = json.loads(bench.main("checkpoint", "verify", path.parent, "--json")[1])["checkpoints"][0][
            "problems"
        ]
        assert problem["file"] == "state.json"
