"""Planted faults: small ways in which real projects break, planted from outside on the public objects of a Subject."""

from tests.doctor import lookalikes
from tests.doctor.faults import adamw, adapters, data, gradients, language, model, runs, ssm, update
from tests.doctor.faults.base import FAULTS, LOOKALIKES, Fault, Lookalike

__all__ = [
    "FAULTS",
    "LOOKALIKES",
    "Fault",
    "Lookalike",
    "adamw",
    "adapters",
    "data",
    "gradients",
    "language",
    "lookalikes",
    "model",
    "runs",
    "ssm",
    "update",
]
