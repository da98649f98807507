"""Damage to the newest checkpoint of a run: always found, said with the file's name, and the one before is used.

Small runs of both families are trained with four checkpoints, and copies of them damaged (`damages.py`): bytes cut off,
flipped, overwritten; files missing, emptied, swapped for directories, pipes and links; manifests, files and whole
checkpoints of other models; and, with a manifest made to fit, arrays, headers and states that are wrong. Then:

- `checkpoint verify` exits with 3 and names the file;
- resuming warns, names the file and takes the previous checkpoint; and again afterwards, without a word;
- `--resume` of the damaged one, and what evaluation reads, is a CheckpointError;
- a lost pointer is reported and repaired, and the newest checkpoint used.

Of every seven injections one is put through the commands themselves: `evaluate`, `train --resume CHECKPOINT`, and
`train --resume auto`, which must end with the very weights and log of the run that nothing happened to. The others
call what those commands call (`find_checkpoint`, `best_or_latest`, `check_fits`). Evaluation is not expected to refuse
a checkpoint whose weights are right and whose moments or progress are not: it does not look at them.
"""

import contextlib
import io
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_training import cli
from mlx_training.assemble import Assembly, assemble, check_fits
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import load_config
from mlx_training.errors import CheckpointError
from mlx_training.json_lines import METRICS, read_metrics
from mlx_training.resume import find_checkpoint
from tools.trials.damages import KINDS, Damage, Place
from tools.trials.kills import COMMON, FAMILIES
from tools.trials.report import Report

STEPS, SAVE_EVERY = 8, 2
WHOLE = 7  # of so many injections, one is put through the commands
PATIENCE = 60  # seconds that anything may take; longer, and it hangs


@dataclass(frozen=True)
class Subject:
    """A run that nothing has happened to, and what it is made of."""

    name: str
    folder: Path  # with run/ and config.yaml
    assembly: Assembly

    @property
    def newest(self) -> str:
        return f"step_{STEPS:08d}"

    @property
    def previous(self) -> str:
        return f"step_{STEPS - SAVE_EVERY:08d}"


@dataclass
class Tally:
    """Injections of one kind."""

    injected: int = 0
    detected: int = 0
    went_on: int = 0  # from the checkpoint that should be used
    through_commands: int = 0


def run(size: int, backends: Sequence[str], seed: int, folder: Path) -> Report:
    """`size` injections in all, of every kind in turn, shared out between backends and families."""
    report, tallies = Report(), {kind.__name__: Tally() for kind in KINDS}
    subjects = [trained(folder, backend, family) for backend in backends for family in FAMILIES]
    report.failures += [f"{subject.name}, undamaged: {problem}" for subject in subjects for problem in sound(subject)]
    for index in range(size):
        subject, kind = subjects[index % len(subjects)], KINDS[index % len(KINDS)]
        other = subjects[(index + 1) % len(subjects)]  # of the other family
        tally, draw = tallies[kind.__name__], random.Random(f"{seed}/{index}")
        copy = folder / "copy"
        shutil.copytree(subject.folder / "run", copy / "run")
        checkpoints = copy / "run" / "checkpoints"
        (checkpoints / "best").write_text(subject.newest + "\n")  # so that evaluation reads the damaged one
        foreign = other.folder / "run/checkpoints" / other.newest
        damage = kind(Place(checkpoints / subject.newest, checkpoints / subject.previous, foreign, draw))
        tally.injected += 1
        problems = [*undetected(subject, copy / "run", damage)]
        tally.detected += not problems
        if index % WHOLE == 0:
            tally.through_commands += 1
            going_on = [*not_through_commands(subject, copy, damage)]
        else:
            going_on = [*not_resumed(subject, copy / "run", damage)]
        tally.went_on += not going_on
        report.failures += [f"{subject.name}, {damage.what}: {problem}" for problem in problems + going_on]
        shutil.rmtree(copy)
    report.lines = told(tallies)
    return report


def told(tallies: dict[str, Tally]) -> list[str]:
    """One line a kind, and their sums."""
    lines = [f"{'':17}{'injected':>9}{'detected':>9}{'went on':>9}{'commands':>9}"]
    total = Counter[str]()
    for name, tally in tallies.items():
        total.update(vars(tally))
        lines.append(f"{name:17}" + "".join(f"{number:9}" for number in vars(tally).values()))
    return [*lines, f"{'all':17}" + "".join(f"{number:9}" for number in total.values())]


def trained(folder: Path, backend: str, family: str) -> Subject:
    """A run with checkpoints of steps 2, 4, 6 and 8."""
    here = folder / f"{backend}-{family}"
    here.mkdir()
    lines = FAMILIES[family].replace("max_steps: 1000000", f"max_steps: {STEPS}")
    assert f"max_steps: {STEPS}" in lines
    (here / "config.yaml").write_text(
        f"{COMMON}{lines}output_dir: {here / 'run'}\nbackend: {backend}\n"
        f"checkpoint: {{every_steps: {SAVE_EVERY}, keep: 9}}\n"
    )
    code, said = command("train", here / "config.yaml")
    assert code == 0, said
    return Subject(f"{backend}, {family}", here, assemble(load_config(here / "config.yaml"), here / "run"))


def sound(subject: Subject) -> Iterator[str]:
    """Alarms about a run that nothing has happened to."""
    code, said = command("checkpoint", "verify", subject.folder / "run")
    if code:
        yield f"verify exits with {code}: {said}"
    checkpoint, said = resumed(subject, subject.folder / "run", "auto")
    if checkpoint != subject.newest or said:
        yield f"goes on from {checkpoint}: {said}"


def undetected(subject: Subject, run: Path, damage: Damage) -> Iterator[str]:
    """What `checkpoint verify`, `--resume CHECKPOINT` and evaluation fail to say."""
    code, said = command("checkpoint", "verify", run)
    if code != 3 or damage.named not in said or "Traceback" in said:
        yield f"verify exits with {code}: {said[-500:]}"
    if damage.is_pointer:
        return
    newest = run / "checkpoints" / subject.newest
    checkpoint, said = resumed(subject, run, str(newest))
    if checkpoint is not None or damage.named not in said:
        yield f"--resume {newest} goes on from {checkpoint}: {said[-500:]}"
    if damage.concerns_evaluation:
        try:
            with patiently():
                check_fits(subject.assembly.spec, CheckpointStore(run).best_or_latest())
            yield "evaluation reads it"
        except CheckpointError:
            pass
        except Exception as error:  # noqa: BLE001  what a user would see as a traceback
            yield f"evaluation: {type(error).__name__}: {error}"


def not_resumed(subject: Subject, run: Path, damage: Damage) -> Iterator[str]:
    """What is wrong with going on: the first time, again, and after the next save."""
    expected = subject.newest if damage.is_pointer else subject.previous
    checkpoint, said = resumed(subject, run, "auto")
    if checkpoint != expected or "warning: " not in said or damage.named not in said:
        yield f"goes on from {checkpoint}: {said[-500:]}"
        return
    checkpoint, said = resumed(subject, run, "auto")
    if checkpoint != expected or (said and "best" not in said):
        yield f"the second time it goes on from {checkpoint}: {said[-500:]}"
    store = CheckpointStore(run)
    kept = store.load()
    store.save(kept.step + 1, kept.model, kept.optimizer, kept.state, best=True, keep=9)
    checkpoint, said = resumed(subject, run, "auto")
    if checkpoint != f"step_{kept.step + 1:08d}" or said:
        yield f"after the next save it goes on from {checkpoint}: {said[-500:]}"
    if not damage.is_pointer and (run / "checkpoints" / subject.newest).is_dir():
        yield "the damaged directory is still there after the next save"


def not_through_commands(subject: Subject, copy: Path, damage: Damage) -> Iterator[str]:
    """What is wrong with the commands, and with the run that goes on to its end."""
    run = copy / "run"
    newest = run / "checkpoints" / subject.newest
    train = ("train", subject.folder / "config.yaml", f"output_dir={run}", "--resume")
    if not damage.is_pointer:
        refused: list[tuple[object, ...]] = [(*train, newest)]
        refused += [("evaluate", run)] if damage.concerns_evaluation else []
        for words in refused:
            code, said = command(*words)
            if code != 3 or "error: " not in said or "Traceback" in said:
                yield f"{words[0]} exits with {code}: {said[-500:]}"
    code, said = command(*train, "auto")
    if code or "warning: " not in said or damage.named not in said or "Traceback" in said:
        yield f"--resume auto exits with {code}: {said[-500:]}"
        return
    code, said = command("checkpoint", "verify", run)
    if code:
        yield f"at the end verify exits with {code}: {said[-500:]}"
    whole = CheckpointStore(subject.folder / "run").load().model
    model = CheckpointStore(run).load().model
    if {name: array.tobytes() for name, array in model.items()} != {n: a.tobytes() for n, a in whole.items()}:
        yield "it ends with other weights"
    if losses(run) != losses(subject.folder / "run"):
        yield f"{METRICS} is another: {losses(run)}"


def losses(run: Path) -> list[tuple[int, float]]:
    """Every logged step and its loss."""
    return [(record["step"], record["loss"]) for record in read_metrics(run / METRICS) if "loss" in record]


def resumed(subject: Subject, run: Path, resume: str) -> tuple[str | None, str]:
    """The checkpoint that would be continued, and what is said; None where it is refused with a CheckpointError."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), patiently():
        try:
            checkpoint, _ = find_checkpoint(CheckpointStore(run), resume, subject.assembly)
        except CheckpointError as error:
            return None, str(error)
        except Exception as error:  # noqa: BLE001  what a user would see as a traceback
            return f"nothing, but {type(error).__name__}: {error}", said.getvalue()
    return checkpoint.path.name if checkpoint else "the beginning", said.getvalue()


def command(*words: object) -> tuple[int, str]:
    """Exit code and everything said by `mlx-training` in this process; a traceback is said, with exit code 1."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), patiently():
        try:
            code = cli.main([str(word) for word in words])
        except Exception as error:  # noqa: BLE001  what a user would see as a traceback
            print(f"Traceback: {type(error).__name__}: {error}")
            code = 1
    return code, said.getvalue()


@contextlib.contextmanager
def patiently() -> Iterator[None]:
    """TimeoutError for what hangs."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"it hangs: more than {PATIENCE} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
