"""The one training loop, for every family on every backend."""

import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.adapters import describe_adapter
from mlx_training.assemble import Assembly, assemble, llm_sha256, open_backend
from mlx_training.backend import Backend
from mlx_training.checkpoint import CheckpointStore
from mlx_training.checkpoint_writer import CheckpointWriter
from mlx_training.config import RunConfig, to_yaml
from mlx_training.diagnostics import norms
from mlx_training.diagnostics.guard import ADVICE, Guard
from mlx_training.environment import git_state, versions
from mlx_training.errors import DivergedError, Interrupted
from mlx_training.evaluate import Evaluator, save_predictions
from mlx_training.events import EVENTS, EventLines, descriptions
from mlx_training.fingerprint import fingerprint
from mlx_training.initial import initial_parameters
from mlx_training.json_lines import METRICS, JsonLines, set_aside
from mlx_training.memory import full_memory_explained, training_advice
from mlx_training.notes import notes
from mlx_training.objectives.balanced import training_objective
from mlx_training.progress import Progress
from mlx_training.resume import RESULT, after_stop, check_something_trains, find_checkpoint, finished_result
from mlx_training.run_directory import claim_run_directory, full_disk_explained, write_atomic
from mlx_training.run_lock import locked
from mlx_training.samples import SAMPLES, TrainingSamples
from mlx_training.signals import interruptible, stoppable
from mlx_training.together import diverging_together, expect_alike, joined, share, share_arrays
from mlx_training.tracking import WANDB_ID, StepTimer, Tracker, open_tracker


def train(config: RunConfig, *, resume: str | None = None, allow_change: Sequence[str] = ()) -> dict[str, Any]:
    """Train a configuration; the returned object is what `train --json` prints.

    `resume`: None starts in a new directory; "auto" continues the newest valid checkpoint, or starts; a path
    continues that checkpoint. `allow_change`: keys that may differ from the run that is continued, beside harmless
    ones. Raises DivergedError, Interrupted, and the errors of what it puts together.

    Every process that torchrun or mlx.launch starts calls this; all but process 0 return an empty object.
    """
    backend = open_backend(config)
    with joined(backend, config) as config:
        run = Path(config.output_dir)
        with locked(run), full_disk_explained(run), full_memory_explained(lambda: training_advice(config)):
            try:
                result = train_locked(config, backend, resume, allow_change)
            except KeyboardInterrupt:
                raise Interrupted(signal.SIGINT, after_stop(run)) from None
    return result if backend.group.rank == 0 else {}


def train_locked(
    config: RunConfig, backend: Backend, resume: str | None, allow_change: Sequence[str]
) -> dict[str, Any]:
    """`train`, while no other process may train in this directory."""
    started = time.monotonic()
    group = backend.group
    is_alone = group.size == 1
    holds_part = group.rank == 0 or config.performance.shard  # of what is saved and reported
    run = claim_run_directory(config.output_dir, resume is not None)
    store = CheckpointStore(run)
    assembly = assemble(config, run)
    batches, total_steps = plan(assembly)
    batches.share = group.rank, group.size
    rows = fingerprint(assembly.data)
    expect_alike(group, assembly, rows)
    checkpoint, changed = find_checkpoint(store, resume, assembly, allow_change)
    goes_on = checkpoint is not None and store.holds(checkpoint.path)  # in the directory that it stopped in
    progress = Progress(**checkpoint.state["progress"]) if checkpoint else Progress()
    if not store.has_best:  # resumed before the best one, or in another directory
        progress.best = None
    progress.stopped_early = out_of_patience(config, progress)
    first = checkpoint.step if checkpoint else 0
    is_over = first >= total_steps or progress.stopped_early
    result = finished_result(store, checkpoint, changed, backend.name) if checkpoint and is_over else None
    first, is_over, result, known = share(group, [first, is_over, result, asdict(progress)])
    progress = Progress(**known)
    if result:
        print(f"{run}: finished at step {first}: nothing left to train", file=sys.stderr)
        return result
    if is_over:
        check_something_trains(changed, first, total_steps, elsewhere=checkpoint is not None and not goes_on)

    model = backend.build(assembly.spec)
    objective = training_objective(assembly.spec)
    step = backend.make_step(model, objective, config.optim, seed=config.experiment.seed)
    if checkpoint:
        parameters, state = checkpoint.model, checkpoint.optimizer
        checkpoint = replace(checkpoint, model={}, optimizer={})  # so that nothing keeps what is loaded
    else:  # process 0's alone are looked at
        source, built = config.training.init_from, partial(backend.export, model)
        parameters, state = initial_parameters(assembly.spec, config.experiment.seed, source, built), {}
    shapes = {name: param.shape for name, param in assembly.spec.params().items()}
    backend.load(model, share_arrays(group, parameters, shapes))
    if first:
        step.load(share_arrays(group, state, config.optim.state_shapes(assembly.spec)))
    del parameters, state
    if not goes_on:
        set_aside(run / METRICS, run / EVENTS, run / norms.FILE, run / SAMPLES)
        (run / WANDB_ID).unlink(missing_ok=True)
    (run / RESULT).unlink(missing_ok=True)
    if not (is_over and (run / "config.yaml").exists()):  # which says what was trained
        describe_run(run, assembly, backend.name)
    start = f"resumed from step {first} (saved by {checkpoint.state['backend']})" if checkpoint else "from step 0"
    start += ": nothing left to train" if is_over else ""
    size = f"{assembly.spec.num_parameters:,} trainable parameters"
    size += f", {group.size} processes" if group.size > 1 else ""
    for note in notes(config.model, assembly.spec, assembly.data.tokenizer.vocab_size) if first == 0 else ():
        print(f"note: {note}", file=sys.stderr)
    print(f"{run}: {backend.name} ({backend.runtime.device}), {size}, {start}", file=sys.stderr)

    about = {
        "llm_sha256": llm_sha256(assembly.spec),
        "adapter": describe_adapter(assembly.spec),
        "data": rows,
        "backend": backend.name,
    }
    evaluator = Evaluator(config, backend, model, assembly.data)
    guard = Guard(assembly, backend, model, objective, run=run, step=first, skipped=progress.skipped)
    cadence = Cadence(config, total_steps, batches.num_batches)
    accumulation = config.training.grad_accumulation_steps
    number, timer = first, StepTimer()
    base_seconds = progress.seconds - started
    with (
        interruptible() as interrupted,
        closing(CheckpointWriter(store)) as writer,
        tracker_of(run, assembly, backend, batches.num_batches, first, progress, total_steps) as tracker,
        closing(JsonLines(run / norms.FILE, from_step=first, lazy=True)) as probe_log,
        closing(TrainingSamples(run, evaluator, first, timer.restart)) as samples,
        closing(batches.prefetch(first * accumulation, total_steps * accumulation)) as stream,
        diverging_together(group),
    ):

        def evaluate() -> bool:
            """Whether this is the best so far. A signal ends it; the run that goes on makes up for it."""
            measure = evaluator.during_training
            with step.averaged():
                values = interrupted.unless_stopped(measure) if is_alone else share(group, measure())
            if values is None:
                return False
            tracker.log(number, {f"eval/{name}": value for name, value in values.items()})
            progress.evaluated = number
            return judge(config, progress, values, number)

        def save(*, best: bool) -> None:
            progress.seconds = base_seconds + time.monotonic()
            parameters, optimizer = {}, {}
            if holds_part:
                with step.averaged():
                    parameters = backend.export(model)
                optimizer = step.export()
            if group.rank == 0:
                state = {"progress": asdict(progress), **about}
                writer.save(number, parameters, optimizer, state, best=best, keep=config.checkpoint.keep)
            timer.restart()

        stopping = False
        if cadence.evaluates(number) and progress.evaluated < number:  # interrupted between saving and evaluating
            save(best=evaluate())
            stopping = is_alone and bool(interrupted)
        while number < total_steps and not progress.stopped_early and not stopping:
            number += 1
            rates = learning_rates(config, number, total_steps)
            micro_batches = [next(stream) for _ in range(accumulation)]
            probes = cadence.probes(number)
            metrics = step(micro_batches, step=number, lr=rates, probe=probes)
            writer.wait()  # one step hides a save; no more, so that a kill never costs more than one save interval
            guard.watch(number, metrics, micro_batches)
            if probes:
                probe_log.log(norms.record_of(number, metrics["probe"], assembly.spec))
            counts = [sum(batch.num_supervised for batch in micro_batches), bool(interrupted)]
            num_tokens, num_stopped = group.total(np.array(counts, np.int32)).tolist()
            progress.tokens += num_tokens
            timer.count(num_tokens)

            stopping = num_stopped > 0  # a signal that comes later ends the next step
            evaluates = cadence.evaluates(number) and not stopping
            saves = evaluates or cadence.saves(number) or stopping
            if saves or cadence.logs(number):
                seen = guard.read()
                progress.loss = seen["loss"] if math.isfinite(seen["loss"]) else progress.loss
                progress.skipped = guard.skipped
                values = seen | {f"lr/{group}": rate for group, rate in rates.items()} | timer.read()
                tracker.log(number, values | {"memory_gb": backend.peak_memory() / 1e9})
            samples.write(number, step.averaged)
            improved = evaluates and evaluate()
            stopping |= evaluates and is_alone and bool(interrupted)
            if saves and (evaluates or stopping or not guard.in_a_row):  # else the last update may have been a bad one
                save(best=improved)
        writer.wait()
        (num_stopped,) = group.total(np.array([bool(interrupted)], np.int32))  # nobody leaves before all is saved
        if num_stopped:
            received = interrupted[0] if interrupted else signal.SIGTERM  # another process received it
            raise Interrupted(received, f"saved at step {number}; continue with --resume auto")
    if not holds_part:
        return {}

    with stoppable(f"in the final report; the training is saved at step {number}; continue with --resume auto"):
        best = store.best_or_latest().model if group.rank == 0 else {}
        backend.load(model, share_arrays(group, best, shapes) if config.performance.shard else best)
        split = config.evaluation.test_split or config.evaluation.split
        report, predictions = evaluator.report(split)
        if config.evaluation.save_predictions and predictions:
            save_predictions(run / f"predictions_{split}.jsonl", predictions)
        seconds = round(progress.seconds, 2)
        result = {"run": str(run), "backend": backend.name, "steps": number, "loss": progress.loss, "seconds": seconds}
        result["eval"] = report
        write_atomic(run / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def tracker_of(
    run: Path, assembly: Assembly, backend: Backend, num_batches: int, first: int, progress: Progress, total_steps: int
) -> Tracker:
    """The sinks of this run, continuing after step `first`."""
    config, evaluated = assembly.config, progress.evaluated
    tracker = open_tracker(
        run,
        total_steps=total_steps,
        from_step=first,
        evaluated=evaluated,
        wandb=config.logging.wandb,
        project=config.logging.project,
        name=config.experiment.name,
        tags=config.experiment.tags,
        notes=config.experiment.notes,
        config=config.model_dump(mode="json"),
    )
    if config.logging.events:
        described, place = descriptions(assembly, backend, num_batches), (first, evaluated, progress.seconds)
        tracker.sinks.append(EventLines(run, described, total_steps, *place))
    return tracker


def plan(assembly: Assembly) -> tuple[Any, int]:
    """Training batches and the number of optimiser steps."""
    training = assembly.config.training
    batches = assembly.data.train_batches()
    if training.max_steps is not None:
        return batches, training.max_steps
    assert training.num_epochs is not None, "the configuration checks this"
    return batches, math.ceil(training.num_epochs * batches.num_batches / training.grad_accumulation_steps)


def learning_rates(config: RunConfig, step: int, total_steps: int) -> dict[str, float]:
    """One learning rate for every parameter group."""
    factor = config.schedule.factor(step, total_steps)
    return {group: peak * factor for group, peak in config.learning_rates.items()}


def judge(config: RunConfig, progress: Progress, values: dict[str, float], step: int) -> bool:
    """Whether an evaluation is the best so far; counts those that are not, and stops when patience runs out."""
    name = config.checkpoint.best.removeprefix("eval/")
    value, sign = values[name], 1 if name == "loss" else -1
    if not math.isfinite(value):
        raise DivergedError(f"diverged by step {step}: {config.checkpoint.best} is {value}. {ADVICE}", step)
    margin = config.training.early_stopping_min_delta
    if progress.best is None or sign * value < sign * progress.best - margin:
        progress.best, progress.evaluations_without_improvement = value, 0
        return True
    progress.evaluations_without_improvement += 1
    progress.stopped_early = out_of_patience(config, progress)
    return False


def out_of_patience(config: RunConfig, progress: Progress) -> bool:
    """Whether early stopping has seen enough."""
    patience = config.training.early_stopping_patience
    return patience is not None and progress.evaluations_without_improvement >= patience


def describe_run(run: Path, assembly: Assembly, backend: str) -> None:
    """Write the resolved configuration, versions and git state beside the results."""
    config = assembly.config
    write_atomic(run / "config.yaml", to_yaml(config))
    environment = {"backend": backend, "seed": config.experiment.seed, "llm_sha256": llm_sha256(assembly.spec)}
    environment |= {"versions": versions(), "git": git_state()}
    write_atomic(run / "env.json", json.dumps(environment, indent=1) + "\n")


class Cadence:
    """When to probe, log, evaluate and save; the last step does the latter three."""

    def __init__(self, config: RunConfig, total_steps: int, num_batches: int) -> None:
        self.total_steps = total_steps
        epoch = max(1, num_batches // config.training.grad_accumulation_steps)
        self.probe_every = config.diagnostics.probe_every_steps
        self.log_every = config.logging.every_steps
        self.evaluate_every = config.evaluation.every_steps or epoch
        self.save_every = config.checkpoint.every_steps or self.evaluate_every

    def probes(self, step: int) -> bool:
        return self.probe_every is not None and step % self.probe_every == 0

    def logs(self, step: int) -> bool:
        return step == 1 or step % self.log_every == 0 or step == self.total_steps

    def evaluates(self, step: int) -> bool:
        return step % self.evaluate_every == 0 or step == self.total_steps

    def saves(self, step: int) -> bool:
        return step % self.save_every == 0 or step == self.total_steps
