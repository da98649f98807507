"""A result that is no comparison of processes: lines to print, and the numbers behind them."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Listing:
    """Lines and numbers."""

    work: str
    said: list[str]
    numbers: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people."""
        return [self.work, *(f"  {line}" for line in self.said)]

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
