"""Gradients over time: what a run writes, what the tools show, and where two backends part."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.backend import PROBE
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import load_config
from mlx_training.diagnostics import norms
from mlx_training.diagnostics.compare import Comparison, Difference, compare, relative
from mlx_training.diagnostics.subject import from_config
from tests.e2e.workbench import Workbench, contents, metrics
from tools import compare_backends, grad_norms

PROBED = ("training.max_steps=8", "diagnostics.probe_every_steps=3")


def test_a_run_writes_its_probes(tiny: Workbench) -> None:
    tiny.train("training.max_steps=8", "output_dir=plain")
    tiny.train(*PROBED)
    records = norms.read_records(tiny.run / norms.FILE)
    assert [record["step"] for record in records] == [3, 6]
    model = CheckpointStore(tiny.run).load().model
    for record in records:
        assert list(record) == ["step", "parameters", "modules"] and set(record["parameters"]) == set(model)
        for name, figures in record["parameters"].items():
            assert list(figures) == [*PROBE, "size", "update_ratio"] and figures["size"] == model[name].size
            assert figures["nonfinite"] == 0 and figures["update_norm"] > 0
    total = np.sqrt(sum(figures["grad_norm"] ** 2 for figures in records[0]["parameters"].values()))
    (logged,) = (r["grad_norm"] for r in metrics(tiny.run) if r["step"] == 3 and "loss" in r)
    assert total == pytest.approx(logged, rel=1e-5)
    assert not (Path("plain") / norms.FILE).exists()
    plain = CheckpointStore("plain").load().model
    assert all(np.allclose(plain[name], array, atol=1e-6) for name, array in model.items()), "a probe only looks"


def test_a_resumed_run_continues_its_probes(tiny: Workbench) -> None:
    often = "training.max_steps=8", "diagnostics.probe_every_steps=1", "checkpoint.keep=9"
    tiny.train(*often)
    whole = (tiny.run / norms.FILE).read_bytes()
    with (tiny.run / norms.FILE).open("ab") as file:
        file.write(b'{"step": 9, "para')
    tiny.train(*often, "--resume", tiny.run / "checkpoints/step_00000004")
    assert (tiny.run / norms.FILE).read_bytes() == whole
    tiny.train(*often, "diagnostics.probe_every_steps=null", "--resume", tiny.run / "checkpoints/step_00000002")
    assert [record["step"] for record in norms.read_records(tiny.run / norms.FILE)] == [1, 2]


def test_the_tool_on_a_run(tiny: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.train(*PROBED)
    assert grad_norms.main([str(tiny.run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 6 ") and "step 3 " not in out and "projector.linear.weight" in out
    assert (tiny.run / "gradients.png").read_bytes().startswith(b"\x89PNG")
    tiny.train("output_dir=plain")
    assert grad_norms.main(["plain"]) == 2
    assert "diagnostics.probe_every_steps" in capsys.readouterr().err


def test_the_tool_on_a_configuration(tiny: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(tiny.folder)
    files = ["--jsonl", "g.jsonl", "--heatmap", "g.png"]
    argv = [str(tiny.config), "--steps", "2", *files, "training.grad_accumulation_steps=2"]
    assert grad_norms.main(argv) == 0
    out = capsys.readouterr().out
    assert "step 1 " in out and "step 2 " in out and "encoder.*" in out and "g.png" in out
    added = {path.name for path in contents(tiny.folder).keys() - before.keys()}
    assert added <= {"g.jsonl", "g.png"}
    tiny.train("training.grad_accumulation_steps=2", "diagnostics.probe_every_steps=1")
    expected = norms.read_records(tiny.run / norms.FILE)[:2]
    found = norms.read_records("g.jsonl")
    for a, b in zip(expected, found, strict=True):
        for name, figures in a["parameters"].items():
            if not name.endswith("in_proj_bias"):  # in part rounding noise
                assert b["parameters"][name] == pytest.approx(figures, rel=1e-4), name
    assert grad_norms.main([str(tiny.config), "training.max_stepz=3"]) == 2
    assert "max_stepz" in capsys.readouterr().err


def test_both_backends_compared(bench: Workbench, both_backends: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_backends.main([str(bench.config), "--batch", "1"]) == 0
    out = capsys.readouterr().out
    assert "within 1e-04" in out and "encoder.layers.0.linear2" in out and "gradient of projector.norm.weight" in out
    order = [line.split("  ")[0] for line in out.splitlines()]
    places = [order.index(p) for p in ("encoder", "projector", "inputs", "lm.model.layers.0", "logprobs", "loss")]
    assert places == sorted(places)
    assert compare_backends.main([str(bench.config), "--tolerance", "1e-12"]) == 1
    assert "first divergence: encoder.patch_embed" in capsys.readouterr().out
    bench.use_decoder()
    assert compare_backends.main([str(bench.config)]) == 0
    assert "model.layers.0.mlp" in capsys.readouterr().out


def test_the_first_divergence_is_named(bench: Workbench, both_backends: list[str]) -> None:
    """A scale changed behind the parameters of one backend; then a difference in the gradient only."""
    config = load_config(bench.config)
    a, b = (from_config(config, name) for name in ("mlx", "torch"))

    def found(objective: Any = a.objective) -> Comparison:
        return compare(a.backend, a.model, b.backend, b.model, objective, a.batch(0))

    assert found().first_divergence(1e-4) is None and found().largest <= 1e-4
    b.model.encoder.layers[0].norm1.eps = 0.1
    assert found().first_divergence(1e-4) == "encoder.layers.0.norm1"
    b.model.encoder.layers[0].norm1.eps = 1e-5
    encode = b.model.projector.forward
    b.model.projector.forward = lambda x: encode(x.detach())
    assert found().first_divergence(1e-4) == "gradient of encoder.patch_embed.weight"
    del b.model.projector.forward
    b.backend.load(
        b.model, {n: x * (1.01 if n == "projector.linear.weight" else 1) for n, x in b.backend.export(b.model).items()}
    )
    assert found().first_divergence(1e-4) == "projector.linear"


def test_relative_difference() -> None:
    a = np.array([3.0, 4.0])
    assert relative(a, a) == 0 and relative(a * 1.1, a) == pytest.approx(0.1)
    assert relative(np.zeros(2), np.zeros(2)) == 0 and relative(a, np.zeros(2)) == np.inf
    assert relative(a, a[:1]) == np.inf
    bad = np.array([np.nan, 4.0])
    assert relative(bad, bad) == 0 and relative(a, bad) == np.inf and relative(bad, a) == np.inf
    assert Comparison((Difference("x", 0.1), Difference("y", np.nan))).first_divergence(0.2) == "y"


def test_a_backend_is_compared_with_itself(backend_name: str, tiny_llm: Path, bench: Workbench) -> None:
    subject = from_config(load_config(bench.config), backend_name)
    found = compare(subject.backend, subject.model, subject.backend, subject.model, subject.objective, subject.batch(0))
    assert found.largest == 0
