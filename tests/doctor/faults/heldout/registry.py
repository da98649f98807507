"""Where the unseen faults and look-alikes are kept."""

from tests.doctor.faults.base import Fault, Lookalike, fault_into, lookalike_into

HELDOUT: list[Fault] = []
HELDOUT_LOOKALIKES: list[Lookalike] = []
fault, lookalike = fault_into(HELDOUT), lookalike_into(HELDOUT_LOOKALIKES)
