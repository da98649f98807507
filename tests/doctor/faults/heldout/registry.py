"""Where the unseen faults and look-alikes are kept."""

from collections.abc import Callable
from functools import partial
from typing import Any

from mlx_training.diagnostics.causes import CAUSES
from tests.doctor.faults.base import (
    Fault,
    Lookalike,
    Plant,
)

HELDOUT: list[Fault] = []
HELDOUT_LOOKALIKES: list[Lookalike] = []


def fault(*causes: str, **fields: Any) -> Callable[[Plant], Plant]:
    """As `base.fault`, into HELDOUT."""

    def register(plant: Plant) -> Plant:
        assert causes and set(causes) <= set(CAUSES), causes
        HELDOUT.append(Fault(plant.__name__, plant.__doc__ or "", causes, plant, **fields))
        return plant

    return register


def lookalike(plant: Plant | None = None, *, case: str = "timeseries") -> Any:
    """As `base.lookalike`, into HELDOUT_LOOKALIKES."""
    if plant is None:
        return partial(lookalike, case=case)
    HELDOUT_LOOKALIKES.append(Lookalike(plant.__name__, plant.__doc__ or "", plant, case))
    return plant
