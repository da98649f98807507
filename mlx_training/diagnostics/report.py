"""What the doctor found: one Finding a check, and the Report they make."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mlx_training.diagnostics.causes import CAUSES

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. A `warn` or `fail` names its cause (a key of CAUSES) and where it is."""

    check: str
    status: Status
    figure: str  # what was measured, for people
    cause: str | None = None
    where: tuple[str, ...] = ()  # parameters, modules or rows
    advice: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert (self.cause in CAUSES) == (self.status in ("warn", "fail")), (self.check, self.status, self.cause)

    def __str__(self) -> str:
        """One line; fails and warnings also say why, where, and what to change."""
        text = f"{self.status:4}  {self.check:16} {self.figure}"
        if self.cause is None:
            return text
        text += f"\n      cause: {CAUSES[self.cause].sentence} [{self.cause}]"
        if self.where:
            text += f"\n      where: {', '.join(self.where[:4])}" + (" ..." if len(self.where) > 4 else "")
        return f"{text}\n      change: {self.advice}"


@dataclass
class Report:
    """Findings in the order of the checks, from root to symptom: the first fail is the likeliest cause of the rest."""

    findings: list[Finding] = field(default_factory=list)
    subject: str = ""
    backend: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> list[Finding]:
        """Findings that fail."""
        return [finding for finding in self.findings if finding.status == "fail"]

    @property
    def cause(self) -> str | None:
        """The cause of the first fail, or None."""
        return self.failed[0].cause if self.failed else None

    def __str__(self) -> str:
        """Every finding, and a last line that counts them."""
        return "\n".join([*map(str, self.findings), self.summary])

    @property
    def summary(self) -> str:
        """How many checks came out how, and the likeliest cause."""
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        cause = f"; likeliest cause: {self.cause}" if self.cause else ""
        return f"{self.backend}: {counts} in {self.seconds:.1f} s{cause}"

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings by status."""
        return {status: sum(f.status == status for f in self.findings) for status in ("pass", "warn", "fail", "skip")}

    def to_json(self) -> dict[str, Any]:
        """What `doctor --json` prints."""
        return {
            "subject": self.subject,
            "backend": self.backend,
            "healthy": not self.failed,
            "cause": self.cause,
            "counts": self.counts,
            "summary": self.summary,
            "seconds": round(self.seconds, 2),
            "findings": [asdict(finding) for finding in self.findings],
        }


def passed(check: str, figure: str) -> Finding:
    """A check that holds."""
    return Finding(check, "pass", figure)


def skipped(check: str, reason: str) -> Finding:
    """A check that does not apply, or could not be made."""
    return Finding(check, "skip", reason)


def failed(check: str, figure: str, cause: str, where: Sequence[str] = (), advice: str = "") -> Finding:
    """A check that does not hold, because of `cause`."""
    return Finding(check, "fail", figure, cause, tuple(where), advice or CAUSES[cause].advice)


def warned(check: str, figure: str, cause: str, where: Sequence[str] = (), advice: str = "") -> Finding:
    """Something worth a look."""
    return Finding(check, "warn", figure, cause, tuple(where), advice or CAUSES[cause].advice)
