r"""Checkpoints that survive: written whole or not at all, loaded without running code."""

__all__ = ["AtomicCheckpointIO", "FinalValidation", "LastCheckpoint"]

import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from diffusion_lab.errors import RunError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, forces it to the disk and renames.

    Whatever interrupts it, the previous checkpoint is still there. Lightning's own writer leaves
    an unreadable file if it is killed in the middle.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError about its own archive format
            partial.unlink(missing_ok=True)
            kept = "the previous one is intact" if path.exists() else "there is no earlier one"
            raise RunError(
                f"cannot write the checkpoint {path} ({error}); is the disk full? {kept}. "
                "Free space and continue with resume=<run dir>"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        from diffusion_lab.runs import load_checkpoint

        return load_checkpoint(Path(path))


class LastCheckpoint(Checkpoint):
    """Keeps the newest state as `last.ckpt`: every N steps and at the end of training.

    An exception saves nothing: a state in the middle of a step cannot be resumed exactly.

    Arguments:
        directory: Where checkpoints are kept.
        every_n_steps: The number of optimizer steps from one to the next.
    """

    def __init__(self, directory: str, every_n_steps: int) -> None:
        self.path = Path(directory) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.saved_step = -1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # The last step is saved here and not after it: then Lightning counts the epoch as over,
        # and a run that goes on from there would skip the rest of the epoch.
        due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if due and step != self.saved_step:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step != self.saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        trainer.save_checkpoint(self.path, weights_only=False)  # on every rank: it is a collective
        self.saved_step = trainer.global_step


class FinalValidation(Callback):
    """Makes the last step be followed by a validation, wherever it falls between two of them."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
