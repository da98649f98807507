"""tools/bench.py: it measures two sides in turns, says what is absent, and its statistics are right."""

import sys
from pathlib import Path

import pytest

from tools import bench, evidence
from tools.benchmarks import growth, measure
from tools.benchmarks.listing import Listing
from tools.benchmarks.measure import Measured, PeerError, Side
from tools.benchmarks.plots import draw


def test_smallest_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides take the same step: the loop written by hand and ours say the same loss."""
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    assert bench.main(["smoke", "--models", str(tmp_path), "--backend", "torch"]) == 0
    loop, ours = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert loop.split("loss")[1] == ours.split("loss")[1]
    assert "hand-written" in loop and "ours" in ours and "x " in ours


def test_an_absent_peer_is_named_and_a_broken_one_raises() -> None:
    options = {"llm": "", "rows": {}, "checkout": "", "precision": "float32"}
    assert "--opentslm PATH" in Side("opentslm:timeseries", options).absent
    with pytest.raises(PeerError, match="has no attribute 'nothing'"):
        Side("opentslm:nothing", {})


def test_ratios_are_paired(tmp_path: Path) -> None:
    """Twice as slow in every repetition is twice as slow, however much the machine's speed changes."""
    ours = [{"cpu": x, "wall": x, "peak": 1.0} for x in (1.0, 5.0, 2.0, 9.0)]
    peer = [{name: 2 * value for name, value in sample.items()} for sample in ours]
    measured = Measured("work", samples={"ours": ours, "peer": peer})
    assert measured.ratio("peer") == (2.0, 2.0, 2.0)
    assert measured.median("ours", "cpu") == 3.5
    middle, low, high = measure.interval([1.0, 2.0, 3.0])
    assert (low, middle, high) == (1.0, 2.0, 3.0)
    assert growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_plots_come_from_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    sample = [{"cpu": 1.0, "wall": 1.0, "peak": 1.0}]
    grown = {"what": "batch", "sizes": [1, 2], "seconds": [1, 2], "memory": [1, 1], "exponents": {"end": 1.0}}
    results = [Measured("work", samples={"ours": sample, "peer": sample}).asdict()]
    results.append(Listing("growth", [], grown).asdict())
    (tmp_path / "table.json").write_text(bench.json.dumps({"header": [], "results": results}))
    assert bench.main(["--plot"]) == 0
    assert {file.name for file in draw(tmp_path)} == {"ratios.png", "growth.png"}


def test_the_header_of_results_names_no_place_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = [str(evidence.ROOT / "tools/bench.py"), "lora", "--models", str(tmp_path / "models"), "--data", "../data"]
    monkeypatch.setattr(sys, "argv", words)
    assert "# command: python tools/bench.py lora --models .../models --data ../data\n" in evidence.header()
