r"""Several devices: a process each, a rank.

A command that wants more than one device of this machine starts them itself, as torchrun would:
every rank gets the command's final configuration and the variables that Lightning looks for. The
command only waits: it never is a rank, so that the next job of a sweep finds nothing of this one,
and a rank that dies, or hangs because another died, is a failure of its job alone.

Ranks that torchrun or srun start are left as they are. Each of them runs the whole command; rank 0
decides where the run is.
"""

__all__ = [
    "agree", "external", "follow", "gpus", "is_first", "launch", "processes", "rank", "set_up_ddp",
]  # fmt: skip

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.errors import CompactHydraException
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore

from diffusion_lab.allocator import keep_memory
from diffusion_lab.errors import RunError

ROOT = Path(__file__).parents[1]  # an uninstalled checkout is not on the path by itself
PROGRAM = [
    sys.executable, "-c",
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    "from diffusion_lab.distributed import rank; rank(*sys.argv[1:])",
]  # fmt: skip
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE = 10.0  # seconds that ranks have to end by themselves when one has failed


def external() -> bool:
    """Whether this process is a rank that something else has started: torchrun, srun, or us."""
    return "LOCAL_RANK" in os.environ or _srun()


def _srun() -> bool:
    """Whether srun has started this process; Lightning's own check warns where it has not."""
    shell = SLURMEnvironment.job_name() in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and not shell


def is_first() -> bool:
    """Whether this is rank 0, or no rank at all."""
    return rank_zero_only.rank == 0


def processes(trainer: DictConfig) -> int:
    """Returns how many devices of this machine a trainer is to use.

    Arguments:
        trainer: The configuration's node `trainer`.
    """
    if trainer.devices != "auto":
        return trainer.devices
    return max(1, gpus(trainer.accelerator, "auto"))


def set_up_ddp(batches: int, start_method: str = "popen") -> None:
    """Says what `trainer.strategy=ddp` is, which `auto` takes for several devices, too.

    Gradients live in the buckets that are summed over the devices, so that nothing is copied.
    Which parameters have one is settled by the first step; but not if that is of several batches:
    torch counts from the first batch, and there hears of a gradient in the last one only.

    Arguments:
        batches: Batches of an optimizer step.
        start_method: See `DDPStrategy`.
    """
    StrategyRegistry.register(
        "ddp", DDPStrategy, override=True, start_method=start_method,
        gradient_as_bucket_view=True, static_graph=batches == 1,
    )  # fmt: skip


def gpus(accelerator: str, devices: int | str) -> int:
    """Returns how many GPUs a job needs, by the keys of its trainer.

    Arguments:
        accelerator: auto, gpu and cuda need one for each device.
        devices: Their number; auto are all of this machine.
    """
    if accelerator not in ("auto", "gpu", "cuda"):
        return 0
    return torch.cuda.device_count() if devices == "auto" else int(devices)


@cache
def _store() -> TCPStore | None:
    """What ranks from outside have in common before there is a process group."""
    environment: ClusterEnvironment
    if _srun():
        environment, world = SLURMEnvironment(), int(os.environ["SLURM_NTASKS"])
    else:
        elastic = TorchElasticEnvironment.detect()
        environment = TorchElasticEnvironment() if elastic else LightningEnvironment()
        world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return None
    # torchrun has a server of its own; else it is rank 0's, which the process group uses later.
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        environment.main_address, environment.main_port, is_master=is_first() and not served,
        wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip


def agree(value: str) -> str:
    """Returns rank 0's value on all ranks that were started from outside.

    The run's directory bears the time, and the ranks do not start in the same second.
    """
    store = _store() if external() else None
    if store is None:
        return value
    if is_first():
        store.set("diffusion_lab/agreed", value)
    return store.get("diffusion_lab/agreed").decode()


def follow(pid: int) -> None:
    """Ends this process when another one is gone, however that ended: first by SIGTERM.

    Arguments:
        pid: The other process, on this machine.
    """

    def watch() -> None:
        while _alive(pid):
            time.sleep(0.5)
        for _ in range(60):  # until somebody listens; the state is saved then
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="follow").start()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:  # gone, or the number is another user's by now
        return False
    return True


def launch(command: str, config: DictConfig, count: int) -> None:
    """Runs a command on several devices of this machine, and waits for its end.

    Arguments:
        command: "train" or "eval".
        config: Its configuration, checked.
        count: The number of devices.

    Raises:
        RunError: If a rank fails; with its message.
        SystemExit: If a signal has ended the ranks.
    """
    with TemporaryDirectory(prefix="diffusion_lab_") as folder:
        OmegaConf.save(config, Path(folder) / "config.yaml", resolve=True)
        logs = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
        OmegaConf.save(OmegaConf.create(logs), Path(folder) / "logs.yaml")
        environment = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
            "NODE_RANK": "0", "WORLD_SIZE": str(count), "DIFFUSION_LAB_PARENT": str(os.getpid()),
        }  # fmt: skip
        ranks: list[subprocess.Popen] = []
        with _forwarding(ranks) as received:
            for k in range(count):
                if received:
                    break
                ranks.append(
                    subprocess.Popen(
                        [*PROGRAM, command, folder],
                        env={**environment, "LOCAL_RANK": str(k)},
                        start_new_session=True,  # Ctrl-C reaches them from here, and once
                    )
                )
            died = _wait(ranks)
        if received:
            sys.exit(0 if died is None and received[0] is not signal.SIGINT else 1)
        if died is not None:
            raise RunError(_reason(Path(folder), died, ranks[died].returncode, count))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def _forwarding(ranks: list[subprocess.Popen]) -> Iterator[list[signal.Signals]]:
    """Passes signals on to all ranks; the second one kills them. Yields what was received."""
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
            process.kill()  # whoever is left, if something went wrong here
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen]) -> int | None:
    """Waits for the end of all ranks; returns the first that failed.

    The others may hang in a conversation with it, and then are killed after a while.
    """
    died, deadline = None, float("inf")
    while any(process.poll() is None for process in ranks):
        time.sleep(0.1)
        died = _first_failed(ranks) if died is None else died
        if died is not None and deadline == float("inf"):
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
    return _first_failed(ranks) if died is None else died


def _first_failed(ranks: Sequence[subprocess.Popen]) -> int | None:
    """One that was killed rather than one that gave up, maybe because of it."""
    codes = [process.poll() for process in ranks]
    failed = [k for k, code in enumerate(codes) if code]
    return min(failed, key=lambda k: codes[k] > 0) if failed else None


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


def rank(command: str, folder: str) -> None:
    """What each process of `launch` does.

    Arguments:
        command: "train" or "eval".
        folder: Where the configuration is, and where a failure is noted.
    """
    follow(int(os.environ["DIFFUSION_LAB_PARENT"]))
    keep_memory()
    from diffusion_lab import cli

    number = int(os.environ["LOCAL_RANK"])
    if number == 0:
        configure_log(OmegaConf.load(Path(folder) / "logs.yaml"))
    else:
        logging.getLogger().setLevel(logging.ERROR)
    config = OmegaConf.load(Path(folder) / "config.yaml")
    try:
        {"train": cli.fit, "eval": cli.test}[command](config)
    except Exception as error:
        text = str(error)
        if not isinstance(error, CompactHydraException):
            traceback.print_exc()
            text = f"device {number}: {type(error).__name__}: {error}"
        (Path(folder) / f"error-{number}").write_text(text)
        sys.exit(1)
