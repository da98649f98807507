"""Several processes of one training run. Process 0 alone has the run directory; the others' is a temporary one."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mlx_training.assemble import Assembly, llm_sha256
from mlx_training.backend import Arrays, Backend, Group
from mlx_training.config import RunConfig
from mlx_training.errors import BackendError, ConfigError, DivergedError, ProcessLostError

LOST = re.compile(r"\bgloo\b|\bnccl\b|connection (reset|closed)", re.IGNORECASE)
LAUNCHERS = {"torch": ("torchrun", "TORCHELASTIC_RUN_ID"), "mlx": ("mlx.launch", "MLX_RANK")}


@contextlib.contextmanager
def joined(backend: Backend, config: RunConfig) -> Iterator[RunConfig]:
    """Join the processes a launcher started; gives the configuration with which this one trains.

    All but process 0 are silent: what they would say is what process 0 says. Raises BackendError when the launcher
    is the other backend's.
    """
    for name, (launcher, variable) in LAUNCHERS.items():
        if name != backend.name and variable in os.environ and LAUNCHERS[backend.name][1] not in os.environ:
            raise BackendError(
                f"{launcher} starts processes of the {name} backend; this run's is {backend.name}. Use --backend "
                f"{name}, or start it with {LAUNCHERS[backend.name][0]}"
            )
    backend.group.join()
    with _loss_of_others_explained(backend.group):
        if backend.group.rank == 0:
            yield config
        else:
            with (
                TemporaryDirectory(prefix="mlx-training-") as folder,
                open(os.devnull, "w") as nowhere,
                contextlib.redirect_stderr(nowhere),
            ):
                yield _elsewhere(config, folder)
    backend.group.leave()


@contextlib.contextmanager
def _loss_of_others_explained(group: Group) -> Iterator[None]:
    """ProcessLostError for what FSDP2's own messages raise; only their words tell them from other errors."""
    try:
        yield
    except RuntimeError as error:
        if group.size > 1 and LOST.search(str(error)):
            raise ProcessLostError(group.rank, error) from error
        raise


def _elsewhere(config: RunConfig, folder: str) -> RunConfig:
    """The same training, in another run directory; weights to start from are given by process 0."""
    training = config.training.model_copy(update={"init_from": None})
    logging = config.logging.model_copy(update={"wandb": "disabled"})
    return config.model_copy(update={"output_dir": folder, "training": training, "logging": logging})


def gather(group: Group, value: Any) -> list[Any]:
    """The value (JSON) of every process, in the order of their ranks."""
    if group.size == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8).astype(np.int32)
    sizes = np.zeros(group.size, np.int32)
    sizes[group.rank] = text.size
    ends = np.cumsum(group.total(sizes))
    whole = np.zeros(ends[-1], np.int32)
    whole[ends[group.rank] - text.size : ends[group.rank]] = text
    parts = np.split(group.total(whole).astype(np.uint8), ends[:-1])
    return [json.loads(part.tobytes()) for part in parts]


def share(group: Group, value: Any) -> Any:
    """Process 0's value (JSON), in every process."""
    return gather(group, value if group.rank == 0 else None)[0]


def share_arrays(group: Group, arrays: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Process 0's arrays, which have these shapes, in every process. One message an array: none is held twice."""
    if group.size == 1:
        return arrays
    return {
        name: group.total(arrays[name] if group.rank == 0 else np.zeros(shape, np.float32))
        for name, shape in shapes.items()
    }


def expect_alike(group: Group, assembly: Assembly, rows: str | None) -> None:
    """ConfigError unless every process trains the same model in the same way on the same rows."""
    config = assembly.config
    about = {
        "experiment.seed": config.experiment.seed,
        "training": config.training.model_dump(mode="json", exclude={"init_from"}),
        "performance": config.performance.model_dump(mode="json"),
        "evaluation": config.evaluation.model_dump(mode="json"),
        "number of parameters": assembly.spec.num_parameters,
        "frozen LM": llm_sha256(assembly.spec),
        "tokenizer": assembly.data.tokenizer.fingerprint,
        "rows": rows,
    }
    first, *others = gather(group, about)
    for rank, other in enumerate(others, 1):
        if names := [name for name in about if other[name] != first[name]]:
            raise ConfigError(
                f"process {rank} differs from process 0 in: {', '.join(names)}. Every machine needs the same "
                "configuration and the same files. Nothing was trained."
            )


@contextlib.contextmanager
def diverging_together(group: Group) -> Iterator[None]:
    """Let a run's end tell what every process found in its own rows: they all diverge at the same step."""
    try:
        yield
    except DivergedError as error:
        first, *others = gather(group, str(error))
        more = [f"\nprocess {rank}: {text}" for rank, text in enumerate(others, 1) if text != first]
        raise DivergedError("".join([first, *more]), error.step) from error
