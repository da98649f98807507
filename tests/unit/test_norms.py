"""Figures of probed steps: aggregation, table, file and heat map."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.diagnostics import norms
from mlx_training.spec import DecoderSpec, EncoderSpec, FrozenLM, TimeSeriesSpec

ENCODER = EncoderSpec(hidden_size=8, num_layers=1, num_heads=2, ffn_size=8, max_patches=4)
SPEC = TimeSeriesSpec(FrozenLM(Path(), 16, 32), ENCODER)


def figures(grad_norm: float = 1.0, **others: float) -> dict[str, float]:
    usual = {"param_norm": 10.0, "update_norm": 1e-2, "m_norm": 0.1, "v_norm": 1e-3, "zeros": 0.25, "nonfinite": 0}
    return {"grad_norm": grad_norm, **usual, **others}


def record(step: int = 1, **changed: dict[str, float]) -> dict[str, Any]:
    probe = {name: figures() for name in SPEC.params()}
    return norms.record_of(step, probe | {n.replace("__", "."): f for n, f in changed.items()}, SPEC)


def test_parameters_have_a_ratio_and_a_size() -> None:
    found = record()["parameters"]
    assert list(found) == list(SPEC.params())
    assert found["projector.linear.weight"] == {**figures(), "update_ratio": 1e-3, "size": 128}
    made = norms.record_of(1, {"encoder.pos_embed": figures(param_norm=0.0)}, SPEC)["parameters"]["encoder.pos_embed"]
    assert made["update_ratio"] == math.inf
    still = norms.record_of(1, {"encoder.pos_embed": figures(param_norm=0.0, update_norm=0.0)}, SPEC)
    assert still["parameters"]["encoder.pos_embed"]["update_ratio"] == 0


def test_modules_are_norms_of_norms() -> None:
    found = record(
        projector__linear__weight=figures(3.0, zeros=1.0, nonfinite=2), projector__linear__bias=figures(4.0, zeros=0.0)
    )["modules"]
    linear = found["projector.linear"]
    assert (linear["grad_norm"], linear["nonfinite"], linear["size"]) == (5.0, 2, 128 + 16)
    assert linear["zeros"] == pytest.approx(128 / 144)
    assert linear["update_norm"] == pytest.approx(1e-2 * 2**0.5) and linear["update_ratio"] == pytest.approx(1e-3)
    assert found["projector.*"]["grad_norm"] == pytest.approx((25 + 2) ** 0.5)
    assert found["encoder"]["size"] == 4 * 8, "positions alone"
    assert found["encoder.*"]["size"] == sum(p.size for n, p in SPEC.params().items() if n.startswith("encoder."))
    assert list(found)[-2:] == ["encoder.*", "projector.*"] and next(iter(found)) == "encoder.patch_embed"
    assert "encoder.layers.0.self_attn.out_proj" in found and "encoder.layers.0.linear2" in found


def test_modules_of_a_decoder() -> None:
    spec = DecoderSpec(16, hidden_size=8, num_layers=1, tie_word_embeddings=False)
    found = norms.record_of(1, {name: figures() for name in spec.params()}, spec)["modules"]
    assert {"model.embed_tokens", "lm_head", "model.layers.0.mlp.up_proj", "model.*", "lm_head.*"} <= set(found)


def test_the_table_never_rounds_to_zero() -> None:
    tiny = figures(3.21e-9, zeros=0.0)
    text = norms.table([record(7, encoder__pos_embed=tiny, projector__norm__bias=figures(0.0, zeros=1.0))])
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert text.startswith("step 7") and "update/weight" in text.splitlines()[0]
    assert lines["encoder.pos_embed"][1:] == ["3.21e-09", "1.00e+01", "1.00e-03", "0", "0", "1.00e-01", "1.00e-03"]
    assert lines["projector.norm.bias"][1] == "0" and lines["projector.norm.bias"][4] == "1.00e+00"
    assert not re.search(r"0\.00", text)
    assert len({len(line.rstrip()) for line in text.splitlines() if line}) == 1, "columns line up"
    names = [line.split()[0] for line in text.splitlines()[1:] if line]
    assert names == [*SPEC.params(), *record()["modules"]]
    bad = norms.table(
        [record(1, encoder__pos_embed=figures(math.nan, nonfinite=12), projector__norm__bias=figures(math.inf))]
    )
    assert re.search(r"encoder.pos_embed +nan .* 12 ", bad) and re.search(r"projector.norm.bias +inf ", bad)
    assert norms.table([record(1), record(2)]).count("update/weight") == 2


def test_the_file_keeps_what_is_not_finite(tmp_path: Path) -> None:
    records = [record(2), record(4, encoder__pos_embed=figures(math.inf, nonfinite=3, param_norm=math.nan))]
    norms.write_records(records, tmp_path / "g.jsonl")
    first, second = norms.read_records(tmp_path / "g.jsonl")
    assert first == records[0] and second["step"] == 4
    assert second["parameters"]["encoder.pos_embed"]["grad_norm"] == math.inf
    assert math.isnan(second["modules"]["encoder"]["param_norm"])
    norms.write_records(records[:1], tmp_path / "g.jsonl")
    assert len(norms.read_records(tmp_path / "g.jsonl")) == 1, "replaced"


def test_the_heat_map_shows_what_has_no_logarithm(tmp_path: Path) -> None:
    from matplotlib.image import imread

    def num_colours(records: list[dict[str, Any]]) -> int:
        norms.heat_map(records, tmp_path / "pictures/map.png")
        pixels = (imread(tmp_path / "pictures/map.png").reshape(-1, 4) * 255).round().astype(int)
        return np.unique(pixels @ 256 ** np.arange(4)).size

    def area(records: list[dict[str, Any]], colour: tuple[float, ...]) -> int:
        norms.heat_map(records, tmp_path / "map.png")
        pixels = imread(tmp_path / "map.png").reshape(-1, 4)
        return int((np.abs(pixels - np.array(colour)).max(1) < 0.01).sum())

    healthy = [record(s, encoder__pos_embed=figures(10.0**-s)) for s in range(1, 9)]
    dead = [record(s, encoder__pos_embed=figures(0.0)) for s in range(1, 9)]
    broken = [record(s, encoder__pos_embed=figures(math.nan if s > 4 else 1.0)) for s in range(1, 9)]
    assert num_colours(healthy) > 10
    assert area(dead, norms.ZERO) > 2 * area(healthy, norms.ZERO)
    assert area(broken, norms.NOT_FINITE) > 2 * area(healthy, norms.NOT_FINITE)
    nothing = [norms.record_of(1, {"encoder.pos_embed": figures(0.0)}, SPEC)]
    norms.heat_map(nothing, tmp_path / "map.png")
