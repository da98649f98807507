"""The `performance` section: what a step need not compute, and who holds what; and what it says about other keys."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from mlx_training.config_model_checks import Conflict
from mlx_training.config_section import Section

if TYPE_CHECKING:
    from mlx_training.config_schema import RunConfig

FAMILIES = {  # key -> the families that it is for
    "frozen_prefix": ("timeseries",),
    "trim_last_layer": ("timeseries", "pretrained"),
    "chunked_encoder": ("timeseries",),
    "shard": ("decoder", "recurrent", "ssm", "kgram"),
}
WHOLE_MATRICES = ("muon", "adafactor")  # optimisers whose updates need them


class Performance(Section):
    """How a step is computed. Results stay the same."""

    frozen_prefix: Literal["reuse", "compute", "off"] = "reuse"
    """timeseries: what stands before a row's series has no gradient (compute), and what all rows share is read once."""
    trim_last_layer: bool = True
    """A frozen LM's last layer is computed at the places of labels only."""
    chunked_encoder: bool = True
    """timeseries: more than 4,096 patches (on a GPU 65,536) are encoded in chunks of series, which bounds memory."""
    chunked_head: bool = True
    """More logits than 2^26 (labels x vocabulary) are made in chunks, and again for their gradients: less memory."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch: the loss of a step (auto: on CUDA, else off). MLX: all of a step (auto: on; off helps to debug)."""
    shard: bool = False
    """From scratch, with torchrun: the processes share out parameters, gradients and optimiser state."""


def performance_conflicts(config: "RunConfig") -> Iterator[Conflict]:
    """Keys of `performance` where they have nothing to do, and where they cannot do it."""
    given, family, optimizer = config.performance, config.model.family, config.training.optimizer
    for key, families in FAMILIES.items():
        if getattr(given, key) != Performance.model_fields[key].default and family not in families:
            message = f"the {family} family has no use for it; it is for {', '.join(families)}. Leave it out"
            yield Conflict((f"performance.{key}", "model.family"), message)
    if given.shard and given.compile == "on":
        message = "given on; a sharded model gathers its layers one by one, which is not compiled: give auto or off"
        yield Conflict(("performance.compile", "performance.shard"), message)
    if given.shard and optimizer in WHOLE_MATRICES:
        message = (
            f"given true; {optimizer} needs whole matrices, and no process has them: take adamw, or set it to false"
        )
        yield Conflict(("performance.shard", "training.optimizer"), message)
