"""What a step need not compute is not missed: with every lever the same losses and parameters, on every LM."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training import backend as backends
from mlx_training.backend import Arrays, Optim, Runtime
from mlx_training.data.batch import Batch
from mlx_training.data.collate import collate
from mlx_training.init import initialise
from mlx_training.objectives.lm import lm
from mlx_training.spec import FrozenLM, ProjectorSpec, TimeSeriesSpec
from tests.parity import cases
from tests.parity.tiny_checkpoints import FAMILIES, save_tiny

pytestmark = pytest.mark.usefixtures("both_backends")

OFF = {"frozen_prefix": "off", "trim_last_layer": False}
LEVERS: dict[str, dict[str, Any]] = {
    "prefix without gradients": OFF | {"frozen_prefix": "compute"},
    "prefix kept": OFF | {"frozen_prefix": "reuse"},
    "last layer at labels": OFF | {"trim_last_layer": True},
    "all": {},
}
INSTRUCTION = np.random.default_rng(3).integers(3, cases.VOCAB, 21).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TimeSeriesSpec:
    directory = save_tiny(request.param, tmp_path_factory.mktemp("lm") / "lm")
    return TimeSeriesSpec(FrozenLM(directory, 64, cases.VOCAB), cases.ENCODER, ProjectorSpec(norm_output=True))


def rows(constant: bool, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    words = [INSTRUCTION if constant else rng.integers(3, cases.VOCAB, 13 + i).tolist() for i in range(3)]
    return collate([cases.encoded_row(rng, 1 + i % 2, lead) for i, lead in enumerate(words)], range(3))


def train(backend_name: str, spec: TimeSeriesSpec, batches: list[Batch], levers: dict[str, Any]) -> tuple[Any, Arrays]:
    """Losses of SGD, one of them over two micro-batches, and where the parameters end."""
    backend = backends.get(backend_name, Runtime(device="cpu", **levers))
    model = backend.build(spec)
    backend.load(model, backend.export(model) | initialise(spec, 0))
    step = backend.make_step(model, lm, Optim("sgd"), seed=0)
    rates = dict.fromkeys(spec.groups, 0.05)
    losses = [float(step(part, step=i, lr=rates)["loss"]) for i, part in enumerate([batches[:1], batches[1:]], start=1)]
    return [*losses, backend.score(model, lm, batches[0])["loss"]], backend.export(model)


@pytest.mark.parametrize("constant", [False, True], ids=["questions", "instruction"])
def test_results_do_not_change(constant: bool, backend_name: str, spec: TimeSeriesSpec, uncompiled: None) -> None:
    batches = [rows(constant, seed) for seed in range(3)]
    assert all(batch.prefix >= 8 for batch in batches)
    start = initialise(spec, 0)
    plain, ends = train(backend_name, spec, batches, OFF)
    for lever, settings in LEVERS.items():
        losses, found = train(backend_name, spec, batches, settings)
        assert losses == pytest.approx(plain, rel=3e-6), lever
        for name, array in ends.items():
            moved = np.abs(array - start.get(name, 0)).max()
            assert np.abs(found[name] - array).max() <= 1e-6 + 1e-5 * moved, (lever, name)


def test_a_constant_instruction_is_read_once(
    backend_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 22 constant tokens 16 are kept; rows that go on alike by chance are read once for all of them."""
    spec = TimeSeriesSpec(FrozenLM(save_tiny("llama", tmp_path / "lm"), 64, cases.VOCAB), cases.ENCODER)
    alike = collate([cases.encoded_row(np.random.default_rng(0), 1, INSTRUCTION)] * 2, range(2))
    assert (alike.prefix, [rows(True, seed).prefix for seed in range(2)]) == (24, [16, 24])
    for setting, reads in {
        "reuse": [(1, 24), (1, 16), (3, 8)],
        "compute": [(2, 24), (3, 16), (3, 24)],
        "off": [],
    }.items():
        backend = backends.get(backend_name, Runtime(device="cpu", frozen_prefix=setting))  # type: ignore[arg-type]
        model, seen = backend.build(spec), list[tuple[int, ...]]()
        monkeypatch.setattr(model.lm, "embed", recording(model.lm.embed, seen))
        pasts = [model.past(batch) for batch in (alike, rows(True, 0), rows(True, 1))]
        assert seen == reads, setting
        assert [past is not None and past.shape[-2] for past in pasts] == ([24, 16, 24] if reads else [False] * 3)


def recording(embed: Any, seen: list[tuple[int, ...]]) -> Any:
    def record(tokens: Any) -> Any:
        seen.append(tuple(tokens.shape))
        return embed(tokens)

    return record


def test_many_series_are_encoded_in_chunks(
    backend_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncompiled: None
) -> None:
    """Eight series of 12 patches (padding included), 40 at once: three, three and two; same losses and parameters."""
    encoder = replace(cases.ENCODER, numeric_scale=True, max_series=3)
    spec = TimeSeriesSpec(FrozenLM(save_tiny("llama", tmp_path / "lm"), 64, cases.VOCAB), encoder)
    rng = np.random.default_rng(0)
    batches = [collate([cases.encoded_row(rng, n) for n in (3, 2)], range(2)) for _ in range(3)]
    assert {batch.series.shape for batch in batches} == {(8, 12 * encoder.patch_size)}
    monkeypatch.setattr(backends, "MAX_PATCHES", {"cpu": 40})
    losses, ends = train(backend_name, spec, batches, {"chunked_encoder": False})
    sizes = list[int]()
    kind = type(backends.get(backend_name, Runtime(device="cpu")).build(spec).encoder)
    record_calls(monkeypatch, kind, sizes)
    chunked_losses, chunked_ends = train(backend_name, spec, batches, {})
    assert sizes == [3, 3, 2] * 4  # three micro-batches of training, one scored
    assert chunked_losses == pytest.approx(losses, rel=1e-6)
    for name, array in ends.items():
        np.testing.assert_allclose(chunked_ends[name], array, atol=1e-6, err_msg=name)


def record_calls(monkeypatch: pytest.MonkeyPatch, kind: Any, sizes: list[int]) -> None:
    """How many series an encoder of this class is given, call by call."""
    name = "forward" if hasattr(kind, "forward") else "__call__"
    call = getattr(kind, name)

    def record(self: Any, series: Any, *rest: Any) -> Any:
        sizes.append(series.shape[0])
        return call(self, series, *rest)

    monkeypatch.setattr(kind, name, record)


def test_what_stands_before_the_series(backend_name: str) -> None:
    """Never past the first series or the first label of any row, and nothing where there is no series."""
    rng = np.random.default_rng(0)
    long, short = cases.encoded_row(rng, 1, INSTRUCTION), cases.encoded_row(rng, 1, INSTRUCTION[:9])
    assert collate([long], [0]).prefix == int(np.argmax(long.patch_place > 0)) // 8 * 8
    assert collate([long, short], [0, 1]).prefix == int(np.argmax(short.patch_place > 0)) // 8 * 8
    assert collate([long, cases.encoded_row(rng, 1)], [0, 1]).prefix == 0
