"""Disks that are full or read-only, at every write: a clear refusal, nothing lost, and the run goes on afterwards.

Small runs of both families train on a tmpfs of their own, and something is wrong with it: so few pages are free that
the run gets stuck at this or that write, from `train.lock` to `result.json`, with the look at the free space before a
save and without it (as where another program fills the disk meanwhile); or the disk fills up, or can only be read, from
the start, at a step, before the final report, or at any moment. `checkpoint export` and `evaluate` write there too.

The exit code must be 3 (2 where the run could not begin), without a traceback; the message must name a file or a folder
and say what to free; every checkpoint that was committed must verify. Once the disk is writable again,
`--resume auto` must end with the weights, log and result of a run on a good disk, and leave nothing behind.

Read-only is a read-only view laid over the directory: what is opened from then on is refused, `metrics.jsonl`, which is
open, is not. Mode bits would not stop root, nor would a machine let a disk become read-only while files are written.
"""

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from mlx_training import checkpoint
from mlx_training.checkpoint import CheckpointStore
from mlx_training.checkpoint_files import verify
from mlx_training.json_lines import METRICS, read_metrics
from tools.trials.damage import command
from tools.trials.disks import PAGE, Disk, after, at_step, disk, wandb_on_this_disk, why_not
from tools.trials.kills import COMMON, FAMILIES
from tools.trials.report import Report

STEPS, SAVE_EVERY = 6, 2
ADVICE = re.compile(r"Remove files from that disk|Free space|Set output_dir")
PUBLISHED = (  # so that the time-series run can be exported
    "model.preset=opentslm-sp",
    "model.encoder.numeric_scale=false",
    "model.projector.norm_output=false",
)
FORMATS = {"decoder": ("hf", "mlx"), "timeseries": ("opentslm",)}
LONGEST = 3.0  # seconds within which "any moment" comes


@dataclass
class Subject:
    """A configuration, and what its run looks like on a good disk."""

    backend: str
    family: str
    config: Path
    whole: dict[str, Any] = field(default_factory=dict)
    pages: int = 0  # that the run takes

    @property
    def name(self) -> str:
        return f"{self.backend}, {self.family}"

    def train(self, run: Path, *words: object) -> tuple[int, str]:
        """Exit code and output of training in `run`."""
        extra = PUBLISHED if self.family == "timeseries" else ()
        with wandb_on_this_disk():
            return command("train", self.config, f"output_dir={run}", "logging.wandb=offline", *extra, *words)


@dataclass
class Tally:
    """Cases of one kind."""

    cases: int = 0
    refused: int = 0  # the others had room enough, or ended before
    stuck_at: Counter[str] = field(default_factory=Counter)  # what the message named


def run(size: int, backends: Sequence[str], seed: int, folder: Path) -> Report:
    """`size` cases in all, shared out between the kinds, backends and families."""
    report = Report(skipped=why_not(folder))
    if report.skipped:
        return report
    tallies = {kind.__name__: Tally() for kind in KINDS}
    with disk(folder / "disk") as place:
        subjects = [described(folder, place, backend, family) for backend in backends for family in FAMILIES]
        for index in range(size):
            kind, subject = KINDS[index % len(KINDS)], subjects[index % len(subjects)]
            tally, draw = tallies[kind.__name__], random.Random(f"{seed}/{index}")
            tally.cases += 1
            place.free()
            for problem in kind(subject, place, Case(index / size, draw, tally)):
                report.failures.append(f"{subject.name}, case {index}, {kind.__name__}: {problem}")
            place.free()
            for path in (place.folder / "run", place.folder / "out"):
                shutil.rmtree(path, ignore_errors=True)
    for name, tally in tallies.items():
        stuck = ", ".join(f"{what} {number}" for what, number in sorted(tally.stuck_at.items()))
        report.lines.append(f"{name}: {tally.cases} cases, {tally.refused} refused ({stuck})")
    return report


@dataclass(frozen=True)
class Case:
    """One thing that goes wrong: how far through all of them, what is drawn, where it is counted."""

    share: float  # 0 to 1
    draw: random.Random
    tally: Tally


def described(folder: Path, place: Disk, backend: str, family: str) -> Subject:
    """A subject with the outcome of a run that nothing happens to."""
    config = folder / f"{backend}-{family}.yaml"
    lines = FAMILIES[family].replace("max_steps: 1000000", f"max_steps: {STEPS}")
    lines = lines.replace("hidden_size: 16, intermediate_size: 24", "hidden_size: 64, intermediate_size: 64")
    assert f"max_steps: {STEPS}" in lines
    config.write_text(
        f"{COMMON}{lines}backend: {backend}\ndiagnostics: {{probe_every_steps: 2}}\n"
        f"checkpoint: {{every_steps: {SAVE_EVERY}, keep: 9}}\n"
    )
    subject = Subject(backend, family, config)
    run = place.folder / "run"
    code, said = subject.train(run)
    assert code == 0, said
    subject.whole = outcome(run)
    subject.pages = sum(-(-path.stat().st_size // PAGE) for path in run.rglob("*") if path.is_file())
    shutil.copytree(run, config.with_suffix(""))
    shutil.rmtree(run)
    return subject


def too_small(subject: Subject, place: Disk, case: Case) -> Iterator[str]:
    """Few pages are free from the start: none, one, ... up to what a run needs; small numbers are tried more often."""
    place.leave(round(case.share**2 * (subject.pages + 8)))
    with blind() if case.draw.random() < 0.8 else ExitStack():
        yield from goes_wrong(subject, place, case)


def fills_at_a_step(subject: Subject, place: Disk, case: Case) -> Iterator[str]:
    """Few pages are left from some step on."""
    pages = case.draw.randrange(12)
    with blind() if case.draw.random() < 0.8 else ExitStack(), at_step(moment(case), STEPS, lambda: place.leave(pages)):
        yield from goes_wrong(subject, place, case)


def read_only_at_a_step(subject: Subject, place: Disk, case: Case) -> Iterator[str]:
    """From some step on, or from the start."""
    with ExitStack() as view, at_step(moment(case), STEPS, lambda: view.enter_context(place.read_only(place.folder))):
        yield from goes_wrong(subject, place, case, view.close)


def fills_at_any_moment(subject: Subject, place: Disk, case: Case) -> Iterator[str]:
    with blind(), after(seconds(case), partial(place.leave, case.draw.randrange(4))) as stop:
        yield from goes_wrong(subject, place, case, stop)


def read_only_at_any_moment(subject: Subject, place: Disk, case: Case) -> Iterator[str]:
    with ExitStack() as view, after(seconds(case), lambda: view.enter_context(place.read_only(place.folder))) as stop:
        yield from goes_wrong(subject, place, case, stop, view.close)


def exported(subject: Subject, place: Disk, case: Case) -> Iterator[str]:
    """`checkpoint export` to a disk that is full, almost full, or read-only."""
    form = case.draw.choice(FORMATS[subject.family])
    words = ("checkpoint", "export", subject.config.with_suffix(""), "--to", place.folder / "out", "--format", form)
    with made_useless(place, case):
        code, said = command(*words)
        yield from badly_said(case, code, said, (3,))
        if code and (left := [path.name for path in place.folder.iterdir() if "out" in path.name]):
            yield f"left behind: {left}"
    if code:
        code, said = command(*words)
        if code:
            yield f"afterwards it exits with {code}: {said[-500:]}"


def evaluated(subject: Subject, place: Disk, case: Case) -> Iterator[str]:
    """`evaluate` of a run on such a disk: what it writes are predictions."""
    run = place.folder / "run"
    shutil.copytree(subject.config.with_suffix(""), run)
    with made_useless(place, case):
        code, said = command("evaluate", run, "--split", "validation")
        yield from badly_said(case, code, said, (3,))
    yield from damaged(run, [])
    code, said = command("evaluate", run, "--split", "validation")
    if code:
        yield f"afterwards it exits with {code}: {said[-500:]}"


KINDS: tuple[Callable[[Subject, Disk, Case], Iterator[str]], ...] = (
    *(too_small, fills_at_a_step, too_small, read_only_at_a_step, too_small, fills_at_any_moment, too_small),
    *(read_only_at_any_moment, exported, evaluated, fills_at_a_step),
)


def goes_wrong(subject: Subject, place: Disk, case: Case, *repairs: Callable[[], None]) -> Iterator[str]:
    """Train on a disk that refuses, repair it, go on."""
    run, committed = place.folder / "run", list[Path]()
    save = CheckpointStore.save

    def save_and_note(*given: Any, **options: Any) -> Path:
        committed.append(save(*given, **options))
        return committed[-1]

    with mock.patch.object(CheckpointStore, "save", save_and_note):
        code, said = subject.train(run)
    has_begun = (run / "config.yaml").exists()
    yield from badly_said(case, code, said, (3,) if has_begun else (2, 3))
    yield from damaged(run, committed)
    for repair in (*repairs, place.free):
        repair()
    code, said = subject.train(run, "--resume", "auto")
    if code or "Traceback" in said:
        yield f"afterwards --resume auto exits with {code}: {said[-700:]}"
        return
    found = outcome(run)
    if different := [name for name, value in subject.whole.items() if found[name] != value]:
        yield f"it does not end as on a good disk: {', '.join(different)}: {found['steps']}"
    if left := [path.name for path in run.rglob("*") if path.name.startswith(".tmp") or path.suffix == ".lock"]:
        yield f"left behind: {left}"


def badly_said(case: Case, code: int, said: str, codes: Sequence[int]) -> Iterator[str]:
    """What is wrong with a refusal; nothing where the disk had room enough."""
    if "Traceback" in said or "Exception ignored" in said:
        yield f"exit code {code}: {said[-700:]}"
    if code == 0:
        return
    case.tally.refused += 1
    message = said[f"\n{said}".rfind("\nerror: ") :]
    named = re.match(r"error: (?:--to |output_dir: )?(/[^ ]+?):? (?:cannot|the checkpoint could not) be", message)
    inner = re.search(r"(model|optimizer)\.safetensors|(state|manifest)\.json|(?<=/)(latest|best)(?=')", message)
    case.tally.stuck_at[(inner and inner[0]) or kind_of(named[1]) if named else "unnamed"] += 1
    if code not in codes or not named or not ADVICE.search(message):
        yield f"exit code {code}: {said[-700:]}"


def kind_of(path: str) -> str:
    """What a message names, without what differs between runs."""
    return re.sub(r"step_\d+", "step_N", Path(path).name).removeprefix(".tmp-")


def damaged(run: Path, committed: Sequence[Path]) -> Iterator[str]:
    """Checkpoints that were there and are not any more, or are not whole."""
    for path in {*committed, *CheckpointStore(run).paths()}:
        if problems := verify(path):
            yield f"{path.name}: {problems}"


def outcome(run: Path) -> dict[str, Any]:
    """What must not depend on what happened to the disk."""
    store, records = CheckpointStore(run), read_metrics(run / METRICS)
    result = json.loads((run / "result.json").read_text())
    return {
        "steps": [record["step"] for record in records if "loss" in record],
        "losses": [record["loss"] for record in records if "loss" in record],
        "evaluations": [record for record in records if "eval/loss" in record],
        "probes": [record["step"] for record in read_metrics(run / "gradients.jsonl")],
        "weights": {name: array.tobytes() for name, array in store.load().model.items()},
        "best": (store.directory / "best").read_text(),
        "result": {name: result[name] for name in ("steps", "eval")},
        "predictions": [path.read_text() for path in sorted(run.glob("predictions_*"))],
    }


def seconds(case: Case) -> float:
    """Any moment, early ones more often."""
    return case.draw.random() ** 2 * LONGEST


def moment(case: Case) -> int:
    """0, the start; a step; or after the last one, the final report."""
    return case.draw.randrange(STEPS + 2)


@contextmanager
def made_useless(place: Disk, case: Case) -> Iterator[None]:
    """Full, almost full, or read-only."""
    pages = case.draw.choice((0, 0, 1, 2, 3, 5, 8, None))
    if pages is None:
        with place.read_only(place.folder):
            yield
    else:
        place.leave(pages)
        yield
        place.free()


def blind() -> AbstractContextManager[Any]:
    """Nobody looks at the free space before a save."""
    return mock.patch.object(checkpoint, "MARGIN", -(2**22))
