"""The tables of tools/bench.py: which work, which sides, how many steps, and what is aimed at."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmarks import material
from tools.benchmarks.costs import costs, share_of_peak
from tools.benchmarks.growth import growth
from tools.benchmarks.listing import Listing
from tools.benchmarks.lora import lora
from tools.benchmarks.measure import Measured, PeerError, compare
from tools.benchmarks.padding import padding
from tools.benchmarks.startup import CODE, startup

Sides = Mapping[str, tuple[str, Mapping[str, Any]]]
ROWS = {"num_rows": 16}
LARGE_VOCABULARY = 128256


@dataclass(frozen=True)
class Bench:
    """What a table may use."""

    folder: Path  # for models
    repetitions: int = 10
    steps: int = 2  # a repetition
    data: Path | None = None  # real data sets
    opentslm: str = ""  # a checkout
    backends: tuple[str, ...] = ("torch", "mlx")
    device: str = "cpu"

    @property
    def few(self) -> dict[str, Any]:
        """Fewer turns of one step, for what takes long."""
        return {"repetitions": min(self.repetitions, 3), "steps": 1, "warm_up": 1}

    def llm(self, **shape: int) -> str:
        """A random Llama of this shape; made once."""
        name = "-".join(f"{key}{value}" for key, value in shape.items()) or "tiny"
        return str(material.llama(self.folder / name, **shape))

    def trained(self, config: str) -> str:
        """A run of a configuration, trained until its answers are answers; made once."""
        run = self.folder / config
        if not (run / "result.json").is_file():
            changes = ["training.max_steps=150", "evaluation.every_steps=null", "dataset.num_samples_train=9600"]
            words = ["train", config, "--backend", self.backends[0], f"output_dir={run}", "--resume", "auto", *changes]
            subprocess.run([sys.executable, "-c", CODE, *words], check=True, stdout=subprocess.DEVNULL)
        return str(run)

    def tokens(self, vocab: int) -> str:
        """A file of random tokens."""
        import numpy as np

        file = self.folder / f"tokens{vocab}.npy"
        np.save(file, np.random.default_rng(0).integers(0, vocab, 200_000, dtype=np.int32))
        return str(file)

    def compare(self, work: str, sides: Sides, **changes: Any) -> Measured:
        """Interleaved; every row has been encoded (and every shape compiled) before the clock starts."""
        options = {"repetitions": self.repetitions, "steps": self.steps, "warm_up": 5} | changes
        measured = compare(work, sides, **options)
        print("\n".join(measured.lines()), flush=True)
        return measured


def opentslm(bench: Bench) -> list[Measured]:
    """The time-series LM's step against the reference's own, PyTorch both, batch 4, published encoder."""
    three, large = ROWS | {"num_series": 3}, bench.llm(vocab=LARGE_VOCABULARY)
    return [
        _against_opentslm(bench, "1 x 128", ROWS, "float32", ">= 1.8"),
        _against_opentslm(bench, "3 x 128", three, "float32", ">= 1.7"),
        _against_opentslm(bench, "1 x 128", ROWS, "bfloat16", ">= 1.2"),
        _against_opentslm(bench, "3 x 128", three, "bfloat16", ">= 1.2", **bench.few),
        _against_opentslm(
            bench, "1 x 128, vocabulary 128,256", ROWS, "bfloat16", ">= 6; memory <= 0.5", llm=large, **bench.few
        ),
    ]


def opentslm_long(bench: Bench) -> list[Measured]:
    """The same with 12 series of 1,000 samples, where a step of the reference takes ten minutes."""
    rows = {"num_rows": 4, "num_series": 12, "samples": 1000}
    return [
        _against_opentslm(bench, "12 x 1,000", rows, "bfloat16", ">= 3; memory <= 0.35", **bench.few | {"warm_up": 0})
    ]


def _against_opentslm(
    bench: Bench, work: str, rows: dict[str, Any], precision: str, target: str, *, llm: str = "", **changes: Any
) -> Measured:
    shared = {"llm": llm or bench.llm(), "rows": rows, "precision": precision}
    sides = {
        "ours (torch)": ("ours:timeseries", shared),
        "OpenTSLM": ("opentslm:timeseries", shared | {"checkout": bench.opentslm}),
    }
    return bench.compare(f"{work}, LM in {precision} on both sides", sides, target=target, **changes)


def instruction(bench: Bench) -> list[Measured]:
    """A constant instruction of 200 tokens before the series: kept, read anew, and with gradients."""
    rows = ROWS | {"instruction": 120}
    found = []
    for backend in bench.backends:
        shared = {"llm": bench.llm(), "rows": rows, "backend": backend}
        sides = {
            f"frozen_prefix: {setting} ({backend})": ("ours:timeseries", shared | {"frozen_prefix": setting})
            for setting in ("reuse", "compute", "off")
        }
        found.append(bench.compare("1 x 128, instruction of 200 tokens", sides, target="off >= 1.5"))
    return found


def limit(bench: Bench) -> list[Measured]:
    """Ours against the hand-written loop with the same levers, on the same batches (equal losses prove it)."""
    rows, large = {"llm": bench.llm(), "rows": ROWS}, {"vocab": LARGE_VOCABULARY}
    texts = {"file": "", "num_rows": 32, "held_out": 1}
    adapters = {"llm": bench.llm(), "texts": texts, "rank": 8, "alpha": 16, "rate": 3e-3}
    works: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "1 x 128, float32": (rows, {}),
        "1 x 128, instruction of 200 tokens, float32": (rows | {"rows": ROWS | {"instruction": 120}}, {}),
        "3 x 128, float32": (rows | {"rows": ROWS | {"num_series": 3}}, {}),
        "1 x 128, LM in bfloat16": (rows | {"precision": "bfloat16"}, bench.few),
        "1 x 128, vocabulary 128,256, float32": (rows | {"llm": bench.llm(**large)}, bench.few),
        "LoRA on ragged text, float32": (adapters, {"steps": 8, "warm_up": 8}),
    }
    found = []
    for backend in bench.backends:
        for name, (options, changes) in works.items():
            loop, ours = ("_lora:lora", "lora_steps") if "texts" in options else (":timeseries", "timeseries")
            sides = {
                f"hand-written loop ({backend})": (f"loop_{backend}{loop}", options),
                f"ours ({backend})": (f"ours:{ours}", options | {"backend": backend}),
            }
            found.append(bench.compare(name, sides, target="<= 1.05", **changes))
    return found


def levers(bench: Bench) -> list[Measured]:
    """A step of the time-series LM as it is by default, and without one lever (or with one more); the LM has 4 bits."""
    found = []
    for backend in bench.backends:
        shared = {"llm": bench.llm(bits=4), "rows": ROWS, "backend": backend}
        without: dict[str, dict[str, Any]] = {
            "all levers": {},
            "trim_last_layer: false": {"trim_last_layer": False},
            "frozen_prefix: off": {"frozen_prefix": "off"},
            "llm_weights: resident": {"weights": "resident"},
            "rows encoded for every batch": {"keeps_rows": False},
            "gradient_checkpointing: true": {"gradient_checkpointing": True},
        }
        if backend == "mlx":
            without["compile: off"] = {"compile": "off"}
        sides = {f"{name} ({backend})": ("ours:timeseries", shared | change) for name, change in without.items()}
        found.append(bench.compare("1 x 128, 4-bit LM", sides, target=">= 1"))
        many = shared | {"rows": {"num_rows": 4, "num_series": 12, "samples": 400}}
        sides = {
            f"{name} ({backend})": ("ours:timeseries", many | change)
            for name, change in {"all levers": {}, "chunked_encoder: false": {"chunked_encoder": False}}.items()
        }
        found.append(bench.compare("12 x 400, 4-bit LM", sides, target=">= 1", **bench.few))
    return found


def pretraining(bench: Bench) -> list[Measured]:
    """A decoder from scratch: mingpt's shape (384 x 6, context 256), vocabulary 4,096, batch 4."""
    shared = {"preset": "mingpt", "tokens": bench.tokens(4096), "vocab": 4096, "batch_size": 4}
    sides = {"ours (torch)": ("ours:decoder", shared), "nanoGPT-style loop": ("nanogpt:decoder", shared)}
    return [bench.compare("mingpt, float32", sides, target=">= 0.97", warm_up=2)]


def packing(bench: Bench) -> list[Measured]:
    """Windows of a stream, and whole documents (of 20 to 500 tokens) that do not see each other: context 1,024."""
    shared = {"preset": "mingpt", "tokens": bench.tokens(4096), "vocab": 4096, "batch_size": 4, "context_length": 1024}
    found = []
    for backend in bench.backends:
        sides = {
            f"packing: {name} ({backend})": ("ours:decoder", shared | {"backend": backend, "documents": documents})
            for name, documents in {"documents": True, "windows": False}.items()
        }
        found.append(
            bench.compare("mingpt with a context of 1,024, float32", sides, target="windows >= 1", **bench.few)
        )
    return found


def head(bench: Bench) -> list[Measured]:
    """Logits all at once and in chunks: mainrun's shape (256 x 6, context 256), vocabulary 16,000, batch 32."""
    shared = {"preset": "mainrun", "tokens": bench.tokens(16_000), "vocab": 16_000, "batch_size": 32}
    found = []
    for backend in bench.backends:
        sides = {
            f"chunked_head: {str(chunked).lower()} ({backend})": (
                "ours:decoder", shared | {"backend": backend, "chunked_head": chunked}
            )
            for chunked in (False, True)
        }  # fmt: skip
        found.append(bench.compare("mainrun, float32", sides, target="memory <= 0.6", **bench.few))
    return found


def generation(bench: Bench) -> list[Measured]:
    """Evaluation by generation, in batches and one by one: a trained quick_test, and 16 answers of 128 tokens.

    Nothing can be faster than what reading the prompts takes: products, attention and activations of the frozen LM.
    """
    found = []
    changes = {"repetitions": min(bench.repetitions, 3), "steps": 1, "target": "one by one >= 5"}
    for backend in bench.backends:
        short = {"run": bench.trained("quick_test"), "backend": backend}
        sides: dict[str, tuple[str, dict[str, Any]]] = {
            f"batches of 64 ({backend})": ("ours:evaluation", short | {"batch_size": 64}),
            f"one by one ({backend})": ("ours:evaluation", short | {"batch_size": 1}),
            f"reading alone, batches of 64 ({backend})": ("reading:kernels", short | {"batch_size": 64}),
        }
        found.append(bench.compare("quick_test, 1,000 answers of a word or two", sides, warm_up=1, **changes))
        long = {"llm": bench.llm(), "rows": {"num_rows": 16}, "new_tokens": 128, "backend": backend}
        sides = {
            f"{name} ({backend})": ("ours:reasoning", long | {"batch_size": rows})
            for name, rows in (("batches of 16", 16), ("one by one", 1))
        }
        found.append(bench.compare("16 answers of 128 tokens", sides, warm_up=0, **changes))
    return found


def cuda(bench: Bench) -> list[Measured | Listing]:
    """The 1B shape on one NVIDIA GPU in bfloat16, 32 rows of about 512 places: against a compiled hand-written loop.

    Ours compiles there too, by its default.
    """
    try:
        import torch
    except ImportError as error:
        raise PeerError("PyTorch is not installed") from error
    if not torch.cuda.is_available():  # before 2 GB of weights are drawn
        raise PeerError("PyTorch finds no CUDA device here; the other tables are for the CPU")
    llm = bench.llm(hidden=2048, layers=16, vocab=LARGE_VOCABULARY, head_dim=64)
    rows = {"num_rows": 128, "samples": 1600, "question": 40}
    shared = {"llm": llm, "rows": rows, "batch_size": 32, "precision": "bfloat16", "device": "cuda", "fixed": True}
    sides = {
        "hand-written loop (torch.compile)": ("loop_torch:timeseries", shared | {"compile": True}),
        "ours (torch)": ("ours:timeseries", shared),
    }
    changes = {"steps": 10, "warm_up": 20, "target": "<= 1.05", "quantity": "wall"}
    measured = bench.compare("1B shape, bfloat16, CUDA", sides, **changes)
    return [measured, share_of_peak(measured, Path(llm), rows, 32)]


def smoke(bench: Bench) -> list[Measured]:
    """The smallest comparison, for CI."""
    backend = bench.backends[0]
    shared = {"llm": bench.llm(hidden=128, layers=1), "rows": {"num_rows": 4}, "fixed": True}
    sides = {
        f"hand-written loop ({backend})": (f"loop_{backend}:timeseries", shared),
        f"ours ({backend})": ("ours:timeseries", shared | {"backend": backend}),
    }
    return [bench.compare("smoke", sides, repetitions=1, steps=1, warm_up=0)]


Table = Callable[[Bench], list[Any]]
CPU: dict[str, Table] = {
    "opentslm": opentslm,
    "opentslm_long": opentslm_long,
    "instruction": instruction,
    "limit": limit,
    "levers": levers,
    "pretraining": pretraining,
    "packing": packing,
    "head": head,
    "padding": padding,
    "lora": lora,
    "generation": generation,
    "growth": growth,
    "costs": costs,
    "startup": startup,
}
TABLES: dict[str, Table] = CPU | {"cuda": cuda, "smoke": smoke}


def installed() -> tuple[str, ...]:
    """The backends of this machine, PyTorch first."""
    from mlx_training.environment import installed_backends

    found = installed_backends()
    if not found:
        sys.exit("neither torch nor mlx is installed")
    return tuple(sorted(found, reverse=True))
