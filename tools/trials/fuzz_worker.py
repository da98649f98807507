"""Runs some cases of the trial `fuzz` in this process, under guard, and says what came of each.

python -m tools.trials.fuzz_worker FOLDER --seed 1 --cases 100 --backend torch         cases 0 to 99
python -m tools.trials.fuzz_worker FOLDER --seed 1 --cases 8 --first 7 --backend torch  case 7 alone, with all it says
"""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from hypothesis import HealthCheck, Phase, given, seed, settings

from mlx_training import cli
from mlx_training.diagnostics import machine
from tools.trials.fuzz_cases import Case, cases
from tools.trials.fuzz_material import prepare

PATIENCE = 5.0  # seconds
BUSY = 4  # times as many pass, at most, on a busy machine, while a command uses the processor for so many
SPARE_MEMORY = 4 * 2**30  # bytes of address space, beside what the frameworks hold
CODES = (0, 1, 2, 3, 4)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ONE_PATH = ("os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.truncate", "os.utime", "os.setxattr")
TWO_PATHS = ("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile")
NEVER = ("os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect")
PROGRAMS = ("git", Path(sys.executable).name)  # the commit of the sources; the speed of this machine, for `plan`


class Hang(BaseException):
    """A command took too long."""


class Guard:
    """Sees every file that is opened for writing, moved or removed, and forbids those that a command may not touch."""

    def __init__(self) -> None:
        self.allowed: list[str] = []
        self.asked = ""  # an output_dir outside: a command may try, and is refused as by another user's permissions
        self.seen: list[str] = []
        self.watching = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event in NEVER or (event == "subprocess.Popen" and Path(str(args[0])).name not in PROGRAMS):
            self.seen.append(f"{event} {args[:2]!r:.100}")
        for path in written(event, args):
            real = os.path.realpath(os.fsdecode(path))
            if real == os.devnull or any(real == place or real.startswith(f"{place}/") for place in self.allowed):
                continue
            if not self.asked or not (real + "/").startswith(os.path.realpath(self.asked)):
                self.seen.append(f"{event} {real[:200]}")
            raise PermissionError(13, os.strerror(13), os.fsdecode(path))


def written(event: str, args: tuple[Any, ...]) -> list[Any]:
    """The paths that an event changes. Those relative to a descriptor are inside a tree that was named before."""
    if event == "open":
        paths = [args[0]] if (args[2] or 0) & WRITES else []
    elif event in ONE_PATH:
        paths = [] if event in ("os.remove", "os.mkdir", "os.rmdir") and args[-1] != -1 else [args[0]]
    elif event == "shutil.rmtree":
        paths = [args[0]]
    else:
        paths = [*args[:2]] if event in TWO_PATHS else []
    return [path for path in paths if isinstance(path, str | bytes | os.PathLike)]


class Worker:
    """Runs cases in `folder`/case, beside `folder`/material; a line of JSON each on `told`."""

    def __init__(self, folder: Path, first: int, told: TextIO) -> None:
        self.case, self.outside, self.first, self.told = folder / "case", folder / "material", first, told
        self.number = -1
        self.guard = Guard()
        cache = machine._cache_file()  # where `plan` keeps the speed of this machine
        self.guard.allowed = [str(self.case / "run"), tempfile.gettempdir(), *([str(cache.parent)] if cache else [])]
        sys.addaudithook(self.guard)

    def __call__(self, case: Case) -> None:
        self.number += 1
        if self.number < self.first:
            return
        self.tell(number=self.number, kind=case.kind, input=shown(case))  # so that even a crash leaves its input
        result = self.run(case)
        if "hang" in result["problem"]:  # once more: the machine may have been busy
            result = self.run(case, again=True) | {"again": True}
        self.tell(number=self.number, **result)

    def tell(self, **record: Any) -> None:
        self.told.write(json.dumps(record) + "\n")
        self.told.flush()

    def run(self, case: Case, *, again: bool = False) -> dict[str, Any]:
        """Exit code, seconds and what is wrong with how the command behaved."""
        self.lay_out(case)
        before = listing(self.case / "inputs", self.outside)
        self.guard.seen, self.guard.asked = [], case.writes.strip("'\"").split("\0")[0]
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
        started, problem = time.perf_counter(), ""
        code: Any = None
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), alarm(again), self.watched():
                code = cli.main(case.argv)
        except SystemExit as ended:
            code = ended.code
        except Hang:
            problem = "hang: " + " < ".join(reversed(traceback.format_exc().splitlines()[-9:-1]))
        except BaseException as error:  # noqa: BLE001  whatever would have reached the user
            problem = f"traceback: {type(error).__name__}: {error!s:.200}{place(error)}"
        seconds = time.perf_counter() - started
        said, report = text_of(err), text_of(out)
        if not problem and code not in CODES:
            problem = f"exit code {code!r}"
        elif not problem and code and not (said.strip() or (code in (1, 3) and report.strip())):
            problem = f"exit code {code} without a message"
        elif not problem and "Traceback" in said:
            problem = f"traceback on stderr: {said[-300:]}"
        if self.guard.seen:
            problem = f"outside the run directory: {'; '.join(self.guard.seen[:3])}"
        elif before != listing(self.case / "inputs", self.outside):
            problem = "an input was changed"
        elif extra := [path.name for path in self.case.iterdir() if path.name not in ("inputs", "run", "pipe", "loop")]:
            problem = f"made in the working directory: {extra}" if not case.writes else problem
        return {
            "code": code,
            "seconds": round(seconds, 3),
            "problem": problem,
            "message": said[-1500:],
            "length": len(said),
        }

    def lay_out(self, case: Case) -> None:
        """A fresh folder with the case's files, a pipe and a link to itself, as the working directory."""
        os.chdir(self.case.parent)
        shutil.rmtree(self.case, ignore_errors=True)
        (self.case / "inputs").mkdir(parents=True)
        if case.run:
            shutil.copytree(self.outside / case.run, self.case / "run")
        for name, data in case.files.items():
            path = self.case / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        os.mkfifo(self.case / "pipe")
        (self.case / "loop").symlink_to("loop")
        os.chdir(self.case)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self.guard.watching = True
        try:
            yield
        finally:
            self.guard.watching = False


@contextlib.contextmanager
def alarm(again: bool) -> Iterator[None]:
    """Raise Hang after five seconds, and later, should it be lost in a callback. `again`: seconds of the processor."""

    def ring(_number: int, _frame: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_REAL, BUSY * PATIENCE if again else PATIENCE, 1.0)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def listing(*folders: Path) -> dict[str, tuple[int, int, int]]:
    """Size, time and mode of everything inside."""
    found = {}
    for folder in folders:
        for root, directories, files in os.walk(folder):
            for name in (*directories, *files):
                stat = os.lstat(os.path.join(root, name))
                found[os.path.join(root, name)] = (stat.st_size if name in files else 0, stat.st_mtime_ns, stat.st_mode)
    return found


def place(error: BaseException) -> str:
    """Where in the project it was raised."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "mlx_training/" in f.filename or "torch_backend/" in f.filename
    ]
    return "".join(
        f" < {Path(f.filename).parent.name}/{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-4:])
    )


def text_of(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]


def shown(case: Case) -> str:
    """The command, and the beginning of the spoilt file."""
    data = case.files.get(case.spoilt, b"")
    return f"{' '.join(case.argv)!r:.600}" + (f"\n      {case.spoilt} = {data[:800]!r}" if data else "")


def main() -> None:
    """Prepare the material, warm up, and run the cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name in ("seed", "cases", "first"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--scratch", type=Path, help="for temporary files")
    args = parser.parse_args()
    sys.modules["wandb"] = None  # type: ignore[assignment]  # it would start a service and write elsewhere
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    folder = args.folder.resolve()
    os.environ["TMPDIR"] = str((args.scratch or folder / "scratch").resolve())
    Path(os.environ["TMPDIR"]).mkdir(parents=True, exist_ok=True)
    (folder / "case").mkdir(parents=True)
    os.chdir(folder / "case")
    prepare(folder / "material", args.backend)
    with Path("/proc/self/statm").open() as file:
        held = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + SPARE_MEMORY, resource.RLIM_INFINITY))
    worker = Worker(folder, args.first, told)

    @seed(args.seed)
    @settings(
        max_examples=args.cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def test(case: Case) -> None:
        worker(case)

    # hypothesis of its own accord makes five near copies of every case, and takes values from imported sources.
    engine, provider = (f"hypothesis.internal.conjecture.{name}" for name in ("engine", "providers"))
    with (
        mock.patch(f"{engine}.ConjectureRunner.generate_mutations_from"),
        mock.patch(f"{provider}.HypothesisProvider._maybe_draw_constant", return_value=None),
    ):
        test()


if __name__ == "__main__":
    main()
