"""Launcher of one process per device on this machine, as torchrun would start them.

Every rank gets the command's final configuration and the environment variables that Lightning
reads. The command only waits and never is a rank itself: the next job of a sweep is not affected
by this one, and a rank that dies, or hangs because another rank died, fails its own job alone.

torch's `elastic_launch` is not used: it kills ranks 30 seconds after a signal, while a checkpoint
may still be written; a second signal does not end it sooner; and its ranks survive if the command
itself is killed.
"""

__all__ = ["launch"]

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.errors import RunError

ROOT = Path(__file__).parents[2]  # a checkout that is not installed is not on sys.path
PROGRAM = [
    sys.executable, "-c",
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    "from diffusion_lab.command.worker import main; main(*sys.argv[1:])",
]  # fmt: skip
LOOPBACK = "127.0.0.1"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TERMINATE_TIMEOUT = 10.0  # seconds after a rank has failed until the others are killed


def launch(command: str, config: DictConfig, count: int) -> None:
    """Runs a command on several devices of this machine and waits for its end.

    Arguments:
        command: "train" or "eval".
        config: Its configuration, checked.
        count: The number of devices.

    Raises:
        RunError: If a rank fails; with the message of that rank.
        SystemExit: If a signal has ended the ranks.
    """
    with _folder(Path(config.paths.output_dir)) as folder:
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
        logs = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
        OmegaConf.save(OmegaConf.create(logs), folder / "logs.yaml")
        ranks: list[subprocess.Popen[bytes]] = []
        with _forwarding(ranks) as received:
            # Rank 0 serves the store at this socket, which other machines cannot reach.
            with socket.create_server((LOOPBACK, 0)) as listener:
                environment = _environment(count, listener)
                for k in range(count):
                    if received:
                        break
                    ranks.append(
                        subprocess.Popen(
                            [*PROGRAM, command, str(folder)],
                            env={**environment, "LOCAL_RANK": str(k)},
                            pass_fds=[] if k else [listener.fileno()],
                            start_new_session=True,  # Ctrl-C is forwarded by this process, once
                        )
                    )
            died = _wait(ranks)
        if received:
            sys.exit(0 if died is None and received[0] is not signal.SIGINT else 128 + received[0])
        if died is not None:
            raise RunError(_reason(folder, died, ranks[died].returncode, count))


def _environment(count: int, listener: socket.socket) -> dict[str, str]:
    """The environment variables of the ranks, without their number."""
    interfaces = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in interfaces), None)
    # Gloo and NCCL also listen, at the address of the machine by default.
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ()
    return {
        **dict.fromkeys(names, str(loopback)), **os.environ,
        "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(listener.getsockname()[1]),
        "NODE_RANK": "0", "WORLD_SIZE": str(count), "DIFFUSION_LAB_PARENT": str(os.getpid()),
        "DIFFUSION_LAB_LISTENER": str(listener.fileno()),
    }  # fmt: skip


@contextmanager
def _folder(directory: Path) -> Iterator[Path]:
    """A folder in the run directory for files of the ranks.

    A command that is killed leaves it there, and the next one removes it.
    """
    folder = directory / ".ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _forwarding(ranks: list[subprocess.Popen[bytes]]) -> Iterator[list[signal.Signals]]:
    """Forwards signals to all ranks; a second signal kills them. Yields the received signals."""
    received: list[signal.Signals] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for process in ranks:
            process.send_signal(number if len(received) == 1 else signal.SIGKILL)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, forward) for number in FORWARDED} if main else {}
    try:
        yield received
    finally:
        for process in ranks:
            process.kill()  # ranks that are left if an exception was raised here
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits for the end of all ranks; returns the first one that failed, or None.

    The others may hang in a collective operation with it, and are killed after a timeout.
    """
    died, deadline = None, float("inf")
    while any(process.poll() is None for process in ranks):
        time.sleep(0.1)
        died = _first_failed(ranks) if died is None else died
        if died is not None and deadline == float("inf"):
            deadline = time.monotonic() + TERMINATE_TIMEOUT
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
    return _first_failed(ranks) if died is None else died


def _first_failed(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The first rank that was killed, otherwise the first that exited with an error."""
    codes = [process.poll() for process in ranks]
    failed = {k: code for k, code in enumerate(codes) if code}
    return min(failed, key=lambda k: failed[k] > 0) if failed else None


def _reason(folder: Path, died: int, code: int, count: int) -> str:
    if code < 0:
        return (
            f"the process of device {died} of {count} was killed by {signal.Signals(-code).name}; "
            "is the memory full?"
        )
    notes = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if notes:
        return notes[0].read_text()
    return f"the process of device {died} of {count} ended with code {code}"
