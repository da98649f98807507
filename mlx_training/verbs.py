"""What each command does: parsed arguments -> a result. Everything heavy is imported inside."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_training.errors import CheckpointError, DataError, UserError

if TYPE_CHECKING:
    from mlx_training.protocols import Protocol

Result = dict[str, Any]


def train(args: argparse.Namespace) -> Result:
    """Train a configuration."""
    from mlx_training.config import load_config
    from mlx_training.trainer import train as train_configuration

    config = load_config(args.config, _overrides(args))
    result = train_configuration(config, resume=args.resume, allow_change=args.allow_change)
    if not result:
        sys.exit(0)  # process 0 of this job prints the result
    return result


def evaluate(args: argparse.Namespace) -> Result:
    """Evaluate a run: one checkpoint, or every one that it has kept."""
    _expect_run(args.run)
    _expect_file("--data", args.data, "the file of rows, or of text, to evaluate")
    from mlx_training.evaluate import evaluate_run
    from mlx_training.every_checkpoint import evaluate_checkpoints

    where = {"split": args.split, "data": args.data, "backend": args.backend, "device": args.device}
    where["protocol"] = _protocol(args)
    if args.every_checkpoint:
        return evaluate_checkpoints(args.run, **where)
    return evaluate_run(args.run, checkpoint=args.checkpoint, **where)


def generate(args: argparse.Namespace) -> Result:
    """Continue prompts, or answer the rows of a file."""
    _expect_run(args.run)
    _expect_file("--rows", args.rows, "one of rows, in the run's own format or canonical")
    _expect_file("--prompts", args.prompts, "a text file with one prompt a line")
    if args.rows is not None:
        return _generate_rows(args)
    from mlx_training.every_checkpoint import generate_at_checkpoints
    from mlx_training.generate import generate_texts, on_terminal, read_prompts
    from mlx_training.sampling import Sampling

    prompts = args.prompt or read_prompts(args.prompts)
    how = {
        "backend": args.backend,
        "device": args.device,
        "sampling": Sampling(**_sampling(args)),
        "samples": args.samples,
    }
    if args.every_checkpoint:
        return generate_at_checkpoints(args.run, prompts, **how)
    watch = on_terminal(prompts, args.samples)
    return generate_texts(args.run, prompts, checkpoint=args.checkpoint, watch=watch, **how)


def validate(args: argparse.Namespace) -> Result:
    """Check a configuration and its files."""
    from mlx_training.assemble import validate as validate_configuration
    from mlx_training.config import load_config

    return validate_configuration(load_config(args.config, _overrides(args)))


def doctor(args: argparse.Namespace) -> Result:
    """Examine a configuration or a run, on one backend or on both; findings are printed as they are made."""
    from mlx_training.config import load_config
    from mlx_training.diagnostics import doctor as diagnostics
    from mlx_training.environment import installed_backends
    from mlx_training.memory import examining_advice, full_memory_explained

    names = list(installed_backends()) if args.backend == "both" else [args.backend]
    is_run = Path(args.config).is_dir()
    if is_run and args.overrides:
        raise UserError(f"doctor {args.config}: a run keeps its configuration; leave {' '.join(args.overrides)} out")
    reports = []
    for name in names:
        if len(names) > 1:
            print(f"--- {name}", flush=True)
        with full_memory_explained(examining_advice):
            if is_run:
                report = diagnostics.examine_run(Path(args.config), name, full=args.full, watch=print)
            else:
                config = load_config(args.config, args.overrides)
                report = diagnostics.examine_config(config, name, full=args.full, watch=print)
        reports.append(report.to_json())
    if len(reports) == 1:
        return reports[0]
    cause = next((report["cause"] for report in reports if report["cause"]), None)
    return {"healthy": all(report["healthy"] for report in reports), "cause": cause, "reports": reports}


def plan(args: argparse.Namespace) -> Result:
    """What a configuration costs."""
    from mlx_training.config import load_config
    from mlx_training.diagnostics import plan as plans

    return plans.plan(load_config(args.config, _overrides(args)))


def checkpoint_ls(args: argparse.Namespace) -> Result:
    """A run's checkpoints."""
    _expect_run(args.run)
    from mlx_training.checkpoint_tools import list_checkpoints

    return list_checkpoints(args.run)


def checkpoint_verify(args: argparse.Namespace) -> Result:
    """Sums and shapes."""
    _expect_run(args.path, "RUN|CHECKPOINT")
    from mlx_training.checkpoint_tools import verify_checkpoints

    return verify_checkpoints(args.path)


def checkpoint_diff(args: argparse.Namespace) -> Result:
    """What differs between two."""
    _expect_run(args.a, "A")
    _expect_run(args.b, "B")
    from mlx_training.checkpoint_tools import diff

    return diff(args.a, args.b)


def checkpoint_export(args: argparse.Namespace) -> Result:
    """A run in another format."""
    _expect_run(args.run)
    from mlx_training.export import export_run

    written = export_run(args.run, args.to, args.format, args.bits, args.group_size)
    return {"run": str(args.run), "to": str(args.to), "format": args.format, "written": written}


def checkpoint_import(args: argparse.Namespace) -> Result:
    """A model in Hugging Face's format as a run."""
    from mlx_training.import_run import import_run

    return import_run(args.model, args.to)


def env(args: argparse.Namespace) -> Result:
    """What this machine has."""
    from mlx_training.environment import report

    return report()


def ls(args: argparse.Namespace) -> Result:
    """The shipped configurations."""
    from mlx_training.configs import description, shipped_configs

    return {
        "configs": [
            {"name": name, "path": str(path), "description": description(path)}
            for name, path in shipped_configs().items()
        ]
    }


def schema(args: argparse.Namespace) -> Result:
    """JSON Schema of a configuration."""
    from mlx_training.config import json_schema

    return json_schema()


def _generate_rows(args: argparse.Namespace) -> Result:
    if args.every_checkpoint or args.samples != 1:
        raise UserError("--rows: one answer a row; --every-checkpoint and --samples go with prompts")
    from mlx_training.generate import generate_rows

    where = {"backend": args.backend, "device": args.device, "checkpoint": args.checkpoint}
    return generate_rows(args.run, args.rows, **where, sampling=_sampling(args))


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Those of Sampling's fields that were given."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_new_tokens")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return given | ({"stop": tuple(args.stop)} if args.stop else {})


def _protocol(args: argparse.Namespace) -> "Protocol | None":
    """The protocol that flags ask for, if any does."""
    from mlx_training.protocols import Protocol

    names = ("context_length", "stride", "max_lines", "max_tokens")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return Protocol(args.protocol or "windows", **given) if args.protocol or given else None


def _overrides(args: argparse.Namespace) -> list[str]:
    backend = getattr(args, "backend", None)
    return [*args.overrides, *([f"backend={backend}"] if backend else [])]


def _expect_run(run: Path, name: str = "RUN") -> None:
    if not run.is_dir():
        hint = " or a checkpoint of it" if name != "RUN" else ""
        raise CheckpointError(f"{name} {str(run)!r} is not a directory; give the output_dir of a training run{hint}")


def _expect_file(flag: str, path: Path | None, what: str) -> None:
    if path is not None and not path.is_file():
        raise DataError(f"{flag} {str(path)!r} is not a file; give {what}")
