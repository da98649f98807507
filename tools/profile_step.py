"""Where the time of a step goes: by phase, against what the machine can do, and what to do about the largest.

    python tools/profile_step.py CONFIG [--backend mlx|torch] [--steps 20] [--json] [key=value ...]
    python tools/profile_step.py quick_test --plot phases.png --trace trace.json

`--trace` also records a few steps with the framework's own profiler: PyTorch writes a trace for chrome://tracing or
https://ui.perfetto.dev, MLX on Metal a .gputrace for Xcode (start Python with MTL_CAPTURE_ENABLED=1).
"""

import argparse
import json
import sys
from pathlib import Path

from mlx_training.config import load_config
from mlx_training.diagnostics.profile import full_subject, plot, profile_subject, show, take_steps
from mlx_training.diagnostics.subject import Subject
from mlx_training.errors import BackendError, UserError

TRACED_STEPS = 3


def trace(subject: Subject, path: Path) -> None:
    """Record a few steps with the framework's own profiler. Raises BackendError where it has none."""
    if subject.backend.name == "torch":
        import torch

        with torch.profiler.profile(record_shapes=True) as profiler:
            take_steps(subject, TRACED_STEPS)
        profiler.export_chrome_trace(str(path))
        return
    import mlx.core as mx

    if not mx.metal.is_available():
        raise BackendError("--trace: MLX has a profiler of its own on Metal only; on this device use --backend torch")
    mx.metal.start_capture(str(path))
    try:
        take_steps(subject, TRACED_STEPS)
    finally:
        mx.metal.stop_capture()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a shipped one")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--backend", choices=("mlx", "torch", "auto"), help="default: the configuration's")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed (default 20)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="record the framework's own profile")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="draw the phases")
    given = parser.parse_intermixed_args(argv)
    if given.steps < 1:
        parser.error(f"--steps {given.steps}: at least 1")
    try:
        subject = full_subject(load_config(given.config, given.overrides), given.backend)
        report = profile_subject(subject, num_steps=given.steps)
        print(json.dumps(report) if given.json else show(report), flush=True)
        if given.plot:
            plot(report, given.plot)
        if given.trace:
            trace(subject, given.trace)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
