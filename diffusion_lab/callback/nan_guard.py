"""Ends a training that has stopped being one: too many steps in a row without a finite gradient.

The module leaves such a step out by itself. Weights, moments and averages stay as they were, so
that one bad batch costs one step; a row of them means that no step will ever be taken again.
"""

__all__ = ["NaNGuard"]

from typing import Any

import torch
from lightning import Callback, Trainer

from diffusion_lab.callback.checkpoint import LastCheckpoint
from diffusion_lab.errors import RunError
from diffusion_lab.training.module import DiffusionModule, is_logged


class NaNGuard(Callback):
    """Counts the steps that were left out, as `train/skipped`, and ends the run after a row.

    Where the count is on the device it is looked at in steps that are logged only.

    Arguments:
        patience: The number of steps left out in a row that ends the run, >= 1.

    Raises:
        ValueError: If the number is below 1.
        RunError: After so many; names the last checkpoint, which is good.
    """

    def __init__(self, patience: int = 10) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience} is not allowed; it is at least 1")
        self.patience = patience
        self.total = torch.zeros((), dtype=torch.int64)  # of the whole run
        self.row = self.longest = torch.zeros((), dtype=torch.int64)  # since its start or resume
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """Returns the count, with which a resumed run goes on."""
        return {"total": int(self.total)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = torch.tensor(state["total"])

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        skipped = module.skipped
        self.total = self.total.to(skipped.device) + skipped
        self.row = (self.row.to(skipped.device) + 1) * skipped
        self.longest = torch.maximum(self.longest.to(skipped.device), self.row)
        logged = is_logged(trainer, self.step)
        if logged:
            self.log("train/skipped", self.total.float(), batch_size=1)
        if (logged or skipped.device.type == "cpu") and self.longest >= self.patience:
            raise RunError(self._message(trainer))

    def _message(self, trainer: Trainer) -> str:
        last = next((c for c in trainer.callbacks if isinstance(c, LastCheckpoint)), None)
        kept = "there is no checkpoint yet"
        if last is not None and last.path.exists():
            kept = (
                f"{last.path}, after step {last.saved_step}, is intact: continue with "
                f"resume={last.path.parent.parent}"
            )
        return (
            f"training stopped at step {self.step}: loss or gradient was not finite in "
            f"{int(self.longest)} steps in a row, which were left out (nan_guard.patience="
            f"{self.patience}). {kept[0].upper()}{kept[1:]}; lower optimizer.lr, or look for "
            "images or weights that are not finite"
        )
