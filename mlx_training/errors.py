"""Errors a user can act on. Each says what was given, what was expected and how to fix it.

The command line prints the message alone (no traceback) and exits with `exit_code`.
"""


class UserError(ValueError):
    """Something outside the code is wrong; the message is meant for the person who ran the command."""

    exit_code = 2


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
    """The loss or a gradient is no longer finite (exit code 4)."""

    exit_code = 4


class Interrupted(Exception):
    """A signal asked the run to stop, and it did so in good order. The message says what was saved."""

    def __init__(self, signal: int, message: str = "") -> None:
        super().__init__(message or f"by signal {signal}")
        self.signal = signal

    @property
    def exit_code(self) -> int:
        """What a shell expects: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signal
