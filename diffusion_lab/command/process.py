"""Settings of the process that a command runs in."""

__all__ = ["set_up_process"]

import logging
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
