"""Faults and look-alikes written by somebody who had not seen the checks; docs/doctor.md has what was found at first.

The checks have been repaired on them since, so that they now guard against losing ground, as the catalogue does.
They differ from the catalogue in mechanism or in place: one layer, some rows, one group, one micro-batch, later steps.
"""

from tests.doctor.faults.heldout import data, gradients, lookalikes, model, runs, updates
from tests.doctor.faults.heldout.registry import HELDOUT, HELDOUT_LOOKALIKES

__all__ = ["HELDOUT", "HELDOUT_LOOKALIKES", "data", "gradients", "lookalikes", "model", "runs", "updates"]
