"""Sweeps: jobs fail independently, and a summary lists the outcome of each.

A job that fails records the reason in its directory (`failed.json`) and does not stop the others;
the command then exits with code 1. The summary is computed from the directories of the jobs alone,
wherever they ran, and can be rebuilt:

    python -m diffusion_lab.command.sweep outputs/train/ddpm_faces/2026-11-24_10-00-00
"""

__all__ = ["Sweep", "command", "job_lock", "main", "sweep_job"]

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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from diffusion_lab import runs
from diffusion_lab.command.process import exit_with_parent, full_errors, is_refusal, refuse
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.redact import refuse_secrets
from diffusion_lab.report.sweep_report import summarize
from diffusion_lab.runs import ranks
from diffusion_lab.runs.hydra_plugins import check_plugins

log = logging.getLogger(__name__)

PARENT = "DIFFUSION_LAB_SWEEP"  # host and process of a sweep whose jobs run on the same machine
LOCAL = ("BasicLauncher", "JoblibLauncher", "LocalLauncher")


class Sweep(Callback):
    """Hydra callback, called once before a run or before the first job of a sweep.

    Attributes:
        directory: Directory of the sweep that runs in this process.
        locks: Locks of this process, released at the end of the command.
    """

    directory: Path | None = None
    locks = ExitStack()

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a secret and locks the directory, before Hydra writes the configuration."""
        _refuse_secrets(config)
        instance = HydraConfig.instance()
        before = instance.cfg
        instance.set_config(config)  # as Hydra itself does before it reads this key
        directory = Path(config.hydra.run.dir)
        instance.cfg = before
        if ranks.is_rank_zero():
            _lock(directory)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a sweep that would fail in every job."""
        _refuse_secrets(config)
        try:
            check_plugins(config.hydra)
            _check(config)
        except ConfigError as error:
            refuse(error)
        _lock(Path(config.hydra.sweep.dir))
        Sweep.directory = Path(config.hydra.sweep.dir)
        if config.hydra.launcher._target_.endswith(LOCAL):
            os.environ[PARENT] = f"{socket.gethostname()} {os.getpid()}"
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)


def _refuse_secrets(config: DictConfig) -> None:
    try:
        refuse_secrets(OmegaConf.to_yaml(config))  # conf/ may hold one as well
    except ConfigError as error:
        refuse(error)


def _lock(directory: Path) -> None:
    try:
        Sweep.locks.enter_context(runs.lock_directory(directory))
    except RunError as error:
        refuse(error)


def _check(config: DictConfig) -> None:
    launcher, overrides = config.hydra.launcher._target_, config.hydra.overrides.task
    resumed = [text for text in overrides if text.startswith("resume=")]
    if resumed:
        raise ConfigError(
            f"{resumed[0]} continues one run in its own directory; remove -m, and resume each run "
            "with its own command"
        )
    directory = Path(config.hydra.sweep.dir)
    if (directory / "multirun.yaml").exists() or any(directory.glob("*/.hydra")):
        raise ConfigError(
            f"hydra.sweep.dir={directory} already holds the jobs of a sweep; choose another, or "
            "continue single jobs with resume="
        )
    if ranks.launched_externally():
        raise ConfigError(
            "a sweep starts the processes of its jobs itself: run it without torchrun or srun, "
            "and set trainer.devices; on a cluster also launcher=slurm"
        )
    if launcher.endswith("SlurmLauncher") and config.trainer.devices == "auto":
        raise ConfigError(
            "launcher=slurm requests trainer.devices GPUs, which must be a number and not auto; "
            "set for example trainer.devices=4"
        )


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


@contextmanager
def command() -> Iterator[None]:
    """Context of a command: at its end the summary of a sweep is written, and locks are released.

    Raises:
        SystemExit: With code 1 if a job has failed.
    """
    handler = signal.getsignal(signal.SIGTERM)
    failed = 0
    try:
        yield
    except ValueError as error:
        if "No trials are completed" not in str(error):  # of Optuna, if each of its jobs failed
            raise
        print("no job of the search has finished with a finite loss", file=sys.stderr)
        failed = 1
    finally:
        directory, Sweep.directory = Sweep.directory, None
        if directory is not None:
            os.environ.pop(PARENT, None)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
            failed += summarize(directory)
        Sweep.locks.close()
    if failed:
        sys.exit(1)


@contextmanager
def sweep_job(directory: Path) -> Iterator[None]:
    """Context of a run; in a sweep it records a failure and does not raise it.

    Arguments:
        directory: The run's directory.
    """
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        try:
            yield
        except Exception as error:
            if full_errors() or not is_refusal(error):
                raise
            refuse(error)
        return
    host, _, pid = os.environ.get(PARENT, "").partition(" ")
    if host == socket.gethostname() and int(pid) != os.getpid():
        exit_with_parent(int(pid))
    try:
        yield
    except Exception as error:
        if not is_refusal(error):
            traceback.print_exc()
        if not isinstance(error, runs.LockError):  # otherwise it is the run of another command
            runs.mark_failed(directory, error)
        log.error("failed: %s: %s", directory, error)
    except SystemExit:
        # Stopped by a signal. In this process that ends the sweep; in the process of a launcher it
        # ends the job, which must return normally.
        if Sweep.directory is not None:
            raise
    finally:
        # Free the memory of this job for the next one in this process.
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def job_lock(directory: Path) -> Iterator[None]:
    """Context of a run inside `sweep_job`; in a sweep it locks the directory of the job.

    Arguments:
        directory: The run's directory.

    Raises:
        LockError: If another command uses the directory.
    """
    if HydraConfig.get().mode != RunMode.MULTIRUN or not ranks.is_rank_zero():
        yield  # the directory of a single run is locked already
        return
    with runs.lock_directory(directory):
        (directory / runs.FAILED_FILE).unlink(missing_ok=True)
        yield


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
    try:
        return min(1, summarize(directory))
    except OSError as error:
        print(f"the summary cannot be written: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
