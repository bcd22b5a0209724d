"""Locks that keep two commands from writing into one run directory."""

__all__ = ["LOCK_FILE", "RANKS_LOCK_FILE", "LockError", "lock_directory", "lock_ranks"]

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.errors import RunError

LOCK_FILE = ".lock"  # locked while a command uses the directory; the file itself stays
RANKS_LOCK_FILE = ".lock-ranks"  # locked by the first of the processes that a command starts
OWNER_FILE = ".lock-owner.json"  # process and host of the command
TIMEOUT = 15.0  # seconds until the processes of a killed command have ended by themselves


class LockError(RunError):
    """Another command uses the directory."""


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Context in which no other command can use a directory; creates the directory.

    The operating system releases the lock at any end of the process, also by SIGKILL.

    Arguments:
        directory: Directory of a run, an evaluation or a sweep.

    Raises:
        LockError: If another command uses the directory.
        RunError: If it cannot be written.
    """
    owner = directory / OWNER_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = _acquired(directory, LOCK_FILE)
    except OSError as error:
        raise RunError(
            f"cannot write to {directory}: {error.strerror or error}; choose another directory "
            "with hydra.run.dir= or hydra.sweep.dir="
        ) from error
    try:
        _acquired(directory, RANKS_LOCK_FILE).release()
        with contextlib.suppress(OSError):  # for messages only
            write_atomic(owner, json.dumps(_this_process()).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


@contextmanager
def lock_ranks(directory: Path) -> Iterator[None]:
    """Context of the first of several processes that a command starts for its devices.

    They end shortly after the command itself was killed; until then they hold this lock.

    Arguments:
        directory: Directory of the run or evaluation.

    Raises:
        LockError: If the processes of another command use it.
    """
    with _acquired(directory, RANKS_LOCK_FILE):
        yield


def _acquired(directory: Path, name: str) -> FileLock:
    """A lock of the directory, acquired.

    Processes that a killed command has started hold its lock for some seconds.
    """
    lock = FileLock(directory / name)
    owner = _read_owner(directory)
    ended = owner.get("host") == socket.gethostname() and not _alive(owner["pid"])
    try:
        lock.acquire(timeout=TIMEOUT if ended or name == RANKS_LOCK_FILE else 0)
    except Timeout as error:
        by = "another command"
        if owner:
            by = f"process {owner['pid']} on {owner['host']}"
            by += ", which has ended, or a process that it started" if ended else ""
        raise LockError(
            f"{directory} is in use by {by}; wait until that has ended, or stop it"
        ) from error
    return lock


def _this_process() -> dict[str, str | int]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _read_owner(directory: Path) -> dict[str, Any]:
    try:
        owner: dict[str, Any] = json.loads((directory / OWNER_FILE).read_text())
        return owner if {"pid", "host"} <= owner.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return True
