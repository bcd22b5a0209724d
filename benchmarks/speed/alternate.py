"""Alternating timing of several sides, each in a process of its own.

One process runs at a time, so that noise of the machine affects all sides equally and each has its
own allocator and memory. The parent sends a number of steps through a pipe, and the process
answers with the seconds that they took.
"""

__all__ = [
    "AlternatingTimer",
    "OutOfMemory",
    "TimingFailed",
    "Worker",
    "Workload",
    "now",
    "time_alternately",
]

import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from lightning import Callback, LightningModule, Trainer

TURN = 0.6  # seconds per round of the slowest side
MAX_STEPS = 100  # per round
MIN_ROUNDS = 3


class TimingFailed(RuntimeError):
    """The process of a side ended with an error; the message has its traceback."""


class OutOfMemory(RuntimeError):
    """A side ran out of memory."""


@dataclass(frozen=True)
class Workload:
    """A step that is timed, and further measurements.

    Attributes:
        step: Runs a step, without waiting for the device.
        facts: Further measurements: memory, operations, number of parameters.
    """

    step: Callable[[], Any]
    facts: dict[str, Any] = field(default_factory=dict)


class AlternatingTimer(Callback):
    """Lightning callback that runs as many training steps as the parent requests, and waits."""

    connection: Connection  # of this process, set by `_serve`

    def __init__(self) -> None:
        self.left, self.start = 0, None

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.left == 0:
            answer = {} if self.start is None else now(module.device) - self.start
            self.connection.send(answer)
            steps = self.connection.recv()
            if steps is None:
                raise SystemExit  # ends the training
            self.start, self.left = now(module.device), steps
        self.left -= 1


def now(device: torch.device | str) -> float:
    """Returns the time in seconds after all operations of the device have finished."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _free_memory(device: str) -> None:
    """Returns the cached memory of a GPU to the other processes."""
    if device == "cuda":
        torch.cuda.empty_cache()


def _serve(
    connection: Connection, make: Callable[..., Workload | None], threads: int, device: str,
    keeps_memory: bool, arguments: Mapping[str, Any],
) -> None:  # fmt: skip
    """Main function of the process of a side."""
    try:
        torch.set_num_threads(threads)
        if keeps_memory:
            from diffusion_lab.allocator import keep_memory

            keep_memory()
        AlternatingTimer.connection = connection
        connection.recv()  # "prepare"
        work = make(device=device, **arguments)
        if work is None:  # a training, which has answered through AlternatingTimer
            return
        work.step()  # compilation happens here, on all sides in parallel
        _free_memory(device)
        connection.send(work.facts)
        while (steps := connection.recv()) is not None:
            if device == "cuda":
                work.step()  # allocates the memory again
            start = now(device)
            for _ in range(steps):
                work.step()
            seconds = now(device) - start
            _free_memory(device)
            connection.send(seconds)
    except EOFError:  # the parent has ended
        return
    except torch.OutOfMemoryError as error:
        connection.send(OutOfMemory(str(error).splitlines()[0]))
    except Exception:
        connection.send(TimingFailed(traceback.format_exc()))


class Side(Protocol):
    """A side of the comparison."""

    def run(self, steps: int) -> float:
        """Runs steps; returns the seconds that they took."""


class Worker:
    """A side in a process of its own.

    Arguments:
        make: Prepares the workload in the process; called with the device and `arguments`. A
            training, which answers through `AlternatingTimer`, returns None at its end.
        threads: Threads of an operator.
        device: "cpu" or "cuda".
        keeps_memory: Whether freed memory is kept, as in our commands.
        arguments: Arguments of `make`.
    """

    def __init__(
        self, make: Callable[..., Workload | None], threads: int, device: str, keeps_memory: bool,
        arguments: Mapping[str, Any],
    ) -> None:  # fmt: skip
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, make, threads, device, keeps_memory, dict(arguments))
        )
        self.process.start()
        theirs.close()

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            raise TimingFailed("the process of a side ended without an answer") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def prepare(self) -> None:
        """Starts the preparation, without waiting for it."""
        self.connection.send("prepare")

    def facts(self) -> dict[str, Any]:
        """Waits until the side is ready; returns its facts."""
        return self._answer()

    def run(self, steps: int) -> float:
        self.connection.send(steps)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        try:
            self.connection.send(None)
            self.process.join(5)
        except OSError:
            pass
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def time_alternately(
    sides: Mapping[str, Side], rounds: int, seconds: float, steps: int | None = None
) -> dict[str, list[float]]:
    """Returns the seconds per step of each side in each round.

    The order of the sides rotates from round to round.

    Arguments:
        sides: The sides by name.
        rounds: The largest number of rounds.
        seconds: Time limit after which no further round starts; at least three are run.
        steps: Steps per round; None takes as many as last `TURN` on the slowest side.
    """
    if steps is None:
        slowest = max(side.run(1) for side in sides.values())
        steps = min(max(round(TURN / slowest), 1), MAX_STEPS)
    times: dict[str, list[float]] = {name: [] for name in sides}
    start, names = time.perf_counter(), list(sides)
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(sides[name].run(steps) / steps)
        if k + 1 >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
    return times
