"""One run, four legs: MLX, torch, MLX, torch. It must be the run that either backend makes alone, moments included.

A decoder, one with every sparse mixer, sinks and experts, an LSTM, all state-space mixers, a convolution over three
tokens, an encoder and projector before the packaged 4-bit Llama, and DoRA on that Llama, with gradient accumulation and
without dropout.
Each leg is the real command with `--resume auto`. The legs end in two ways. Shorter runs: `training.max_steps` is
raised from leg to leg, at a constant rate. Signals: SIGTERM comes in the last step of a leg, under a cosine schedule
with warm-up over all four. The backends change inside an epoch.

Demanded, against each backend alone: every loss and every evaluation, the final report's too, within 1e-4 (relative
above 1); every parameter (‖a - b‖ / ‖b‖ of each array, and its largest element) and each moment (‖a - b‖ / ‖b‖ over all
parameters) within 1e-4; and exactly the same steps, tokens, learning rates and evaluations. A single array of moments
may differ by more where the two backends, each alone, differ from each other: by no more than twice that. Left out is
what has no true gradient (`Spec.zero_gradients`).
"""

import contextlib
import io
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training import cli, trainer
from mlx_training.assemble import assemble
from mlx_training.backend import Arrays, replaced
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import RunConfig, load_config
from mlx_training.json_lines import METRICS, read_metrics
from tools.trials.report import Report

LEGS = ("mlx", "torch", "mlx", "torch")
MOST = 1e-4
COMMON = """\
experiment: {name: relay, seed: SEED}
device: cpu
logging: {every_steps: 1}
"""
LANGUAGE = """\
model:
  family: FAMILY
  SHAPE
  tokenizer: {train: 300}
dataset: {format: corpus, num_samples_train: 40, num_samples_validation: 8, num_samples_test: 8}
training: {batch_size: 3, grad_accumulation_steps: 2, learning_rate: 1e-3}
evaluation: {metrics: [loss]}
"""
TIMESERIES = """\
extends: quick_test
model:
  encoder: {hidden_size: 32, num_layers: 2, num_heads: 2, ffn_size: 64}
dataset: {num_samples_train: 40, num_samples_validation: 8, num_samples_test: 16}
training: {batch_size: 3, grad_accumulation_steps: 2, learning_rate: 1e-3}
evaluation: {metrics: [loss, accuracy], batch_size: 8}
"""
PRETRAINED = """\
model:
  family: pretrained
  llm_id: builtin/tiny-llama-4bit
  lora: {rank: 4, alpha: 8, targets: [q_proj, up_proj], dora: true}
  context_length: 32
dataset: {format: corpus, num_samples_train: 40, num_samples_validation: 8, num_samples_test: 8}
training: {batch_size: 3, grad_accumulation_steps: 2, learning_rate: 1e-3}
evaluation: {metrics: [loss]}
"""
SHAPES = {
    "decoder": "decoder: {hidden_size: 32, intermediate_size: 48, num_layers: 2, num_heads: 4, num_kv_heads: 2, "
    "context_length: 32}",
    "sparse": "decoder: {hidden_size: 32, intermediate_size: 48, num_layers: 3, num_heads: 4, num_kv_heads: 2, "
    "mixers: [local, strided, fixed], window: 8, stride: 4, fixed: {block_size: 4, local_context: 16, num_verts: 2}, "
    "num_sinks: 2, experts: {num_experts: 4, num_active: 2}, context_length: 32}",
    "recurrent": "recurrent: {hidden_size: 24, num_layers: 2, context_length: 32}",
    "ssm": "ssm: {hidden_size: 16, state_size: 4, head_dim: 8, num_filters: 4, num_heads: 2, window: 8, num_layers: 5, "
    "mixers: [mamba, mamba2, s4d, stu, local], context_length: 32}",
    "kgram": "kgram: {form: convolution, k: 3, hidden_size: 24, context_length: 32}",
}
FAMILIES = {
    name: LANGUAGE.replace("FAMILY", shape.partition(":")[0]).replace("SHAPE", shape) for name, shape in SHAPES.items()
}
FAMILIES |= {"timeseries": TIMESERIES, "pretrained": PRETRAINED}


class Ending:
    """How the legs of a relay end."""

    name = "shorter runs"
    schedule = ("training.schedule=constant", "training.warmup_fraction=0")

    def __init__(self, leg: int) -> None:
        self.leg = leg
        self.evaluate_every = leg

    def steps(self, end: int) -> int:
        """`training.max_steps` of a leg up to step `end`."""
        return end

    def ending(self, end: int) -> contextlib.AbstractContextManager[None]:
        """What happens while a leg trains."""
        return contextlib.nullcontext()


class Signals(Ending):
    """SIGTERM in the last step of each leg but the last."""

    name = "signals"
    schedule = ("training.schedule=cosine", "training.warmup_fraction=0.1")

    def __init__(self, leg: int) -> None:
        super().__init__(leg)
        self.evaluate_every = max(1, 2 * leg // 5)

    def steps(self, end: int) -> int:
        return len(LEGS) * self.leg

    @contextlib.contextmanager
    def ending(self, end: int) -> Iterator[None]:
        rates = trainer.learning_rates

        def interrupted(config: RunConfig, step: int, total_steps: int) -> dict[str, float]:
            if step == end < total_steps:
                signal.raise_signal(signal.SIGTERM)
            return rates(config, step, total_steps)

        with replaced(trainer, "learning_rates", interrupted):
            yield


ENDINGS: tuple[type[Ending], ...] = (Ending, Signals)


class Failed(Exception):
    """A leg did not end as it should."""


@dataclass(frozen=True)
class Result:
    """What a run leaves: records of its log, its last checkpoint, and its final evaluation."""

    records: list[dict[str, Any]]
    model: Arrays
    optimizer: Arrays
    progress: dict[str, Any]
    report: Mapping[str, Any]

    def values(self, prefix: str) -> list[float]:
        """Everything that was logged under names that begin so."""
        return [value for record in self.records for name, value in record.items() if name.startswith(prefix)]

    def exact(self) -> object:
        """What no backend may change."""
        names = [(record["step"], *record.keys()) for record in self.records]
        steps = {key: self.progress[key] for key in ("tokens", "evaluated", "skipped")}
        return names, self.values("lr/"), self.optimizer["step"].item(), steps


def run(size: int, backends: Sequence[str], seed: int, folder: Path) -> Report:
    """Legs of `size` steps, for each family and each way to end them."""
    if missing := set(LEGS) - set(backends):
        return Report(skipped=f"it needs both backends, without {', '.join(sorted(missing))} there is no other")
    report = Report()
    for family, text in FAMILIES.items():
        config = folder / f"{family}.yaml"
        config.write_text(COMMON.replace("SEED", str(seed)) + text)
        for ending in (made(size) for made in ENDINGS):
            try:
                lines, problems = relay(config, ending, folder / f"{family}-{ending.name}")
            except Failed as failure:
                lines, problems = [], [str(failure)]
            report.lines += [f"{family}, {ending.name}: {line}" for line in lines]
            report.failures += [f"{family}, {ending.name}: {problem}" for problem in problems]
    return report


def relay(config: Path, ending: Ending, folder: Path) -> tuple[list[str], list[str]]:
    """One run handed on, and the same on each backend alone; what was measured, and what is wrong."""
    assembly = assemble(load_config(config, ["training.max_steps=1"]))
    exempt = assembly.spec.zero_gradients()
    handed_on = train(config, ending, folder / "relay", LEGS)
    alone = {name: train(config, ending, folder / name, [name]) for name in dict.fromkeys(LEGS)}
    accumulation, epoch = assembly.config.training.grad_accumulation_steps, assembly.data.train_batches().num_batches
    places = [end * ending.leg * accumulation % epoch for end in range(1, len(LEGS))]
    lines, problems = [f"backends change after micro-batches {', '.join(map(str, places))} of {epoch} of an epoch"], []
    mlx, torch = alone.values()
    apart = differences(mlx, torch, exempt)
    most = {what: max(MOST, 2 * apart[what]) if "one array" in what else MOST for what in apart}
    for name, result in alone.items():
        found = differences(handed_on, result, exempt)
        lines.append(f"against {name} alone: {spelled(found)}")
        problems += [
            f"{what} is {value:.1e} from {name} alone" for what, value in found.items() if not value <= most[what]
        ]
        if handed_on.exact() != result.exact():
            problems.append(f"steps, tokens, rates or evaluations differ from {name} alone")
    lines.append(f"{' against '.join(alone)}, each alone: {spelled(apart)}")
    return lines, problems


def train(config: Path, ending: Ending, run: Path, legs: Sequence[str]) -> Result:
    """One run of all steps, each leg on its backend. Raises Failed when a leg does not end as it should."""
    total = len(LEGS) * ending.leg
    ends = [total * (number + 1) // len(legs) for number in range(len(legs))]
    for backend, end in zip(legs, ends, strict=True):
        words = ["train", str(config), "--backend", backend, "--resume", "auto", "--json", *ending.schedule]
        words += [f"training.max_steps={ending.steps(end)}", f"evaluation.every_steps={ending.evaluate_every}"]
        out, said = io.StringIO(), io.StringIO()
        with ending.ending(end), contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            code = cli.main([*words, f"output_dir={run}"])
        stopped = end < ending.steps(end)
        if code != (128 + signal.SIGTERM if stopped else 0) or CheckpointStore(run).load().step != end:
            raise Failed(f"the leg to step {end} on {backend} ended with {code}: {said.getvalue()}")
    checkpoint = CheckpointStore(run).load()
    return Result(
        read_metrics(run / METRICS),
        checkpoint.model,
        checkpoint.optimizer,
        checkpoint.state["progress"],
        json.loads(out.getvalue())["eval"],
    )


def differences(a: Result, b: Result, exempt: Mapping[str, slice]) -> dict[str, float]:
    """The largest difference of every kind."""
    logged = {
        "loss": zip(a.values("loss"), b.values("loss"), strict=True),
        "evaluation": zip(a.values("eval/"), b.values("eval/"), strict=True),
        "final report": [(a.report[name], value) for name, value in b.report.items() if isinstance(value, float)],
    }
    found = {what: max(abs(x - y) / max(1, abs(y)) for x, y in both) for what, both in logged.items()}
    pairs = [(kept(a.model, name, exempt), kept(b.model, name, exempt)) for name in b.model]
    found["parameters (max)"] = max(float(np.abs(x - y).max()) for x, y in pairs)
    found["parameters"] = max(relative(x, y) for x, y in pairs)
    for moment in "mv":
        names = [name for name in b.optimizer if name.endswith(f".{moment}")]
        pairs = [(kept(a.optimizer, name, exempt), kept(b.optimizer, name, exempt)) for name in names]
        whole = [np.concatenate([array.ravel() for array in side]) for side in zip(*pairs, strict=True)]
        found[moment] = relative(whole[0], whole[1])
        found[f"{moment} (one array)"] = max(relative(x, y) for x, y in pairs)
    return found


def kept(arrays: Arrays, name: str, exempt: Mapping[str, slice]) -> np.ndarray:
    """An array without what has no true gradient: AdamW moves that by rounding noise."""
    array = arrays[name].astype(np.float64)
    part = exempt.get(name.removesuffix(".m").removesuffix(".v"))
    if part is not None:
        array[part] = 0
    return array


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """‖a - b‖ / ‖b‖."""
    gap, norm = np.linalg.norm(a - b), np.linalg.norm(b)
    return float(gap / norm) if norm else float(gap)


def spelled(found: Mapping[str, float]) -> str:
    """Differences on one line."""
    return ", ".join(f"{what} {value:.1e}" for what, value in found.items())
