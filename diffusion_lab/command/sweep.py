"""Sweeps: each job ends for itself, and a summary says how all of them ended.

A job that fails notes why in its directory (`failed.json`) and lets the others go on; the command
then ends with code 1. Whatever starts the jobs (in this process, in others, on other machines),
the summary is made of their directories alone, and can be made again:

    python -m diffusion_lab.command.sweep outputs/train/ddpm_faces/2026-11-24_10-00-00
"""

__all__ = ["Sweep", "concluded", "job", "main"]

import argparse
import gc
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from diffusion_lab import runs
from diffusion_lab.errors import ConfigError, LabError
from diffusion_lab.report.sweep_report import summarize
from diffusion_lab.runs import ranks
from diffusion_lab.runs.hydra_plugins import check_plugins

log = logging.getLogger(__name__)

PARENT = "DIFFUSION_LAB_SWEEP"  # host and process of a sweep whose jobs are on the same machine
LOCAL = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")


class Sweep(Callback):
    """Told by Hydra that a sweep begins, before any of its jobs.

    Attributes:
        directory: That of the sweep which is going on in this process.
    """

    directory: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses what would fail in every job."""
        try:
            check_plugins(config.hydra)
            _check(config)
        except ConfigError as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(1)  # Hydra turns exceptions of a callback into warnings
        Sweep.directory = Path(config.hydra.sweep.dir)
        if config.hydra.launcher._target_.endswith(LOCAL):
            os.environ[PARENT] = f"{socket.gethostname()} {os.getpid()}"
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)


def _check(config: DictConfig) -> None:
    launcher, overrides = config.hydra.launcher._target_, config.hydra.overrides.task
    resumed = [text for text in overrides if text.startswith("resume=")]
    if resumed:
        raise ConfigError(
            f"{resumed[0]} continues one run, in its own directory; leave -m away, and give each "
            "run a command of its own"
        )
    directory = Path(config.hydra.sweep.dir)
    if any(directory.glob(f"*/{runs.MARKER}")) or any(directory.glob("*/checkpoints/last.ckpt")):
        raise ConfigError(
            f"hydra.sweep.dir={directory} holds the jobs of a sweep already; choose another, or "
            "continue single jobs with resume="
        )
    if ranks.external():
        raise ConfigError(
            "a sweep starts the processes of its jobs itself: leave torchrun or srun away, and "
            "set trainer.devices; on a cluster also launcher=slurm"
        )
    if launcher.endswith("SlurmLauncher") and config.trainer.devices == "auto":
        raise ConfigError(
            "launcher=slurm asks for as many GPUs as trainer.devices; that must be a number, not "
            "auto: trainer.devices=4"
        )


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


@contextmanager
def concluded() -> Iterator[None]:
    """Around a command: if it was a sweep, writes its summary.

    Raises:
        SystemExit: With code 1 if a job has failed.
    """
    handler = signal.getsignal(signal.SIGTERM)
    failed = 0
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        directory, Sweep.directory = Sweep.directory, None
        if directory is not None:
            os.environ.pop(PARENT, None)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
            failed = summarize(directory)
    if failed:
        sys.exit(1)


@contextmanager
def job(directory: Path) -> Iterator[None]:
    """Around a run: in a sweep, a failure is noted and goes no further.

    Arguments:
        directory: The run's directory.
    """
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        try:
            yield
        except LabError as error:
            raise CompactHydraException(str(error)) from error  # Hydra prints the message alone
        return
    host, _, pid = os.environ.get(PARENT, "").partition(" ")
    if host == socket.gethostname() and int(pid) != os.getpid():
        ranks.follow(int(pid))
    (directory / runs.FAILED).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        if not isinstance(error, LabError):
            traceback.print_exc()
        runs.fail(directory, error)
        log.error("failed: %s: %s", directory, error)
    except SystemExit:
        # Stopped by a signal. Here that ends the sweep; in a launcher's process it ends the job,
        # which the launcher must see to return like any other.
        if Sweep.directory is not None:
            raise
    finally:
        # What a job has left in this process must not be in the way of the next one.
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the summary of a sweep; returns 1 if a job has failed, otherwise 0."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_lab.command.sweep",
        description="Write the summary and the report of a sweep from its jobs' directories.",
    )
    parser.add_argument("directory", type=Path, help="directory of the sweep")
    directory = parser.parse_args(arguments).directory
    if not directory.is_dir():
        parser.error(f"{directory} is not a directory")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return min(1, summarize(directory))


if __name__ == "__main__":
    sys.exit(main())
