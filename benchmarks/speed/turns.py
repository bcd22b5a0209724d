"""Sides that take turns: each a process of its own, of which one works at a time.

Noise of the machine meets all sides, and each has its own allocator and memory. The parent says
"run n steps" through a pipe, the side answers with the seconds that they took, and the others
wait.
"""

__all__ = ["Failed", "OutOfMemory", "Turns", "Work", "Worker", "now", "take_turns"]

import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from lightning import Callback, LightningModule, Trainer

TURN = 0.6  # seconds that a turn of the slowest side should take
MOST_STEPS = 100  # of a turn
LEAST_ROUNDS = 3


class Failed(RuntimeError):
    """A side that ended with an error, which it shows."""


class OutOfMemory(RuntimeError):
    """A side that needs more memory than the device has."""


@dataclass(frozen=True)
class Work:
    """What a side does in a step, and what else it found.

    Attributes:
        step: Does it, and waits for nothing.
        facts: Measured besides: memory, operations, numbers of parameters.
    """

    step: Callable[[], Any]
    facts: dict[str, Any] = field(default_factory=dict)


class Turns(Callback):
    """Makes a training by Lightning a side: it stops before a step until its turn has come."""

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
                raise SystemExit  # a training that is cut off
            self.start, self.left = now(module.device), steps
        self.left -= 1


def now(device: torch.device | str) -> float:
    """The time in seconds, when the device has done what it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _let_go(device: str) -> None:
    """Leaves the memory of a GPU to the others."""
    if device == "cuda":
        torch.cuda.empty_cache()


def _serve(
    connection: Connection, make: Callable[..., Work | None], threads: int, device: str,
    keeps: bool, arguments: Mapping[str, Any],
) -> None:  # fmt: skip
    """What a side's process does."""
    try:
        torch.set_num_threads(threads)
        if keeps:
            from diffusion_lab.allocator import keep_memory

            keep_memory()
        Turns.connection = connection
        connection.recv()  # "prepare"
        work = make(device=device, **arguments)
        if work is None:  # it has served by itself
            return
        work.step()  # what is compiled is compiled now, on all sides at once
        _let_go(device)
        connection.send(work.facts)
        while (steps := connection.recv()) is not None:
            if device == "cuda":
                work.step()  # takes back the memory that was left to the others
            start = now(device)
            for _ in range(steps):
                work.step()
            seconds = now(device) - start
            _let_go(device)
            connection.send(seconds)
    except EOFError:  # the parent has gone
        return
    except torch.OutOfMemoryError as error:
        connection.send(OutOfMemory(str(error).splitlines()[0]))
    except Exception:
        connection.send(Failed(traceback.format_exc()))


class Side(Protocol):
    """What takes turns."""

    def run(self, steps: int) -> float:
        """Does steps; returns the seconds that they took."""


class Worker:
    """A side in a process of its own.

    Arguments:
        make: Prepares the work there; called with the device and `arguments`. One that serves by
            itself, through `Turns`, does not return before it is over.
        threads: Threads of an operator.
        device: "cpu" or "cuda".
        keeps: Whether it keeps freed memory, as our commands do.
        arguments: Of `make`.
    """

    def __init__(
        self, make: Callable[..., Work | None], threads: int, device: str, keeps: bool,
        arguments: Mapping[str, Any],
    ) -> None:  # fmt: skip
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, make, threads, device, keeps, dict(arguments))
        )
        self.process.start()
        theirs.close()

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            raise Failed("the process of a side ended without a word") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def prepare(self) -> None:
        """Starts what `facts` waits for."""
        self.connection.send("prepare")

    def facts(self) -> dict[str, Any]:
        """Waits until the side is ready; returns what it found."""
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


def take_turns(
    sides: Mapping[str, Side], rounds: int, seconds: float, steps: int | None = None
) -> dict[str, list[float]]:
    """Returns the seconds a step of each side in each round.

    Each round begins with another side.

    Arguments:
        sides: By name.
        rounds: The largest number of rounds.
        seconds: When no further round begins, from the third on.
        steps: Of a turn; None tries one, and takes as many as last `TURN` on the slowest side.
    """
    if steps is None:
        slowest = max(side.run(1) for side in sides.values())
        steps = min(max(round(TURN / slowest), 1), MOST_STEPS)
    times: dict[str, list[float]] = {name: [] for name in sides}
    start, names = time.perf_counter(), list(sides)
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(sides[name].run(steps) / steps)
        if k + 1 >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
    return times
