"""Checks of speed and of the machine: what makes a step slow, or a run impossible."""

import statistics
import time
from typing import Any

from mlx_training.backend import Step
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.exam import Check, Exam, without_dropout
from mlx_training.diagnostics.plan import bytes_needed
from mlx_training.diagnostics.report import Finding, failed, passed, skipped, warned
from mlx_training.diagnostics.subject import Subject
from mlx_training.environment import versions

NUM_SHAPES = 36  # batches whose shapes are compared
MANY_SHAPES = 0.7  # of the batches looked at that may have a shape of their own
COMPILING_SHARE = 0.5  # of a step's time that may pass in compiling it, where many have a shape of their own
SYNC_SHARE = 0.95  # of a step's time that may pass before it returns
MEMORY_SHARE = 0.9  # of the machine's memory that a plan may need


def environment(exam: Exam) -> list[Finding]:
    """What runs here, and whether its memory will do for the batches as configured."""
    name, backend, config, about = "environment", exam.subject.backend, exam.subject.config, versions()
    version = about["packages"].get(backend.name, "?")
    figure = f"{backend.name} {version} on {backend.runtime.device}, {backend.runtime.precision}"
    figure += f"; Python {about['python']}, {about['cpus']} CPUs, {about['memory_gb']} GB"
    if config is None:
        return [passed(name, figure)]
    largest, data = max(exam.batches, key=lambda batch: batch.tokens.size), exam.subject.data
    examined = data.config.training.batch_size if data else config.training.batch_size
    needed = bytes_needed(config, exam.subject.spec, largest, examined, backend.name) / 2**30
    figure += f", of which the plan needs {needed:.1f}"
    # an accelerator's own memory is not in this figure, unless it is the machine's (Apple silicon)
    shared = backend.runtime.device != "cuda"
    short = shared and needed > MEMORY_SHARE * about["memory_gb"]
    return [warned(name, figure, "memory_short") if short else passed(name, figure)]


def label_logits(exam: Exam) -> Finding:
    """The head is applied at label places only."""
    name, subject, batch = "logits", exam.subject, exam.batches[0]
    head = getattr(subject.model, "head", None)
    if head is None or batch.positions is None:
        return skipped(name, "every place is a label place, or the model has no head() to watch")
    places: list[int] = []

    def watched(h: Any) -> Any:
        places.append(int(h.size if not callable(h.size) else h.numel()) // int(h.shape[-1]))
        return head(h)

    subject.model.head = watched
    try:
        subject.backend.score(subject.model, subject.objective, batch)
    finally:
        del subject.model.head
    figure = f"{sum(places)} places, {batch.targets.size} labels, {batch.tokens.size} tokens"
    labels = batch.targets.size
    if max(places, default=0) > 1.5 * labels or sum(places) > 2.5 * labels:  # in chunks, and twice in some objectives
        return failed(name, f"the head sees {figure}", "full_logits")
    return passed(name, figure)


def shapes(exam: Exam) -> Finding:
    """Few shapes of batches, as each is compiled once; or ones that come again, or cost little beside a step."""
    name, subject = "shapes", exam.subject
    batches = [subject.batch(index) for index in range(NUM_SHAPES)]
    distinct = {_shapes_of(batch): batch for batch in batches}
    figure = f"{len(distinct)} in {len(batches)} batches"
    step = subject.new_step()
    traces, compiles = 0, subject.backend.name == "mlx"
    has_many = compiles and len(distinct) > MANY_SHAPES * NUM_SHAPES
    if has_many:  # a small dataset has few rows, whose shapes come again
        later = {_shapes_of(subject.batch(index)) for index in range(NUM_SHAPES, 2 * NUM_SHAPES)} - distinct.keys()
        figure += f", {len(later)} more in as many after them"
        has_many = len(later) > MANY_SHAPES * NUM_SHAPES
    with subject.restored(), without_dropout(subject.model):
        if hasattr(step, "num_compilations"):
            for _ in range(3):
                _seconds(subject, step, batches[0])
            traces = step.num_compilations
            figure += f"; {traces} compilations for three steps of one shape"
        if has_many:
            pairs = [(_seconds(subject, step, new), _seconds(subject, step, new)) for new in [*distinct.values()][1:6]]
            share = statistics.median(1 - again / first for first, again in pairs)
            figure += f"; {max(share, 0.0):.0%} of the first step of a shape is compiling"
            has_many = share > COMPILING_SHARE
    return failed(name, figure, "recompiles") if has_many or (compiles and traces > 2) else passed(name, figure)


def _shapes_of(batch: Batch) -> tuple[Any, ...]:
    return tuple((name, array.shape) for name, array in batch.arrays().items())


def _seconds(subject: Subject, step: Step, batch: Batch) -> float:
    """What a step takes that changes no weight, until its loss is known."""
    started = time.perf_counter()
    float(step([batch], step=1, lr=dict.fromkeys(subject.spec.groups, 0.0))["loss"])
    return time.perf_counter() - started


def host_sync(exam: Exam) -> Finding:
    """A step is launched and returns; the device works on. Only an accelerator can show it."""
    name, subject = "host syncs", exam.subject
    if subject.backend.runtime.device == "cpu":
        return skipped(name, "on the CPU there is no device to wait for")
    shares = []
    with subject.restored():
        step, rates = subject.new_step(), dict.fromkeys(subject.spec.groups, 0.0)
        for number in range(1, 8):
            started = time.perf_counter()
            metrics = step([exam.batches[0]], step=number, lr=rates)
            launched = time.perf_counter()
            float(metrics["loss"])
            shares.append((launched - started) / (time.perf_counter() - started))
    share = statistics.median(shares[2:])  # the first ones compile; another process may take the CPU in one
    figure = f"{share:.0%} of a step passes before it returns"
    return warned(name, figure, "host_sync") if share > SYNC_SHARE else passed(name, figure)


def data_time(exam: Exam) -> Finding:
    """Making a batch takes little beside using it."""
    name, subject = "data time", exam.subject
    started = time.perf_counter()
    batches = [subject.batch(index) for index in range(20, 24)]
    making = (time.perf_counter() - started) / len(batches)
    started = time.perf_counter()
    subject.backend.gradients(subject.model, subject.objective, batches[0])
    using = time.perf_counter() - started
    figure = f"{making * 1e3:.1f} ms to make a batch, {using * 1e3:.1f} ms for its gradient"
    return warned(name, figure, "data_stall") if making > using and making > 0.05 else passed(name, figure)


CHECKS = (
    Check("logits", label_logits),
    Check("shapes", shapes),
    Check("host syncs", host_sync),
    Check("data time", data_time),
)
ENVIRONMENT = (Check("environment", environment),)
