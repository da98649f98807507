"""The two realisations are one model: names, shapes, losses, gradients, trajectories, and changing backends midway."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_training.data.collate import collate
from mlx_training.objectives.lm import lm
from mlx_training.spec import TimeSeriesSpec
from tests.parity.cases import (
    CASES,
    OPTIM,
    batches,
    encoded_row,
    rates,
    realise,
    relative,
    specs,
    without_zero_gradients,
)

pytestmark = pytest.mark.usefixtures("both_backends")
TIMESERIES = [case for case in CASES if case.startswith("timeseries")]


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_equal_the_table(case: str, directory: Path) -> None:
    spec = specs(directory)[case]
    table = {name: p.shape for name, p in spec.params().items()}
    for name in ("mlx", "torch"):
        backend, model = realise(name, spec)
        assert {n: a.shape for n, a in backend.export(model).items()} == table
        assert trainable_names(name, model) == set(table)


def trainable_names(backend: str, model) -> set[str]:
    """What the framework itself would train, which must be the table and nothing else."""
    if backend == "torch":
        return {n for n, p in model.named_parameters() if p.requires_grad}
    from mlx.utils import tree_flatten

    return {n for n, _ in tree_flatten(model.trainable_parameters())}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str, directory: Path) -> None:
    spec = specs(directory)[case]
    (batch,) = batches(spec, 1)
    results = {}
    for name in ("mlx", "torch"):
        backend, model = realise(name, spec)
        gradients = without_zero_gradients(spec, backend.gradients(model, lm, batch))
        results[name] = backend.score(model, lm, batch), gradients
    (mlx_sums, mlx_gradients), (torch_sums, torch_gradients) = results["mlx"], results["torch"]
    assert mlx_sums["weight"] == torch_sums["weight"] == batch.num_supervised
    assert mlx_sums["loss"] == pytest.approx(torch_sums["loss"], rel=1e-6)
    worst = {name: relative(mlx_gradients[name], torch_gradients[name]) for name in torch_gradients}
    assert max(worst.values()) <= 1e-5, worst
    without = {name for name, g in torch_gradients.items() if not np.linalg.norm(g)}
    assert without == {name for name, part in spec.zero_gradients().items() if part == slice(None)}


@pytest.mark.parametrize("num_steps", [100, pytest.param(300, marks=pytest.mark.proof)])
@pytest.mark.parametrize("case", CASES)
def test_trajectory(case: str, num_steps: int, directory: Path, record_property) -> None:
    """Steps of AdamW with clipping, warm-up and accumulation: |difference| <= 1e-5 * max(1, loss)."""
    spec = specs(directory)[case]
    data = batches(spec, 64)
    losses, ends = {}, {}
    for name in ("mlx", "torch"):
        backend, model = realise(name, spec)
        frozen = backend.frozen_hash(model)
        start = backend.export(model)
        step = backend.make_step(model, lm, OPTIM, seed=0)
        losses[name] = [
            float(
                step(
                    [data[2 * i % 64], data[(2 * i + 1) % 64]],
                    step=i + 1,
                    lr=rates(spec, i + 1, num_steps, 0.3 / num_steps),
                )["loss"]
            )
            for i in range(num_steps)
        ]
        ends[name] = backend.export(model)
        assert backend.frozen_hash(model) == frozen, "frozen weights changed"
        still = [n for n, a in ends[name].items() if np.abs(a - start[n]).max() < 1e-6]
        assert not still, f"parameters that did not move: {still}"
    mlx, torch = np.array(losses["mlx"]), np.array(losses["torch"])
    difference = np.abs(mlx - torch) / np.maximum(1, torch)
    record_property("max_loss_difference", float(difference.max()))
    assert torch[-20:].mean() < 0.95 * torch[:20].mean(), "nothing was learnt, so equality says little"
    assert difference.max() <= 1e-5, f"{difference.max():.2e} at step {difference.argmax() + 1}"


@pytest.mark.parametrize(
    "case",
    [
        "timeseries-ours",
        "pretrained-dora",
        "pretrained-lora-gpt",
        "pretrained-dora-sparse",
        "decoder-gqa-rope-scaling",
        "recurrent-lstm",
        "recurrent-gru",
        "kgram-onehot",
        "kgram-embedding",
        "kgram-convolution",
        "ssm-mamba",
        "ssm-mamba2",
        "ssm-s4d",
        "ssm-stu-local",
    ],
)
def test_changing_backends_midway(case: str, directory: Path) -> None:
    """20 steps on one backend, then 20 on the other, with the optimiser's state: within 1e-4 of 40 on either."""
    spec = specs(directory)[case]
    data = batches(spec, 40)

    def run(names: tuple[str, str]) -> tuple[dict[str, np.ndarray], list[float]]:
        parameters = state = None
        losses = []
        for half, name in enumerate(names):
            backend, model = realise(name, spec)
            step = backend.make_step(model, lm, OPTIM, seed=0)
            if parameters is not None:
                backend.load(model, parameters)
                step.load(state)
                assert backend.export(model).keys() == parameters.keys()
            for i in range(20 * half + 1, 20 * half + 21):
                losses.append(float(step([data[i - 1]], step=i, lr=rates(spec, i, 40))["loss"]))
            parameters, state = backend.export(model), step.export()
        return without_zero_gradients(spec, parameters), losses

    alone = [run((name, name)) for name in ("mlx", "torch")]
    for mixed, mixed_losses in (run(("mlx", "torch")), run(("torch", "mlx"))):
        for parameters, losses in alone:
            assert max(np.abs(mixed[n] - parameters[n]).max() for n in parameters) <= 1e-4
            assert np.abs(np.subtract(mixed_losses, losses)).max() <= 1e-4


def test_two_micro_batches_equal_one_batch(backend_name: str, directory: Path) -> None:
    """Accumulation weighs tokens, not micro-batches, also when one holds fewer."""
    spec = specs(directory)["timeseries-published"]
    rng = np.random.default_rng(5)
    rows = [encoded_row(rng, 1) for _ in range(5)]
    ends = []
    for split in ([rows], [rows[:4], rows[4:]]):
        backend, model = realise(backend_name, spec)
        step = backend.make_step(model, lm, OPTIM, seed=0)
        metrics = step([collate(part) for part in split], step=1, lr=dict.fromkeys(spec.groups, 1e-3))
        ends.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


@pytest.mark.parametrize("case", TIMESERIES)
def test_a_row_does_not_depend_on_its_neighbours(case: str, backend_name: str, directory: Path) -> None:
    spec = specs(directory)[case]
    rng = np.random.default_rng(3)
    rows = [encoded_row(rng, n) for n in (1, 2, 1, 2)]
    backend, model = realise(backend_name, spec)
    together = backend.score(model, lm, collate(rows))["loss"]
    alone = [backend.score(model, lm, collate([row]))["loss"] for row in rows]
    assert together == pytest.approx(sum(alone), rel=1e-5)
    assert len({round(value, 3) for value in alone}) > 1


def test_no_future_leak_and_series_are_read(backend_name: str, directory: Path) -> None:
    """Changing the answer's last token changes no earlier loss; changing the series changes it."""
    spec = specs(directory)["timeseries-ours"]
    assert isinstance(spec, TimeSeriesSpec)
    (batch,) = batches(spec, 1, batch_size=2)
    backend, model = realise(backend_name, spec)
    first = batch.mask * (np.arange(batch.mask.shape[1]) == 0)

    def loss_of_first_answer_token(**changes) -> float:
        return backend.score(model, lm, replace(batch, mask=first.astype(np.float32), **changes))["loss"]

    before = loss_of_first_answer_token()
    tokens = batch.tokens.copy()
    tokens[np.arange(2), batch.lengths - 1] = 50
    assert loss_of_first_answer_token(tokens=tokens) == before
    assert abs(loss_of_first_answer_token(series=-batch.series) - before) > 1e-4


def test_padding_patches_do_nothing(backend_name: str, directory: Path) -> None:
    spec = specs(directory)["timeseries-ours"]
    (batch,) = batches(spec, 1)
    backend, model = realise(backend_name, spec)
    series = batch.series.copy()
    for values, patches in zip(series, batch.num_patches, strict=True):
        values[4 * patches :] = 100.0
    changed = backend.score(model, lm, replace(batch, series=series))["loss"]
    assert changed == pytest.approx(backend.score(model, lm, batch)["loss"], rel=1e-6)
