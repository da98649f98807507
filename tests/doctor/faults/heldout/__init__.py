"""Faults and look-alikes that no check was developed on: what the doctor does with them is measured, never tuned.

They differ from the catalogue in mechanism or in place: one layer, some rows, one group, one micro-batch, later steps.
"""

from tests.doctor.faults.heldout import data, gradients, lookalikes, model, runs, updates
from tests.doctor.faults.heldout.registry import HELDOUT, HELDOUT_LOOKALIKES

__all__ = ["HELDOUT", "HELDOUT_LOOKALIKES", "data", "gradients", "lookalikes", "model", "runs", "updates"]
