"""Gradient, weight and update norms of every parameter and module, in scientific notation.

    python tools/grad_norms.py CONFIG [--steps 1] [--backend mlx|torch] [key=value ...]
    python tools/grad_norms.py RUN
    both: [--jsonl FILE] [--heatmap FILE.png]

For a configuration: takes that many steps on its real model and data and prints what each did. For the directory of a
run trained with diagnostics.probe_every_steps: prints its last record and draws all of them (RUN/gradients.png).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_training.config import load_config
from mlx_training.diagnostics import norms
from mlx_training.diagnostics.subject import from_config
from mlx_training.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or that of what is wrong with the configuration or its data."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subject", metavar="CONFIG|RUN")
    parser.add_argument(
        "--steps", type=int, default=1, help="optimiser steps to take, each of them probed (default: 1)"
    )
    parser.add_argument("--backend", choices=("mlx", "torch"), help="instead of the configured one")
    parser.add_argument("--jsonl", type=Path, help="write the records there")
    parser.add_argument("--heatmap", type=Path, help="draw a PNG there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, as for train")
    args = parser.parse_intermixed_args(argv)
    try:
        of_a_run = of_run(Path(args.subject))
        records = of_a_run or of_config(args.subject, args.overrides, args.steps, args.backend)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(norms.table(records[-1:] if of_a_run else records))
    if args.jsonl:
        norms.write_records(records, args.jsonl)
    if picture := args.heatmap or (Path(args.subject) / "gradients.png" if of_a_run else None):
        norms.heat_map(records, picture)
        print(f"\n{picture}")
    return 0


def of_run(run: Path) -> list[norms.Record]:
    """What a run has probed; nothing if this is no run directory. Raises UserError where a run has not probed."""
    if not (run / "config.yaml").is_file():
        return []
    records = norms.read_records(run / norms.FILE) if (run / norms.FILE).is_file() else []
    if not records:
        raise UserError(f"{run} has no {norms.FILE}: train it with diagnostics.probe_every_steps=N")
    return records


def of_config(name: str, overrides: Sequence[str], steps: int, backend: str | None) -> list[norms.Record]:
    """The first steps of a configuration, on its own batches."""
    config = load_config(name, overrides)
    subject = from_config(config, backend, max_rows=config.training.batch_size)
    accumulation = subject.accumulation
    return norms.take_steps(
        subject.new_step(), subject.batch, subject.rates, subject.spec, steps=steps, accumulation=accumulation
    )


if __name__ == "__main__":
    sys.exit(main())
