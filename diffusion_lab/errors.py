"""User-facing errors: one message, no traceback, exit code 1."""

__all__ = [
    "INT_LIMIT",
    "ArgumentError",
    "ConfigError",
    "DataError",
    "LabError",
    "RunError",
    "SamplingError",
]

from typing import Any

INT_LIMIT = 2**63  # torch's integers have 64 bits


class LabError(Exception):
    """Base of all errors that are reported to the user without a traceback."""


class ArgumentError(ValueError):
    """An argument of a constructor or function has a value that is not allowed.

    Arguments:
        name: The argument's name, or the full key of the configuration.
        value: Its value.
        allowed: The allowed values in words, after "it must be".
    """

    def __init__(self, name: str, value: Any, allowed: str) -> None:
        limit = ""
        if isinstance(value, int) and abs(value) >= INT_LIMIT:
            limit = ", of at most 63 bits"
        super().__init__(f"{name}={_shown(value)} is not allowed; it must be {allowed}{limit}")
        self.name, self.value, self.allowed = name, value, allowed

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets the error pass between processes."""
        return type(self), (self.name, self.value, self.allowed)


def _shown(value: Any) -> str:
    """The value as it is written in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


class ConfigError(LabError, ValueError):
    """A key of the configuration has a value that is not allowed."""


class DataError(LabError):
    """A data source is missing, empty or corrupt."""


class RunError(LabError):
    """A run directory or checkpoint is missing, unreadable or does not fit."""


class SamplingError(LabError):
    """A sampler diverged (NaN or infinity), or did not converge."""
