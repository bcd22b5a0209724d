"""Settings of the process that a command runs in."""

__all__ = ["exit_with_parent", "set_up_process"]

import logging
import os
import signal
import threading
import time
import warnings

from diffusion_lab.allocator import keep_memory
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
