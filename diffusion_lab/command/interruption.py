"""Interruption of an evaluation by a signal."""

__all__ = ["EvaluationInterrupted", "SignalHandlers", "stop_on_signals"]

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning import Callback, LightningModule, Trainer


class EvaluationInterrupted(BaseException):
    """A signal ended the evaluation.

    Attributes:
        signal: The signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class SignalHandlers(Callback):
    """Handlers of Ctrl-C and of the signals of a cluster.

    A Lightning callback, because Lightning replaces the handler of SIGTERM by its own, which ends
    the process with exit code 0.
    """

    HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def install(self) -> None:
        """Installs the handler."""
        for number in self.HANDLED:
            signal.signal(number, self._stop)

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self.install()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise EvaluationInterrupted(signal.Signals(number))


@contextmanager
def stop_on_signals() -> Iterator[SignalHandlers]:
    """Context in which a signal raises `EvaluationInterrupted`."""
    signals = SignalHandlers()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in signals.HANDLED}
    signals.install()
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
