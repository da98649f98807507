"""Where a training run stands; a checkpoint keeps it in `state.json`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass
class Progress:
    """What a checkpoint remembers beside parameters and optimiser state."""

    best: float | None = None  # of checkpoint.best, so far
    evaluations_without_improvement: int = 0
    evaluated: int = 0  # step of the last evaluation
    tokens: int = 0  # supervised tokens seen
    skipped: int = 0  # updates that were not finite
    loss: float | None = None  # of the last finite step that was read
    seconds: float = 0.0
    stopped_early: bool = False


def wrong_progress(state: Mapping[str, Any], step: int) -> list[str]:
    """What is wrong with the state that a run would be continued with; empty when it is sound."""
    progress = state.get("progress")
    if not isinstance(state.get("backend"), str):
        return [f"backend is {state.get('backend')!r}, expected a name"]
    if "llm_sha256" not in state:
        return ["llm_sha256 is missing, expected the frozen LM's fingerprint or null"]
    if not isinstance(progress, dict):
        return [f"progress is {progress!r}, expected an object"]
    names = [field.name for field in fields(Progress)]
    if progress.keys() != set(names):
        return [f"progress holds {', '.join(progress) or 'nothing'}; expected {', '.join(names)}"]
    wrong = [
        f"progress.{name} is {progress[name]!r}, expected {expected}"
        for expected, (is_right, names) in KINDS.items()
        for name in names
        if not is_right(progress[name])
    ]
    if not wrong and progress["evaluated"] > step:
        wrong.append(f"progress.evaluated is {progress['evaluated']}, expected at most {step}")
    return wrong


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300


KINDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a count": (_is_count, ("evaluations_without_improvement", "evaluated", "tokens", "skipped")),
    "a number or null": (lambda value: value is None or _is_number(value), ("best", "loss")),
    "seconds": (lambda value: _is_number(value) and value >= 0, ("seconds",)),
    "true or false": (lambda value: type(value) is bool, ("stopped_early",)),
}
