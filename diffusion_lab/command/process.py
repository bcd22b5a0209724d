"""Settings of the process that a command runs in."""

__all__ = [
    "exit_with_parent", "full_errors", "is_refusal", "refuse", "set_up_process", "short_errors",
]  # fmt: skip

import errno
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from diffusion_lab.allocator import keep_memory
from diffusion_lab.errors import LabError
from diffusion_lab.runs.compose import register_resolvers

IGNORED_WARNINGS = (
    "Found .* in eval mode at the start of training",  # the averaged network, on purpose
    "The number of training batches",  # a run counts steps, not epochs
    "Checkpoint directory .* exists and is not empty",  # a resumed run
    "It is recommended to use .self.log.'val/loss_bin",  # these metrics synchronize themselves
    "The ``compute`` method of metric MeanMetric was called before",  # a bin without an image
    ".*isinstance.treespec, LeafSpec",  # raised inside Lightning
    ".*tensorboardX",
)


def set_up_process() -> None:
    """Registers the resolvers of conf/, and sets allocator, logging and warning filters."""
    keep_memory()
    register_resolvers()
    # Lightning's own lines about devices, tips and model summaries.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)


REFUSALS = (LabError, HydraException, OmegaConfBaseException)
# Paths that are too long, disks that are full or cannot be written, missing permissions.
REFUSED_ERRNO = (
    errno.ENAMETOOLONG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT,
)  # fmt: skip
FULL_ERROR = "HYDRA_FULL_ERROR"
_shortened = False  # whether `short_errors` has set the variable


def full_errors() -> bool:
    """Whether the user asks for tracebacks of refusals, by HYDRA_FULL_ERROR=1."""
    return os.environ.get(FULL_ERROR) == "1" and not _shortened


def is_refusal(error: BaseException) -> bool:
    """Whether an error is the user's to solve, so that it is shown without a traceback."""
    refused = isinstance(error, OSError) and error.errno in REFUSED_ERRNO
    return refused or isinstance(error, REFUSALS)


def refuse(error: BaseException) -> NoReturn:
    """Prints an error and ends the process with code 1.

    Hydra would print an exception with the overrides, and turn one in a callback into a warning.
    """
    print(error, file=sys.stderr)
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        print(cause, file=sys.stderr)
    sys.exit(1)


@contextmanager
def short_errors() -> Iterator[None]:
    """Context of a command: a refusal is printed alone, without traceback and overrides.

    Hydra adds a line before it and a line after it, unless HYDRA_FULL_ERROR=1 lets it raise the
    error. If the user has set that variable, Hydra's own output is kept.

    Raises:
        SystemExit: With code 1 after a refusal, and 130 after Ctrl-C.
    """
    global _shortened
    if full_errors():
        yield
        return
    before = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR], _shortened = "1", True
    try:
        yield
    except Exception as error:
        if not is_refusal(error):
            raise
        refuse(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        _shortened = False
        if before is None:
            os.environ.pop(FULL_ERROR, None)
        else:
            os.environ[FULL_ERROR] = before


def exit_with_parent(pid: int) -> None:
    """Ends this process when its parent has ended in any way: first by SIGTERM, then by SIGKILL.

    Arguments:
        pid: The parent, a process on this machine.
    """

    def watch() -> None:
        while _alive(pid):
            time.sleep(0.5)
        for _ in range(60):  # until a handler is installed, which saves the state
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="exit_with_parent").start()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:  # gone, or the number now belongs to another user
        return False
    return True
