"""The flags of each verb: one function a verb, which adds them to a parser."""

import argparse
from pathlib import Path

BACKENDS = ("mlx", "torch", "auto")
DEVICES = ("auto", "cpu", "gpu", "cuda", "mps")


def config(parser: argparse.ArgumentParser) -> None:
    """A configuration and overrides."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the name of a shipped one (see `ls`)")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="values laid over it, spelled as in the YAML: training.max_steps=100",
    )


def train(parser: argparse.ArgumentParser) -> None:
    """`train`."""
    config(parser)
    _backend(parser, "the configuration's")
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue: auto = the newest checkpoint in output_dir, if any; or a checkpoint, or a run",
    )
    parser.add_argument(
        "--allow-change",
        metavar="KEY",
        action="append",
        default=[],
        help="with --resume: continue although this key of the configuration changed; may be repeated",
    )


def evaluate(parser: argparse.ArgumentParser) -> None:
    """`evaluate`."""
    _run(parser)
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--split", choices=("train", "validation", "test"), help="default: evaluation.test_split")
    rows.add_argument(
        "--data", metavar="FILE", type=Path, help="evaluate every row (or the text) of this file; no split is applied"
    )
    _checkpoint(parser)
    text = parser.add_argument_group("language models")
    text.add_argument(
        "--protocol",
        choices=("windows", "sliding", "lines", "position"),
        help="windows: as in training (default); sliding: every token once, with as much context as fits; lines: each "
        "line alone, without BOS; position: windows, and the loss at each place",
    )
    text.add_argument(
        "--context-length", metavar="N", type=int, help="windows, sliding, position: tokens seen; default: the run's"
    )
    text.add_argument(
        "--stride", metavar="N", type=int, help="sliding: tokens from one window to the next; default: half the context"
    )
    text.add_argument("--max-lines", metavar="N", type=int, help="lines: the first N that are not blank; default: 100")
    text.add_argument("--max-tokens", metavar="N", type=int, help="lines: each is cut to N tokens; default: 512")
    _backend(parser, "the run's")
    _device(parser)


def generate(parser: argparse.ArgumentParser) -> None:
    """`generate`."""
    _run(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", action="append", help="text to continue; may be repeated")
    source.add_argument("--prompts", metavar="FILE", type=Path, help="texts to continue, one a line")
    source.add_argument("--rows", metavar="FILE", type=Path, help="rows about series to answer, .jsonl or .parquet")
    how = parser.add_argument_group("sampling", "Filters act in this order; what is drawn depends on the seed alone.")
    how.add_argument(
        "--repetition-penalty",
        metavar="X",
        type=float,
        help="divide the logits of tokens that are there already by X (below 0: multiply)",
    )
    how.add_argument("--temperature", metavar="T", type=float, help="default: 0, the most probable token")
    how.add_argument("--top-k", metavar="K", type=int, help="only the K most probable tokens")
    how.add_argument("--top-p", metavar="P", type=float, help="only the fewest tokens with this probability together")
    how.add_argument("--min-p", metavar="P", type=float, help="only tokens P times as probable as the first, or more")
    how.add_argument("--seed", metavar="N", type=int, help="default: 0")
    how.add_argument("--samples", metavar="N", type=int, default=1, help="continuations of each prompt; default: 1")
    how.add_argument(
        "--max-new-tokens", metavar="N", type=int, help="default: 128; of --rows: evaluation.max_new_tokens"
    )
    how.add_argument(
        "--stop", metavar="TEXT", action="append", help="end before this text would appear; may be repeated"
    )
    _checkpoint(parser)
    _backend(parser, "the run's")
    _device(parser)


def doctor(parser: argparse.ArgumentParser) -> None:
    """`doctor`."""
    parser.add_argument("config", metavar="CONFIG|RUN", help="YAML file, shipped name, or directory of a training run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values laid over the configuration")
    parser.add_argument("--backend", choices=("mlx", "torch", "both"), help="default: the configuration's")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", dest="full", action="store_false", default=False, help="what takes seconds (default)")
    level.add_argument("--full", action="store_true", help="also resume, MLX = PyTorch, more rows and more steps")


def with_backend(parser: argparse.ArgumentParser) -> None:
    """`plan` and `validate`."""
    config(parser)
    _backend(parser, "the configuration's")


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a training run (its output_dir)")


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint", metavar="best|latest|step_...|PATH", help="default: the best, else the latest of the run"
    )
    which.add_argument("--every-checkpoint", action="store_true", help="each that the run has kept, side by side")


def _backend(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--backend", choices=BACKENDS, help=f"default: {default}")


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, help="default: the run's; a run may be read on another machine")


def none(parser: argparse.ArgumentParser) -> None:
    """No flags of its own."""


def checkpoint_ls(parser: argparse.ArgumentParser) -> None:
    """`checkpoint ls`."""
    _run(parser)


def checkpoint_verify(parser: argparse.ArgumentParser) -> None:
    """`checkpoint verify`."""
    parser.add_argument("path", metavar="RUN|CHECKPOINT", type=Path, help="run, or RUN/checkpoints/step_...")


def checkpoint_diff(parser: argparse.ArgumentParser) -> None:
    """`checkpoint diff`."""
    for side in "ab":
        text = "run (its best checkpoint, else its latest), or RUN/checkpoints/step_..."
        parser.add_argument(side, metavar=side.upper(), type=Path, help=text)


def checkpoint_export(parser: argparse.ArgumentParser) -> None:
    """`checkpoint export`."""
    _run(parser)
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="directory to make; absent or empty")
    parser.add_argument(
        "--format",
        choices=("hf", "mlx", "peft", "mlx-lm", "run", "opentslm"),
        required=True,
        help="hf: Hugging Face directory, float32 (decoder, ssm); mlx: quantised (decoder); adapters are merged "
        "into their base; peft, mlx-lm: adapters alone; run: those on a decoder, merged, as a run; opentslm: "
        "model_checkpoint.pt (time-series runs)",
    )
    parser.add_argument("--bits", type=int, choices=(4, 8), help="of --format mlx; default: those of the base, else 4")
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), help="of --format mlx; default: that of the base, else 64"
    )


def checkpoint_import(parser: argparse.ArgumentParser) -> None:
    """`checkpoint import`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory in Hugging Face's format (gpt2, llama, mistral, qwen3, mamba), or hub id",
    )
    parser.add_argument("--to", metavar="RUN", type=Path, required=True, help="run directory to make")
