"""Errors that are the user's to mend: one message, no traceback, exit code 1."""

__all__ = ["ConfigError", "DataError", "RunError", "SamplingError"]

from hydra.errors import CompactHydraException


class ConfigError(CompactHydraException, ValueError):
    """A key of the configuration has a value that is not allowed."""


class DataError(CompactHydraException):
    """A source of images is missing, empty or corrupt."""


class RunError(CompactHydraException):
    """A run directory or checkpoint is missing, unreadable or does not fit."""


class SamplingError(CompactHydraException):
    """A sampler's state is no longer a number, or it does not arrive."""
