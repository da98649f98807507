"""What diagnosis asks of a backend: everything registered, gradients of inputs, activations, probes and the guard."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.backend import PROBE, Arrays, Backend
from mlx_training.data.batch import Batch
from mlx_training.objectives.lm import lm
from mlx_training.spec import DecoderSpec, PretrainedSpec, Spec
from tests.parity.cases import CASES, OPTIM, batches, rates, realise, relative, specs

pytestmark = pytest.mark.usefixtures("both_backends")


def both(spec: Spec) -> list[tuple[Backend, Any]]:
    return [realise(name, spec) for name in ("mlx", "torch")]


@pytest.mark.parametrize("case", CASES)
def test_everything_registered(case: str, directory: Path) -> None:
    """The table trains, all else is frozen, and both backends know the same; packed weights are laid out alike."""
    spec = specs(directory)[case]
    (a, b) = (backend.parameters(model) for backend, model in both(spec))
    assert a == b
    assert {name: p.shape for name, p in a.items() if p.trainable} == {n: p.shape for n, p in spec.params().items()}
    assert any(name.startswith("lm.model.") for name in a) == isinstance(spec, PretrainedSpec)


def test_parameters_are_listed_also_when_the_table_knows_others(backend_name: str, directory: Path) -> None:
    backend, model = realise(backend_name, specs(directory)["timeseries-published"])
    del model.projector.norm
    assert "projector.norm.weight" not in backend.parameters(model)
    assert backend.parameters(model)["projector.linear.bias"] == ((64,), True, True)


def test_values_that_are_not_finite_are_listed(backend_name: str, directory: Path) -> None:
    backend, model = realise(backend_name, specs(directory)["timeseries-published"])
    arrays = backend.export(model)
    arrays["projector.linear.bias"][3] = np.inf
    backend.load(model, arrays)
    assert [name for name, known in backend.parameters(model).items() if not known.finite] == ["projector.linear.bias"]


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_inputs(case: str, directory: Path) -> None:
    spec = specs(directory)[case]
    (batch,) = batches(spec, 1)
    found = []
    for backend, model in both(spec):
        before = backend.gradients(model, lm, batch)
        (gradient,) = backend.gradients(model, lm, batch, wrt="inputs").values()
        assert "inputs" not in vars(model), "the model is as it was"
        assert set(before) == set(spec.params())
        found.append(gradient)
    assert relative(*found) <= 1e-5
    assert found[0].shape[:2] == batch.tokens.shape
    last_label = (np.arange(batch.tokens.shape[1]) if batch.positions is None else batch.positions.max(1)).max()
    assert np.abs(found[0]).max() > 1e-6 and not np.abs(found[0][:, last_label + 1 :]).any()


def test_gradients_that_do_not_exist_are_zero(backend_name: str, directory: Path) -> None:
    """Rows without series in front of a frozen LM: nothing that trains has a part in the loss."""
    spec = specs(directory)["timeseries-published"]
    absent = dict.fromkeys(("series", "scale", "num_patches", "series_place", "patch_index"))
    backend, model = realise(backend_name, spec)
    gradients = backend.gradients(model, lm, replace(batches(spec, 1)[0], **absent))
    assert {n: g.shape for n, g in gradients.items()} == {n: p.shape for n, p in spec.params().items()}
    assert not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("case", CASES)
def test_activations(case: str, directory: Path) -> None:
    spec = specs(directory)[case]
    (batch,) = batches(spec, 1)
    (mlx, torch) = (backend.activations(model, lm, batch) for backend, model in both(spec))
    common = [path for path in torch if path in mlx]
    assert common == [path for path in mlx if path in torch], "another order"
    expected = {"inputs", "logprobs"}
    if case.startswith("timeseries"):
        expected |= {"encoder.patch_embed", "encoder.layers.1.linear2", "encoder", "projector.norm", "projector"}
        expected |= {"lm.model.layers.0.self_attn.q_proj", "lm.model.layers.0.mlp", "lm.model.norm"}
    elif isinstance(spec, PretrainedSpec):
        assert spec.adapter is not None
        for path, *_ in spec.adapter.linears:
            expected |= {f"lm.{path}", f"lm.{path}.lora_A", f"lm.{path}.base_layer"}
        expected |= {"lm.model.norm"}
    elif isinstance(spec, DecoderSpec):
        last = f"model.layers.{spec.num_layers - 1}"
        expected |= {"model.embed_tokens", f"{last}.self_attn", last, "model.norm"}
    assert expected <= set(common) and list(mlx)[-2:] == list(torch)[-2:] == ["inputs", "logprobs"]
    worst = {path: relative(mlx[path], torch[path]) for path in common}
    assert max(worst.values()) <= 1e-4, worst
    assert mlx["logprobs"].shape == batch.targets.shape


def test_looking_at_activations_changes_nothing(backend_name: str, directory: Path) -> None:
    """The first of several outputs is kept, and nothing is left behind, also when the model raises."""
    spec = specs(directory)["timeseries-ours"]
    (batch,) = batches(spec, 1)
    backend, model = realise(backend_name, spec)
    loss, call = backend.score(model, lm, batch), type(model.encoder).__call__
    logprobs = type(model).logprobs
    model.logprobs = lambda batch: (logprobs(model, replace(batch, series=batch.series * 2)), logprobs(model, batch))[1]
    twice = backend.activations(model, lm, batch)
    del model.logprobs
    once = backend.activations(model, lm, replace(batch, series=batch.series * 2))
    np.testing.assert_array_equal(twice["encoder"], once["encoder"])
    assert relative(twice["logprobs"], once["logprobs"]) > 1e-3
    with pytest.raises(Exception, match="."):
        backend.activations(model, lm, replace(batch, tokens=batch.tokens[:, :3]))
    assert "inputs" not in vars(model) and type(model.encoder).__call__ is call
    assert backend.score(model, lm, batch) == loss


@pytest.mark.parametrize("case", ["timeseries-ours", "decoder-untied"])
def test_probe(case: str, directory: Path, uncompiled: None) -> None:
    """Against the arrays themselves, on both backends; the trajectory is the one without a probe."""
    spec = specs(directory)[case]
    data, lr = batches(spec, 6), rates(spec, 5, 40, peak=1e-2)
    found = {}
    for backend, model in both(spec):
        step = backend.make_step(model, lm, OPTIM, seed=0)
        step(data[:2], step=1, lr=lr)
        before = backend.export(model)
        weights = np.array([batch.num_supervised for batch in data[2:4]])
        parts = [backend.gradients(model, lm, batch) for batch in data[2:4]]
        gradients = {n: np.average([part[n] for part in parts], axis=0, weights=weights) for n in before}
        metrics = step(data[2:4], step=2, lr=lr, probe=True)
        after, state = backend.export(model), step.export()
        assert list(metrics["probe"]) == list(spec.params())
        for name, record in metrics["probe"].items():
            assert tuple(record) == PROBE and all(type(value) is float for value in record.values())
            expected = (before[name], after[name] - before[name], state[f"{name}.m"], state[f"{name}.v"])
            norms = [float(np.linalg.norm(x)) for x in (gradients[name], *expected)]
            assert [record[key] for key in PROBE[:5]] == pytest.approx(norms, rel=1e-3), name
            if name not in spec.zero_gradients():
                assert record["zeros"] == (gradients[name] == 0).mean(), name
            assert record["nonfinite"] == 0
        total = np.sqrt(sum(record["grad_norm"] ** 2 for record in metrics["probe"].values()))
        assert total == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
        found[backend.name] = metrics["probe"]
    for name in spec.params():
        a, b = ([probe[name][key] for key in PROBE] for probe in found.values())
        assert a == pytest.approx(b, rel=1e-3), name


def test_a_probe_does_not_change_the_course(backend_name: str, directory: Path) -> None:
    spec = specs(directory)["decoder-untied"]
    data, ends = batches(spec, 4), []
    for probed in ((), (1, 3)):
        backend, model = realise(backend_name, spec)
        step = backend.make_step(model, lm, OPTIM, seed=0)
        for i in range(4):
            step([data[i]], step=i + 1, lr=rates(spec, i + 1, 4), probe=i in probed)
        ends.append(backend.export(model) | step.export())
    for name, array in ends[0].items():
        np.testing.assert_allclose(ends[1][name], array, rtol=0, atol=0 if backend_name == "torch" else 1e-6)


def test_a_tiny_gradient_is_not_zero(backend_name: str, directory: Path) -> None:
    """Squares of 1e-30 underflow in float32."""
    spec = specs(directory)["decoder-untied"]
    backend, model = realise(backend_name, spec)

    def tiny(model: Any, batch: Batch) -> dict[str, Any]:
        sums = lm(model, batch)
        return sums | {"loss": sums["loss"] * 1e-30}

    step = backend.make_step(model, tiny, OPTIM, seed=0)
    probe = step(batches(spec, 1), step=1, lr=rates(spec, 1, 1), probe=True)["probe"]
    assert all(1e-34 < record["grad_norm"] < 1e-28 for record in probe.values())


def with_nan_series(batch: Batch) -> Batch:
    series = batch.series.copy()
    series[1, 2] = np.nan
    return replace(batch, series=series)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("at_first", [True, False])
def test_a_step_that_is_not_finite_is_skipped(
    accumulated: int, at_first: bool, backend_name: str, directory: Path
) -> None:
    """To the bit; the steps that follow are those of a run that never met the bad batch."""
    spec = specs(directory)["timeseries-ours"]
    good = batches(spec, 2 * accumulated + 1)
    bad = [*good[: accumulated - 1], with_nan_series(good[-1])]
    lr = rates(spec, 5, 40)
    ends = []
    for spoiled in (False, True):
        backend, model = realise(backend_name, spec)
        step = backend.make_step(model, lm, OPTIM, seed=0)
        if not at_first:
            assert float(step(good[:accumulated], step=1, lr=lr)["skipped"]) == 0
        if spoiled:
            before = everything(backend, model, step)
            metrics = step(bad, step=2, lr=lr, probe=True)
            assert float(metrics["skipped"]) == 1 and not np.isfinite(float(metrics["loss"]))
            assert metrics["probe"]["encoder.patch_embed.weight"]["nonfinite"] > 0
            assert all(record["update_norm"] == 0 for record in metrics["probe"].values())
            assert_same(before, everything(backend, model, step))
            metrics = step(bad, step=2, lr=lr)
            assert float(metrics["skipped"]) == 1
            assert_same(before, everything(backend, model, step))
        metrics = step(good[accumulated : 2 * accumulated], step=3, lr=lr)
        assert float(metrics["skipped"]) == 0 and np.isfinite(float(metrics["loss"]))
        ends.append(everything(backend, model, step))
    assert_same(*ends)
    assert ends[0]["step"] == 2 - at_first


def everything(backend: Backend, model: Any, step: Any) -> Arrays:
    return backend.export(model) | step.export()


def assert_same(a: Arrays, b: Arrays) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        np.testing.assert_array_equal(array, b[name], err_msg=name)


def test_skipping_where_the_kernel_does_not_know_how(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch on Metal: the same by selection, to rounding."""
    from torch_backend import step as torch_step

    spec = specs(directory)["timeseries-published"]
    good = batches(spec, 3)
    ends = []
    for devices in (torch_step.HONOURS_FOUND_INF, ()):
        monkeypatch.setattr(torch_step, "HONOURS_FOUND_INF", devices)
        backend, model = realise("torch", spec)
        step = backend.make_step(model, lm, OPTIM, seed=0)
        for i, batch in enumerate((with_nan_series(good[0]), good[1], with_nan_series(good[0]), good[2])):
            assert float(step([batch], step=i + 1, lr=rates(spec, 5, 40))["skipped"]) == 1 - i % 2
        ends.append(everything(backend, model, step))
    for name, array in ends[0].items():
        if not name.startswith(tuple(spec.zero_gradients())):  # Adam makes whole steps of their rounding noise
            np.testing.assert_allclose(array, ends[1][name], rtol=0, atol=1e-6, err_msg=name)
    assert ends[0]["step"] == 2


def test_number_of_compilations(backend_name: str, directory: Path) -> None:
    """One a shape, and none for a shape that was seen."""
    spec = specs(directory)["decoder-untied"]
    backend, model = realise(backend_name, spec)
    step = backend.make_step(model, lm, OPTIM, seed=0)
    counts = [step.num_compilations]
    for size in (2, 2, 3, 2):
        step(batches(spec, 1, batch_size=size), step=len(counts), lr=rates(spec, 1, 1))
        counts.append(step.num_compilations)
    assert counts == ([0, 1, 1, 2, 2] if backend_name == "mlx" else [0] * 5)


def test_a_model_of_somebody_else_needs_no_inputs(backend_name: str, directory: Path) -> None:
    spec = specs(directory)["decoder-untied"]
    (batch,) = batches(spec, 1)
    backend, model = realise(backend_name, spec)

    module = type(model).__mro__[2]  # the framework's own: Decoder, LanguageModel, Module

    class Wrapped(module):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def logprobs(self, batch: Batch) -> Any:
            return self.inner.logprobs(batch)

    found = backend.activations(Wrapped(), lm, batch)
    assert list(found)[-1] == "logprobs" and "inputs" not in found and "inner.model.layers.0.mlp" in found
