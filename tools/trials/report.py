"""What every trial returns, and the names they share."""

from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Report:
    """What a trial saw: `lines` say what was done and measured, `failures` what should not have happened."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: str = ""  # the reason, where this machine does not allow the trial
