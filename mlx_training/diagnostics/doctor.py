"""The doctor: examines a configuration, a run, or somebody's own model, and names what is wrong."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_training.assemble import assemble, check_fits
from mlx_training.backend import Backend, Optim, Step
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import RunConfig, load_config
from mlx_training.data.batch import Batch
from mlx_training.diagnostics import (
    adapter_checks,
    data_checks,
    gradient_checks,
    label_checks,
    language_checks,
    learning_checks,
    model_checks,
    run_checks,
    speed_checks,
    structure_checks,
    update_checks,
)
from mlx_training.diagnostics.exam import Check, Exam, as_it_was
from mlx_training.diagnostics.report import Finding, Report, failed, passed, skipped
from mlx_training.diagnostics.subject import Subject, TableSpec, from_assembly, from_config
from mlx_training.errors import CheckpointError, UserError
from mlx_training.objectives import Objective

# From root to symptom: the first fail is the likeliest cause of those after it.
CHECKS = (
    *speed_checks.ENVIRONMENT,
    *data_checks.BATCHES,
    *label_checks.CHECKS,
    *data_checks.CONTENT,
    *structure_checks.CHECKS,
    *adapter_checks.CHECKS,
    *learning_checks.TRAINED,
    *model_checks.CHECKS,
    *gradient_checks.CHECKS,
    *update_checks.CHECKS,
    *learning_checks.CHECKS,
    *language_checks.CHECKS,
    *speed_checks.CHECKS,
)
Watcher = Callable[[Finding], None]


def examine_config(
    config: RunConfig, backend: str | None = None, *, full: bool = False, watch: Watcher | None = None
) -> Report:
    """Every check on the real model, data and objective of a configuration. Raises what assembling a run raises."""
    subject = from_config(config, backend)
    return examine(subject, full=full, name=config.experiment.name, watch=watch, as_configured=True)


def examine_run(run: Path, backend: str | None = None, *, full: bool = False, watch: Watcher | None = None) -> Report:
    """The same on a run directory, from its best checkpoint, and what its metrics tell."""
    started, report = time.monotonic(), Report(subject=str(run))
    for finding in run_checks.metrics(run):
        _add(report, finding, watch)
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: no config.yaml; expected a run directory, as `mlx-training train` makes it")
    config = load_config(run / "config.yaml")
    assembly = assemble(config, run)
    try:
        saved = any((run / "checkpoints").glob("step_*"))
        checkpoint = CheckpointStore(run).best_or_latest() if saved else None
        if checkpoint:
            check_fits(assembly.spec, checkpoint)
    except CheckpointError as error:
        report.backend = backend or config.backend
        _add(report, failed("checkpoint", str(error), "checkpoint_damaged"), watch)
    else:
        subject = from_assembly(assembly, backend)
        if checkpoint is None:
            _add(report, skipped("checkpoint", "nothing was saved: what follows is about the initial values"), watch)
        else:
            _add(report, passed("checkpoint", f"step {checkpoint.step}, sums verified"), watch)
            subject.backend.load(subject.model, checkpoint.model)
            subject = replace(subject, fresh=False, trained=True)
        rest = examine(subject, full=full, watch=watch)
        report.findings, report.backend = report.findings + rest.findings, rest.backend
    report.seconds = time.monotonic() - started
    return report


def examine(
    subject: Subject,
    *,
    full: bool = False,
    name: str = "",
    watch: Watcher | None = None,
    as_configured: bool = False,
) -> Report:
    """Every check on a subject, in order; `watch` is called with each finding as it is made.

    A failing check that later ones build on ends the examination: what is left is counted in a last, skipped finding.
    """
    started = time.monotonic()
    report, exam = Report(subject=name, backend=subject.backend.name), Exam(subject, full, as_configured)
    due = [check for check in CHECKS if full or not check.full]
    for index, check in enumerate(due):
        found = _run(check, exam)
        for finding in found:
            _add(report, finding, watch)
        if check.blocking and any(finding.status == "fail" for finding in found):
            rest = len(due) - index - 1
            _add(report, skipped("further checks", f"{rest} not made: repair this first"), watch)
            break
    report.seconds = time.monotonic() - started
    return report


def diagnose(
    model: Any,
    objective: Objective,
    batches: Sequence[Batch] | Iterable[Batch],
    *,
    backend: Backend,
    optim: Optim | None = None,
    learning_rate: float = 1e-3,
    make_step: Callable[[Subject], Step] | None = None,
    full: bool = False,
) -> Report:
    """The doctor for a model and objective of one's own.

    Args:
        model: an MLX or PyTorch module with float32 parameters; what is frozen there counts as frozen.
        objective: (model, batch) -> {"loss": sum, "weight": count}, arrays of the framework.
        batches: at least one Batch; several different ones tell more.
        backend: `mlx_training.backend.get("mlx")` or `get("torch")`.
        optim: the optimiser and its settings; AdamW's defaults if None.
        make_step: makes a training step of one's own (mlx_training.backend.Step) for a Subject; ours if None.

    Returns:
        A Report; `print(report)` shows it. `report.cause` is the likeliest cause, None for a healthy model.
    """
    chosen = list(batches)
    if not chosen:
        raise UserError("diagnose: no batches given; give at least one, better four different ones")
    spec = getattr(model, "spec", None) or TableSpec.of(backend.parameters(model))
    own = getattr(model, "spec", None) is None
    if own:
        model.spec = spec
    subject = Subject(
        backend=backend,
        spec=spec,
        model=model,
        objective=objective,
        batch=lambda index: chosen[index % len(chosen)],
        optim=optim or Optim(),
        rates=lambda step: dict.fromkeys(spec.groups, learning_rate),
        total_steps=1000,
        fresh=False,
        make_step=make_step or Subject.default_step,
    )
    try:
        with as_it_was(model):
            return examine(subject, full=full, name=type(model).__name__)
    finally:
        if own:
            del model.spec


def _add(report: Report, finding: Finding, watch: Watcher | None) -> None:
    report.findings.append(finding)
    if watch:
        watch(finding)


def _run(check: Check, exam: Exam) -> list[Finding]:
    """What a check finds. Code that raises is a finding too: somebody else's model is under examination."""
    started = time.monotonic()
    try:
        found = check.run(exam)
    except UserError as error:
        found = failed(check.name, str(error), "raised")
    except Exception as error:  # noqa: BLE001
        found = failed(
            check.name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", "raised"
        )
    findings = found if isinstance(found, list) else [found]
    seconds = time.monotonic() - started
    return [replace(finding, seconds=round(seconds / len(findings), 3)) for finding in findings]
