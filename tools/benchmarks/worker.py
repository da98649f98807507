"""One side of a comparison in a process of its own, so that its memory and its CPU seconds are its own.

A side is a function "MODULE:FUNCTION" of this package; called with its options it returns `run(steps)`, which takes so
many steps and says {"tokens": tokens a step that count, "loss": of the last step}.
"""

import contextlib
import importlib
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

Run = Callable[[int], dict[str, float]]


class Absent(Exception):
    """What a side needs is not installed; says what."""


def peak_memory() -> int:
    """Peak bytes: of the CUDA device where one is in use, else of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(connection: Connection, function: str, options: Mapping[str, Any]) -> None:
    """Build the side and answer every number of steps with a sample; what peers print goes nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            module, name = function.split(":")
            run: Run = getattr(importlib.import_module(f"tools.benchmarks.{module}"), name)(**options)
            connection.send({"ready": True})
            while steps := connection.recv():
                cpu, wall = time.process_time(), time.perf_counter()
                found = run(steps)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                connection.send({"cpu": cpu / steps, "wall": wall / steps, "peak": peak_memory()} | found)
            connection.send({"loss": run.loss()} if hasattr(run, "loss") else {})
        except Absent as absent:
            connection.send({"absent": str(absent)})
        except Exception:  # noqa: BLE001  # whatever it is, the other process tells it
            connection.send({"failed": traceback.format_exc()[-3000:]})
