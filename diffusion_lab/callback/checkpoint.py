"""Last checkpoint, interruption by signals, exact resume and final validation."""

__all__ = ["ElasticResume", "FinalValidation", "LastCheckpoint", "TrainingInterrupted"]

import os
import signal
import threading
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage

from diffusion_lab.callback.trainer_state import diffusion_module, is_debug_run
from diffusion_lab.constraints import NonEmptyStr, PositiveInt, checked

INTERRUPTED = (
    b"\nThe state is saved after the current step; press Ctrl-C again to stop without saving\n"
)


class TrainingInterrupted(BaseException):
    """A signal ended the training, and the state is saved.

    A `BaseException`, so that `except Exception` does not treat it as a failure and a sweep ends.

    Attributes:
        signal: Name of the signal.
        step: Number of optimizer steps taken.
    """

    def __init__(self, signal: str, step: int) -> None:
        super().__init__(f"{signal} after step {step}")
        self.signal, self.step = signal, step


class LastCheckpoint(Checkpoint):
    """Saves the newest state as `last.ckpt`: every N steps, at the end and on a signal.

    On Ctrl-C, and on SIGTERM and SIGUSR1, which clusters send before they stop a job, the current
    step is completed with all its accumulated batches, the state is saved and training ends; a
    second Ctrl-C ends it at once. Several devices agree on it at the next logged step, where they
    communicate already. Exceptions save nothing, because a state in the middle of a step cannot be
    resumed exactly.

    Arguments:
        directory: Directory of the checkpoint.
        every_n_steps: Number N of optimizer steps between two checkpoints.

    Raises:
        TrainingInterrupted: After a signal, when the state is saved.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    @checked
    def __init__(self, directory: NonEmptyStr, every_n_steps: PositiveInt) -> None:
        self.path = Path(directory) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.saved_step = -1
        self.last_step = -1  # at the end of the last batch
        self.received: str | None = None  # name of the signal that this process received
        self.stopping = False  # whether all devices agreed to stop
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.saved_step = self.last_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            # Lightning's handlers lose the steps after the last checkpoint, or communicate with
            # other processes in the middle of a step.
            self.handlers = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        # With several devices Lightning broadcasts a signal flag before every batch, and the host
        # waits for it while the device is idle. There is no public option to turn it off.
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None

    def _note(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            if self.received == name:
                raise KeyboardInterrupt
            # Not by `print` or logging, which this handler may have interrupted.
            os.write(2, INTERRUPTED)
        self.received = name

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = diffusion_module(module)
        step = trainer.global_step
        if step == self.last_step:
            return  # more gradients of the step are accumulated, and a checkpoint has none
        self.last_step = step
        self.stopping = self._all_agree(trainer)
        # The last step is saved here and not in on_train_end, where Lightning counts the epoch as
        # finished: a resumed run would skip the rest of it. A skipped step is not saved; it may be
        # the first of those that end the run.
        due = step % self.every_n_steps == 0 and not module.skipped
        if due or step == trainer.max_steps or self.stopping:
            self._save(trainer)

    def _all_agree(self, trainer: Trainer) -> bool:
        if trainer.world_size == 1:
            return self.received is not None
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Trainer
        if trainer.global_step % every:
            return False
        return trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not right after saving, because the loggers write the step later.
        self._stop_if_saved(trainer)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.world_size == 1 and self.received and self.saved_step == trainer.global_step:
            self.stopping = True  # a resumed run starts with this validation
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
        if is_debug_run(trainer):
            return
        trainer.save_checkpoint(self.path, weights_only=False)  # on every rank, as a collective
        self.saved_step = trainer.global_step


class ElasticResume(Callback):
    """Corrects Lightning's counters, so that a resumed run continues exactly.

    With another global batch size, the number of a batch does not determine the position in the
    epoch, which is taken from the loader instead. A validation at the step of the checkpoint is
    repeated, because it is unknown whether it was complete.
    """

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        if not loop.restarting:
            return
        if loop.restarted_on_train_batch_end and isinstance(trainer.val_check_batch, int):
            if loop.batch_progress.total.ready % trainer.val_check_batch == 0:
                loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
                loop.val_loop.restarting = False  # from the first batch
                loop._batches_that_stepped -= 1  # Lightning counts it twice
        loader: Any = trainer.train_dataloader
        progress = loop.batch_progress
        done = len(loader) - (0 if progress.is_last_batch else loader.remaining)
        shift = done - progress.current.ready
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress.current, name, getattr(progress.current, name) + shift)


class FinalValidation(Callback):
    """Validates after the last step of a training."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
