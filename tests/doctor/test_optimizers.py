"""The doctor knows every optimiser: no false alarm, and known mistakes by their names."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_training.backend import Arrays, Optim
from mlx_training.diagnostics.exam import Exam
from mlx_training.diagnostics.learning_checks import one_batch, resume
from mlx_training.diagnostics.optimizers import EpsInside, updated
from mlx_training.diagnostics.report import Finding
from mlx_training.diagnostics.subject import Subject
from mlx_training.diagnostics.update_checks import accumulation, decay, rates, step_rule
from mlx_training.optim import SETTINGS
from mlx_training.spec import DecoderSpec, Param
from tests.doctor.faults.steps_numpy import NumpyStep
from tests.doctor.test_families import subject_of
from tests.parity.cases import VOCAB

SPEC = DecoderSpec(VOCAB, 16, 24, 1, 2, 1, 8, activation="gelu", positions="learned", mlp_bias=True, init_std=0.1)
HEALTHY: dict[str, Optim] = {
    name: Optim(**{"name": name, "grad_clip_norm": 1.0} | settings | {"weight_decay": 0.1})
    for name, settings in SETTINGS.items()
}
HEALTHY |= {
    "sgd-nesterov": replace(HEALTHY["sgd"], momentum=0.9, nesterov=True),
    "rmsprop-momentum": replace(HEALTHY["rmsprop"], momentum=0.9),
    "muon-fast": replace(HEALTHY["muon"], muon_lr_factor=10.0, grad_clip_norm=None),
    "adam-without-decay": replace(HEALTHY["adam"], weight_decay=0.0),
}


def found_by(subject: Subject) -> list[Finding]:
    exam = Exam(subject)
    findings: list[Finding] = [rates(exam), *step_rule(exam)]
    return [*findings, decay(exam), accumulation(exam), *one_batch(exam), resume(exam)]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy(name: str, backend_name: str) -> None:
    subject = subject_of(SPEC, backend_name)
    subject.optim = HEALTHY[name]
    findings = found_by(subject)
    assert {finding.status for finding in findings} <= {"pass", "skip"}, "\n".join(map(str, findings))
    assert "pass" in {finding.status for finding in findings if finding.check == "step"}


class RuleStep(NumpyStep):
    """Any optimiser. As it stands it is right; a fault changes what goes into a parameter's rule or comes out."""

    def __init__(self, subject: Subject, fault: Callable[..., Any] | None = None) -> None:
        super().__init__(subject)
        self.fault = fault or (lambda **given: given)
        self.state: Arrays = {n: np.zeros(shape) for n, shape in self.optim.state_shapes(subject.spec).items()}

    def updated(self, name: str, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
        keys = [key for key in self.state if key.rpartition(".")[0] == name]
        state = {key.rpartition(".")[2]: self.state[key] for key in keys}
        given = {"o": self.optim, "param": self.table[name], "p": value, "g": gradient}
        given |= {"state": state, "t": self.taken, "rate": rate}
        given = self.fault(**given)
        frozen = given.pop("frozen", False)
        for key, shape in given["o"].state(given["param"]).items():
            given["state"].setdefault(key, np.zeros(shape))
        after, state = updated(**given)
        if not frozen:
            self.state |= {f"{name}.{key}": array for key, array in state.items()}
        return after

    def export(self) -> Arrays:
        return {n: a.astype(np.float32) for n, a in self.state.items()} | {"step": np.asarray(self.taken, np.float32)}

    def load(self, arrays: Arrays) -> None:
        self.taken = int(arrays["step"])
        self.state = {n: a.astype(np.float64) for n, a in arrays.items() if n != "step"}


def everywhere(param: Param, **given: Any) -> Mapping[str, Any]:
    return given | {"param": param._replace(hidden=len(param.shape) > 1)}


FAULTS: list[tuple[str, str, Callable[..., Mapping[str, Any]]]] = [
    ("adam", "no_bias_correction", lambda t, **given: given | {"t": 10**9}),
    ("adam", "eps_misplaced", lambda o, **given: given | {"o": EpsInside(**vars(o))}),
    ("rmsprop", "eps_misplaced", lambda o, **given: given | {"o": EpsInside(**vars(o))}),
    ("adam", "decay_decoupled", lambda o, **given: given | {"o": replace(o, name="adamw")}),
    ("sgd", "decay_ignored", lambda o, **given: given | {"o": replace(o, weight_decay=0.0)}),
    ("adafactor", "decay_everywhere", lambda param, **given: given | {"param": param._replace(decay=True)}),
    ("muon", "muon_misplaced", everywhere),
    ("muon", "muon_misplaced", lambda o, **given: given | {"o": replace(o, name="adamw")}),
    ("muon", "update_wrong", lambda o, **given: given | {"o": replace(o, nesterov=False)}),
    ("muon-fast", "learning_rate_wrong", lambda o, **given: given | {"o": replace(o, muon_lr_factor=1.0)}),
    ("sgd-nesterov", "momentum_stale", lambda t, **given: given | {"t": t, "frozen": t > 1}),
    ("muon", "momentum_stale", lambda t, **given: given | {"t": t, "frozen": t > 1}),
    ("sgd-nesterov", "state_lost", lambda state, **given: given | {"state": {}}),
    ("sgd", "ascent", lambda g, **given: given | {"g": -g}),
    ("adagrad", "learning_rate_wrong", lambda rate, **given: given | {"rate": 3 * rate}),
    ("lion", "update_wrong", lambda o, **given: given | {"o": replace(o, betas=o.betas[::-1])}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "cause", "fault"), FAULTS, ids=[f"{name}-{cause}" for name, cause, _ in FAULTS])
def test_known_mistakes(name: str, cause: str, fault: Callable[..., Any]) -> None:
    subject = faulty(name, fault)
    (finding,) = step_rule(Exam(subject))
    assert (finding.status, finding.cause) == ("fail", cause), str(finding)


@pytest.mark.parametrize("name", ["lion", "adafactor", "muon", "muon-fast"])
def test_decay_that_is_forgotten(name: str) -> None:
    subject = faulty(name, lambda o, **given: given | {"o": replace(o, weight_decay=0.0)})
    assert decay(Exam(subject)).cause == "decay_ignored"


def faulty(name: str, fault: Callable[..., Any]) -> Subject:
    pytest.importorskip("torch")
    subject = subject_of(SPEC, "torch")
    subject.optim = HEALTHY[name]
    subject.make_step = lambda s: RuleStep(s, lambda **given: {**given, **fault(**given)})  # type: ignore[assignment,return-value]
    return subject


def test_the_step_they_are_planted_in_is_right() -> None:
    for name in ("adam", "muon", "adafactor", "rmsprop-momentum"):
        assert [finding.status for finding in step_rule(Exam(faulty(name, lambda **given: given)))] == ["pass"], name


def test_a_dropped_micro_batch_is_seen() -> None:
    subject = faulty("muon", lambda **given: given)

    class Step(RuleStep):
        def gradients(self, batches: Any, weights: Any) -> Arrays:
            return super().gradients(batches[-1:], weights[-1:])

    subject.make_step = Step  # type: ignore[assignment]
    assert accumulation(Exam(subject)).cause == "micro_batches_dropped"
