"""The command line: `mlx-training VERB ...`. Verbs are in one table; everything heavy is imported inside a verb."""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from mlx_training import __version__, flags, verbs
from mlx_training.errors import DataError, Interrupted, UserError, shortened
from mlx_training.verbs import Result

BROKEN_PIPE = 141  # what a shell says of a program that SIGPIPE ended; only where the work was not done
CHECKPOINT = "checkpoint"  # what the names of some verbs begin with


@dataclass(frozen=True)
class Verb:
    """One command: its help, its flags, what it does, and how its result is shown to a person."""

    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Result]
    show: Callable[[Result], str]
    exit_code: Callable[[Result], int] = lambda result: 0


def _show_tree(result: Any, indent: str = "") -> str:
    """Nested mappings as indented `key: value` lines."""
    lines = []
    for key, value in result.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", _show_tree(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {f'{value:.4g}' if isinstance(value, float) else value}")
    return "\n".join(lines)


def _show_doctor(result: Result) -> str:
    return "\n".join(report["summary"] for report in result.get("reports", [result]))


def _show_plan(result: Result) -> str:
    from mlx_training.diagnostics.plan import show

    return show(result)


def _show_checkpoint(name: str) -> Callable[[Result], str]:
    def show(result: Result) -> str:
        from mlx_training import checkpoint_text

        return getattr(checkpoint_text, f"show_{name}")(result)

    return show


def _show_evaluation(result: Result) -> str:
    from mlx_training.every_checkpoint import show_evaluations

    return show_evaluations(result) if "checkpoints" in result else _show_tree(result)


def _show_generation(result: Result) -> str:
    from mlx_training.every_checkpoint import show_generations
    from mlx_training.generate import show

    return show_generations(result) if "checkpoints" in result else show(result)


def _show_configs(result: Result) -> str:
    width = max(len(config["name"]) for config in result["configs"])
    return "\n".join(f"{config['name']:{width}}  {config['description']}" for config in result["configs"])


def _show_schema(result: Result) -> str:
    return json.dumps(result, indent=2)


VERBS: dict[str, Verb] = {
    "train": Verb(
        "train a model from one YAML, evaluate it, and keep its best checkpoint",
        "mlx-training train quick_test training.max_steps=200 --backend torch",
        flags.train,
        verbs.train,
        _show_tree,
    ),
    "evaluate": Verb(
        "accuracy of a trained run beside chance, or loss and perplexity of a language model",
        "mlx-training evaluate runs/quick_test --split test",
        flags.evaluate,
        verbs.evaluate,
        _show_evaluation,
    ),
    "generate": Verb(
        "continue prompts with a language model, or answer every row of a file",
        'mlx-training generate runs/lm --prompt "Once upon" --temperature 0.8 --top-p 0.95',
        flags.generate,
        verbs.generate,
        _show_generation,
    ),
    "validate": Verb(
        "check a configuration and the files it names, without training",
        "mlx-training validate timeseries/har dataset.path=har.npz",
        flags.with_backend,
        verbs.validate,
        _show_tree,
    ),
    "doctor": Verb(
        "name the cause of zero, exploding or NaN gradients, wrong data and slow steps",
        "mlx-training doctor quick_test --backend both",
        flags.doctor,
        verbs.doctor,
        _show_doctor,
        lambda result: 0 if result["healthy"] else 1,
    ),
    "plan": Verb(
        "parameters, FLOPs, memory and time of a configuration, before anything is built",
        "mlx-training plan timeseries/llama_3_2_1b",
        flags.with_backend,
        verbs.plan,
        _show_plan,
    ),
    "checkpoint ls": Verb(
        "the checkpoints of a run: step, size, when, latest and best, complete or not",
        "mlx-training checkpoint ls runs/quick_test",
        flags.checkpoint_ls,
        verbs.checkpoint_ls,
        _show_checkpoint("list"),
    ),
    "checkpoint verify": Verb(
        "check every SHA-256 sum and shape; exit code 3 when anything is damaged",
        "mlx-training checkpoint verify runs/quick_test --json",
        flags.checkpoint_verify,
        verbs.checkpoint_verify,
        _show_checkpoint("verify"),
        lambda result: 0 if result["ok"] else 3,
    ),
    "checkpoint diff": Verb(
        "compare two checkpoints or runs: parameters, moments, settings",
        "mlx-training checkpoint diff runs/a runs/b",
        flags.checkpoint_diff,
        verbs.checkpoint_diff,
        _show_checkpoint("diff"),
    ),
    "checkpoint export": Verb(
        "write a run for Hugging Face, quantised for MLX, or as OpenTSLM's file",
        "mlx-training checkpoint export runs/lm --to lm-4bit --format mlx --bits 4",
        flags.checkpoint_export,
        verbs.checkpoint_export,
        _show_tree,
    ),
    "checkpoint import": Verb(
        "make a run of a Hugging Face model: GPT-2, Llama, Mistral, Qwen3 or Mamba",
        "mlx-training checkpoint import ./gpt2 --to runs/gpt2",
        flags.checkpoint_import,
        verbs.checkpoint_import,
        _show_tree,
    ),
    "env": Verb(
        "backends, devices and versions on this machine",
        "mlx-training env --json",
        flags.none,
        verbs.env,
        _show_tree,
    ),
    "ls": Verb("the shipped configurations", "mlx-training ls", flags.none, verbs.ls, _show_configs),
    "schema": Verb(
        "JSON Schema of a configuration, for editors",
        "mlx-training schema > config.schema.json",
        flags.none,
        verbs.schema,
        _show_schema,
    ),
}


def usage() -> str:
    """What `mlx-training --help` prints."""
    table = "\n".join(f"  {name:17} {verb.summary}" for name, verb in VERBS.items())
    examples = "\n".join(f"  {VERBS[name].example}" for name in ("train", "evaluate", "doctor", "plan"))
    return f"""usage: mlx-training VERB ... [--json]

Train time-series language models and small language models, on MLX or PyTorch, from one YAML.

verbs:
{table}

examples:
{examples}

`mlx-training VERB --help` explains a verb. With --json the last line of stdout is one JSON object.
Exit codes: 0 fine, 1 the doctor found a fault, 2 configuration, 3 data or checkpoint, 4 diverged,
5 out of memory, 6 another process of the job is gone, 130/143 interrupted.
"""


def parse(argv: Sequence[str]) -> tuple[Verb, argparse.Namespace]:
    """The verb and its arguments; overrides may stand before or after flags. Exits with 2 on a usage error."""
    words = 2 if argv[0] == CHECKPOINT else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in VERBS:
        known = [verb for verb in VERBS if words == 1 or verb.startswith(CHECKPOINT)]
        close = get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown verb {name!r}; the verbs are {', '.join(known)}{hint}")
    verb = VERBS[name]
    parser = argparse.ArgumentParser(
        prog=f"mlx-training {name}",
        description=verb.summary[0].upper() + verb.summary[1:] + ".",
        epilog=f"example: {verb.example}",
    )
    verb.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    return verb, parser.parse_intermixed_args(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors of the user's making are one message on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help") or [*argv] in ([CHECKPOINT, flag] for flag in ("-h", "--help")):
        print(usage(), end="")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"mlx-training {__version__}")
        return 0
    result: Result | None = None
    try:
        verb, args = parse(argv)
        if args.json:
            with contextlib.redirect_stdout(sys.stderr):  # progress must not come between a caller and the result
                result = verb.run(args)
            print(json.dumps(_jsonable(result), ensure_ascii=False, allow_nan=False), flush=True)
        else:
            result = verb.run(args)
            print(verb.show(result), flush=True)
        return verb.exit_code(result)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as interruption:
        print(f"interrupted: {interruption}", file=sys.stderr)
        return interruption.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone, as in `| head`
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return BROKEN_PIPE if result is None else 0
    except OSError as error:
        if error.filename is None:
            raise
        print(shortened(f"error: {error.filename}: {error.strerror}"), file=sys.stderr)
        return DataError.exit_code


def _jsonable(value: Any) -> Any:
    """Plain JSON values: paths as text, NumPy scalars as numbers, and null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
