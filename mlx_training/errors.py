"""Errors a user can act on. Each says what was given, what was expected and how to fix it.

The command line prints the message alone (no traceback) and exits with `exit_code`. A message never holds a secret.
"""

import os
import re

SECRET = r"(?:token|secret|password|passwd|(?:api|access|secret|private)_?key)\b"
SECRET_NAME = re.compile(SECRET, re.IGNORECASE)
ASSIGNMENT = re.compile(rf"({SECRET}=)\S+", re.IGNORECASE)  # logging.api_key=value
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # https://user:password@host
LONGEST_WORD, LONGEST_LINE = 300, 3000  # characters that a message quotes; of more, the beginning and the end
SHORTEST_SECRET = 8  # characters: "1" is no secret, whatever the variable is called


class UserError(ValueError):
    """Something outside the code is wrong; the message is meant for the person who ran the command."""

    exit_code = 2

    def __str__(self) -> str:
        return shortened(without_secrets(super().__str__()))


class ConfigError(UserError):
    """The configuration is wrong (exit code 2)."""


class BackendError(UserError):
    """A backend or device is not present on this machine (exit code 2)."""


class DataError(UserError):
    """Rows, tokenizers or files cannot be used as data (exit code 3)."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint is damaged or does not fit the model (exit code 3)."""

    exit_code = 3


class DivergedError(UserError):
    """The loss or a gradient is no longer finite, as of optimiser step `step` (exit code 4)."""

    exit_code = 4

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class MemoryExhaustedError(UserError):
    """The machine or its accelerator has no memory left for what was asked (exit code 5)."""

    exit_code = 5


class ProcessLostError(UserError):
    """Another process of a job that trains together has ended or does not answer (exit code 6)."""

    exit_code = 6

    def __init__(self, rank: int, reason: object) -> None:
        super().__init__(
            f"process {rank} has lost another process of this job: {' '.join(str(reason).split())[:300]}. What was "
            "saved is intact: see what the other process said, and start the job again with --resume auto"
        )


class Interrupted(Exception):
    """A signal asked the run to stop, and it did so in good order. The message says what was saved."""

    def __init__(self, signal: int, message: str = "") -> None:
        super().__init__(message or f"by signal {signal}")
        self.signal = signal

    @property
    def exit_code(self) -> int:
        """What a shell expects: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signal


def without_secrets(text: str) -> str:
    """`text` without credentials in URLs, what follows `token=`, and the values of variables named like a secret."""
    values = (value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET)
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return ASSIGNMENT.sub(r"\1***", CREDENTIALS.sub("***", text))


def shortened(text: str) -> str:
    """A message with its middle left out where somebody's value is longer than anybody reads."""
    text = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: _ends_of(word[0], LONGEST_WORD), text)
    return "\n".join(_ends_of(line, LONGEST_LINE) for line in text.split("\n"))


def _ends_of(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = most // 2 - 20
    return f"{text[:half]}...({len(text) - 2 * half} characters)...{text[-half:]}"


def shown(value: str, name: str) -> str:
    """A value as a message quotes it; hidden where `name` says that it is a secret."""
    return "a value that is not shown" if SECRET_NAME.search(name) else repr(value)
