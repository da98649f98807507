"""The library call: somebody's own model, objective, batches and step, on either framework."""

from typing import Any

import numpy as np
import pytest

from mlx_training import backend as backends
from mlx_training.backend import Optim, Runtime
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.doctor import diagnose
from mlx_training.errors import UserError
from tests.doctor.faults.base import framework, freeze, hide, set_parameter, stop

VOCABULARY, SIZE = 11, 8


def own_batches(count: int = 4) -> list[Batch]:
    """Counting modulo the vocabulary: the next token is this one plus one."""
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        tokens = ((rng.integers(0, VOCABULARY, (3, 1)) + np.arange(7)) % VOCABULARY).astype(np.int32)
        made.append(Batch(tokens[:, :-1], tokens[:, 1:], np.ones((3, 6), np.float32), np.full(3, 6, np.int32)))
    return made


def own_model(name: str, *, detached: bool = False) -> Any:
    """An embedding and a linear layer that know nothing of this package."""
    if name == "torch":
        import torch

        class Torch(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.embedding, self.out = torch.nn.Embedding(VOCABULARY, SIZE), torch.nn.Linear(SIZE, VOCABULARY)

            def forward(self, tokens: Any) -> Any:
                x = self.embedding(tokens)
                return self.out(stop(x) if detached else x)

        return Torch()
    import mlx.core as mx
    from mlx import nn

    class Mlx(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mx.random.seed(0)
            self.embedding, self.out = nn.Embedding(VOCABULARY, SIZE), nn.Linear(SIZE, VOCABULARY)

        def __call__(self, tokens: mx.array) -> mx.array:
            x = self.embedding(tokens)
            return self.out(stop(x) if detached else x)

    return Mlx()


def own_objective(model: Any, batch: Batch) -> dict[str, Any]:
    """Cross-entropy, spelled with what both frameworks have."""
    logits = model(batch.tokens)
    f = framework(logits)
    is_label = batch.targets[..., None] == f.arange(VOCABULARY)
    losses = f.logsumexp(logits, -1) - (logits * is_label).sum(-1)
    return {"loss": (losses * batch.mask).sum(), "weight": batch.mask.sum()}


def test_a_healthy_model_of_ones_own(backend_name: str) -> None:
    backend = backends.get(backend_name, Runtime(device="cpu"))
    report = diagnose(own_model(backend_name), own_objective, own_batches(), backend=backend, learning_rate=1e-2)
    assert not report.failed, str(report)
    assert report.counts["pass"] >= 12


def test_what_is_detached_is_named(backend_name: str) -> None:
    backend = backends.get(backend_name, Runtime(device="cpu"))
    report = diagnose(own_model(backend_name, detached=True), own_objective, own_batches(), backend=backend)
    assert report.cause == "disconnected", str(report)
    assert report.failed[0].where == ("embedding.weight",)


def test_a_module_in_a_tuple_is_missed_by_the_framework_only(backend_name: str) -> None:
    model = own_model(backend_name)
    out = model.out
    del model.out
    model.heads = (out,)
    backend = backends.get(backend_name, Runtime(device="cpu"))
    report = diagnose(model, own_objective, own_batches(), backend=backend)
    assert report.cause == "unregistered_parameters", str(report)
    assert report.failed[0].where == ("heads.0",)


def test_a_step_of_ones_own(backend_name: str) -> None:
    backend = backends.get(backend_name, Runtime(device="cpu"))

    def make_step(subject: Any) -> Any:
        step = subject.default_step()

        class Step:
            num_compilations = 0

            def __call__(self, batches: Any, **options: Any) -> dict[str, Any]:
                return {**step(batches, **options), "grad_norm": 0.0}

            def export(self) -> dict[str, np.ndarray]:
                return step.export()

            def load(self, arrays: dict[str, np.ndarray]) -> None:
                step.load(arrays)

        return Step()

    report = diagnose(own_model(backend_name), own_objective, own_batches(), backend=backend, make_step=make_step)
    assert report.cause == "norm_misreported", str(report)


def test_no_batches(backend_name: str) -> None:
    with pytest.raises(UserError, match="no batches given; give at least one"):
        diagnose(own_model(backend_name), own_objective, [], backend=backends.get(backend_name))


def test_the_model_is_as_it_was(backend_name: str) -> None:
    model = own_model(backend_name)
    model.dropout = dropout_of(backend_name)
    model.train()
    backend = backends.get(backend_name, Runtime(device="cpu"))
    diagnose(model, own_objective, own_batches(), backend=backend, full=True)
    assert model.training and model.dropout.training
    assert not hasattr(model, "spec")
    assert backend_name == "mlx" or all(parameter.grad is None for parameter in model.parameters())


def dropout_of(name: str) -> Any:
    if name == "torch":
        import torch

        return torch.nn.Dropout(0.5)
    from mlx import nn

    return nn.Dropout(0.5)


def test_nothing_trains(backend_name: str) -> None:
    model = own_model(backend_name)
    freeze(model)
    report = diagnose(model, own_objective, own_batches(), backend=backends.get(backend_name, Runtime(device="cpu")))
    assert report.cause == "frozen_parameters", str(report)


@pytest.mark.parametrize("wrong", ["mean", "no weight"])
def test_an_objective_that_returns_something_else(wrong: str, backend_name: str) -> None:
    def objective(model: Any, batch: Batch) -> Any:
        sums = own_objective(model, batch)
        return sums["loss"] / sums["weight"] if wrong == "mean" else {"loss": sums["loss"]}

    backend = backends.get(backend_name, Runtime(device="cpu"))
    report = diagnose(own_model(backend_name), objective, own_batches(), backend=backend)
    assert report.cause == "weight_not_count", str(report)
    assert "expected {'loss': sum, 'weight': count}" in report.failed[0].figure


def test_a_zero_last_layer_and_a_frozen_teacher_in_a_list_are_no_faults(backend_name: str) -> None:
    model, teacher = own_model(backend_name), own_model(backend_name)
    freeze(teacher)
    model.__dict__["teacher"] = [teacher]
    backend = backends.get(backend_name, Runtime(device="cpu"))
    arrays = backend.parameters(model)
    set_parameter(model, "out.weight", np.zeros(arrays["out.weight"].shape, np.float32))
    set_parameter(model, "out.bias", np.zeros(arrays["out.bias"].shape, np.float32))
    report = diagnose(model, own_objective, own_batches(), backend=backend)
    assert not report.failed, str(report)


@pytest.mark.parametrize("options", [{"weight_decay": 1.0}, {"eps": 1.0}, {"grad_clip_norm": 1e-9}], ids=str)
def test_unusual_settings_are_no_faults(options: dict[str, float], backend_name: str) -> None:
    backend = backends.get(backend_name, Runtime(device="cpu"))
    report = diagnose(own_model(backend_name), own_objective, own_batches(), backend=backend, optim=Optim(**options))
    assert report.cause in (None, "cannot_overfit"), str(report)


def test_a_rate_far_too_large(backend_name: str) -> None:
    backend = backends.get(backend_name, Runtime(device="cpu"))
    report = diagnose(own_model(backend_name), own_objective, own_batches(), backend=backend, learning_rate=1e5)
    assert any(finding.cause == "learning_rate_too_large" for finding in report.findings), str(report)
    assert report.cause in (None, "learning_rate_too_large"), str(report)


def test_a_module_under_a_private_name_in_mlx(both_backends: list[str]) -> None:
    model = own_model("mlx")
    hide(model, "out")
    report = diagnose(model, own_objective, own_batches(), backend=backends.get("mlx", Runtime(device="cpu")))
    assert report.cause == "unregistered_parameters", str(report)
    assert "_out" in report.failed[0].where
