"""Settings of the optimizer of a run that is resumed with other ones."""

__all__ = ["change_optimizer"]

import logging
from collections.abc import Collection
from typing import Any

from torch.optim import Optimizer

log = logging.getLogger(__name__)


def change_optimizer(
    checkpoint: dict[str, Any], optimizer: Optimizer, keys: Collection[str]
) -> None:
    """Replaces settings in a checkpoint by those of a new optimizer of the same class.

    The learning rate of the next step is multiplied by the ratio of the new to the old `lr`; the
    learning-rate schedule continues from the new one.

    Arguments:
        checkpoint: The checkpoint, changed in place.
        optimizer: The new optimizer.
        keys: The names of the settings, such as lr, betas or weight_decay.
    """
    for state in checkpoint.get("optimizer_states", ()):
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=False):
            for key in sorted(key for key in keys if key in group):
                if key == "lr":
                    _change_lr(checkpoint, saved, group["lr"])
                else:
                    log.info("resume: optimizer.%s %s -> %s", key, saved.get(key), group[key])
                    saved[key] = group[key]


def _change_lr(checkpoint: dict[str, Any], saved: dict[str, Any], lr: float) -> None:
    old = saved.get("initial_lr", saved["lr"])
    log.info("resume: optimizer.lr %s -> %s", old, lr)
    saved["lr"] = saved["lr"] * lr / old if old else lr
    saved["initial_lr"] = lr
    for schedule in checkpoint.get("lr_schedulers", ()):
        if "base_lrs" in schedule:
            schedule["base_lrs"] = [lr] * len(schedule["base_lrs"])
