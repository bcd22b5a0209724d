r"""Checkpoints that survive: written whole or not at all, loaded without running code."""

__all__ = ["ElasticResume", "FinalValidation", "LastCheckpoint", "TrainingInterrupted"]

import signal
import threading
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage


class TrainingInterrupted(BaseException):
    """The system asked the process to end, and the state is saved.

    Not an `Exception`: nothing on the way out may take it for a failure, and a sweep ends with it.

    Attributes:
        signal: The signal's name.
        step: Optimizer steps taken.
    """

    def __init__(self, signal: str, step: int) -> None:
        super().__init__(f"{signal} after step {step}")
        self.signal, self.step = signal, step


class LastCheckpoint(Checkpoint):
    """Keeps the newest state as `last.ckpt`: every N steps, at the end, and on a signal.

    SIGTERM and SIGUSR1 are what a cluster sends before it takes a machine away: the step is
    finished, the state saved, and training ends. Several devices agree on that at the next step
    that is logged, when they talk to each other anyway. An exception saves nothing: a state in
    the middle of a step cannot be resumed exactly.

    Arguments:
        directory: Where checkpoints are kept.
        every_n_steps: The number of optimizer steps from one to the next.

    Raises:
        TrainingInterrupted: After a signal, when the state is saved.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, directory: str, every_n_steps: int) -> None:
        self.path = Path(directory) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.saved_step = -1
        self.received: str | None = None  # the signal that this process got
        self.stopping = False  # what all devices agreed on
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.saved_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            # In place of Lightning's own, which lose what came after the last checkpoint, or
            # talk to other processes in the middle of whatever is going on.
            self.handlers = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        # With several devices Lightning asks before every batch whether one got its signal: a
        # collective whose answer the host waits for, with nothing under way on the device.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _note(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.saved_step:
            return
        self.stopping = self._agreed(trainer)
        # The last step is saved here and not after it: then Lightning counts the epoch as over,
        # and a run that goes on from there would skip the rest of the epoch.
        # Nor in a step that was left out: it may be the first of those after which none is taken.
        due = step % self.every_n_steps == 0 and not module.skipped
        if due or step == trainer.max_steps or self.stopping:
            self._save(trainer)

    def _agreed(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self.received is not None
        if trainer.global_step % trainer.log_every_n_steps:
            return False
        return trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not where it is saved: what was logged in that step is written only after it.
        self._stop_if_saved(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, *batch: Any
    ) -> None:
        if trainer.world_size == 1 and self.received and self.saved_step == trainer.global_step:
            self.stopping = True  # a resumed run begins with this validation
        self._stop_if_saved(trainer)

    def _stop_if_saved(self, trainer: Trainer) -> None:
        if self.stopping and self.saved_step == trainer.global_step and trainer.global_step:
            raise TrainingInterrupted(
                self.received or "a signal to another process", trainer.global_step
            )

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step != self.saved_step:
            self._save(trainer)
        self._restore_handlers()

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:
            return
        trainer.save_checkpoint(self.path, weights_only=False)  # on every rank: it is a collective
        self.saved_step = trainer.global_step


class ElasticResume(Callback):
    """Lets a resumed run go on exactly where Lightning's own counters would not let it.

    With another global batch than before, a batch's number says nothing about how far the epoch
    is; what is left of it is the loader's to say. And a validation that falls on the step of the
    checkpoint is made, or made again: whether it had come to its end is not known.
    """

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        if not loop.restarting:
            return
        if loop.restarted_on_train_batch_end and isinstance(trainer.val_check_batch, int):
            if loop.batch_progress.total.ready % trainer.val_check_batch == 0:
                loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
                loop.val_loop.restarting = False  # from its first batch
                loop._batches_that_stepped -= 1  # which Lightning adds before and after it
        progress, loader = loop.batch_progress, trainer.train_dataloader
        done = len(loader) - (0 if progress.is_last_batch else loader.remaining)
        shift = done - progress.current.ready
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress.current, name, getattr(progress.current, name) + shift)


class FinalValidation(Callback):
    """Makes the last step be followed by a validation, wherever it falls between two of them."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
