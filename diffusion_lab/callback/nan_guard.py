"""Stops training after N consecutive non-finite gradients.

The module skips such a step: weights, optimizer state and averages stay unchanged. Many skipped
steps in a row mean that the training does not recover.
"""

__all__ = ["NaNGuard"]

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from diffusion_lab.callback.checkpoint import LastCheckpoint
from diffusion_lab.callback.trainer_state import diffusion_module
from diffusion_lab.constraints import PositiveInt, checked
from diffusion_lab.errors import RunError
from diffusion_lab.runs.shell import shell_command
from diffusion_lab.training.module import should_log


class NaNGuard(Callback):
    """Logs the number of skipped steps as `train/skipped`, and stops the run after N in a row.

    A count on a GPU is read in logged steps only.

    Arguments:
        patience: Number N of consecutive skipped steps that stops the run.

    Raises:
        RunError: After N skipped steps; names the last checkpoint.
    """

    @checked
    def __init__(self, patience: PositiveInt = 10) -> None:
        self.patience = patience
        self.total = torch.zeros((), dtype=torch.int64)  # of the whole run
        self.row = self.longest = torch.zeros((), dtype=torch.int64)  # since its start or resume
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """Returns the number of skipped steps of the whole run."""
        return {"total": int(self.total)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = torch.tensor(state["total"])

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = diffusion_module(module)
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        skipped = module.skipped
        self.total = self.total.to(skipped.device) + skipped
        self.row = (self.row.to(skipped.device) + 1) * skipped
        self.longest = torch.maximum(self.longest.to(skipped.device), self.row)
        logged = should_log(trainer, self.step)
        if logged:
            module.log("train/skipped", self.total.float(), batch_size=1)
        if (logged or skipped.device.type == "cpu") and self.longest >= self.patience:
            raise RunError(self._message(trainer))

    def _message(self, trainer: Trainer) -> str:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Trainer.__init__
        last = next((c for c in callbacks if isinstance(c, LastCheckpoint)), None)
        text = (
            f"training stopped at step {self.step}: loss or gradient was not finite in "
            f"{int(self.longest)} steps in a row, which were skipped (nan_guard.patience="
            f"{self.patience}). "
        )
        if last is None or not last.path.exists():
            text += "There is no checkpoint yet"
            return f"{text}; lower optimizer.lr, or look for non-finite images"
        text += f"{last.path} holds the state after step {last.saved_step}, before these steps. "
        resume = shell_command("train", resume=last.path.parent.parent)
        useless = trainer.global_step - last.saved_step <= int(self.longest)  # perhaps
        if useless:
            return (
                f"{text}Start a new run with a lower optimizer.lr, or, if non-finite images are "
                f"the cause, continue without them: {resume}"
            )
        return f"{text}Lower optimizer.lr or remove non-finite images, and continue with: {resume}"
