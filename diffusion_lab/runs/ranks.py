"""Ranks of a distributed command: which process is rank 0, and how many there are.

Ranks that torchrun or srun started run the whole command each; rank 0 decides the directory of the
run.
"""

__all__ = [
    "broadcast_from_rank_zero",
    "gpus",
    "is_rank_zero",
    "launched_externally",
    "num_processes",
    "serve_store",
    "set_up_ddp",
]

import os
import socket
from functools import cache
from ipaddress import ip_address

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from omegaconf import DictConfig
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not declared as exported


def launched_externally() -> bool:
    """Whether this process is a rank that torchrun, srun or `command.launcher` has started."""
    return "LOCAL_RANK" in os.environ or _srun()


def _srun() -> bool:
    """Whether srun has started this process. Lightning's own check warns if it has not."""
    shell = SLURMEnvironment.job_name() in ("bash", "interactive")
    return "SLURM_NTASKS" in os.environ and not shell


def is_rank_zero() -> bool:
    """Whether this process is rank 0, or the only one."""
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]  # set by Lightning
    return rank == 0


def num_processes(trainer: DictConfig) -> int:
    """Returns the number of devices of this machine that a trainer uses.

    Arguments:
        trainer: The node `trainer` of the configuration.
    """
    if trainer.devices != "auto":
        count: int = trainer.devices
        return count
    return max(1, gpus(trainer.accelerator, "auto"))


def set_up_ddp(batches: int, start_method: str = "popen") -> None:
    """Registers the strategy of `trainer.strategy=ddp`, also used by auto on several devices.

    Gradients are views of the buckets that are reduced over the devices, which saves a copy. The
    set of parameters with a gradient is fixed after the first step (`static_graph`), except with
    gradient accumulation, where torch would see no gradient in the first batches.

    Arguments:
        batches: Number of batches per optimizer step.
        start_method: See `DDPStrategy`.
    """
    StrategyRegistry.register(
        "ddp", DDPStrategy, override=True, start_method=start_method,
        gradient_as_bucket_view=True, static_graph=batches == 1,
    )  # fmt: skip


def gpus(accelerator: str, devices: int | str) -> int:
    """Returns the number of GPUs that a job needs.

    Arguments:
        accelerator: `trainer.accelerator`; auto, gpu and cuda need one GPU per device.
        devices: `trainer.devices`; auto uses all GPUs of this machine.
    """
    if accelerator not in ("auto", "gpu", "cuda"):
        return 0
    return torch.cuda.device_count() if devices == "auto" else int(devices)


@cache
def _store() -> TCPStore | None:
    """The key-value store of externally launched ranks before there is a process group."""
    environment: ClusterEnvironment
    if _srun():
        environment, world = SLURMEnvironment(), int(os.environ["SLURM_NTASKS"])
    else:
        elastic = TorchElasticEnvironment.detect()
        environment = TorchElasticEnvironment() if elastic else LightningEnvironment()
        world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return None
    # torchrun serves a store itself; otherwise rank 0 does, and the process group reuses it.
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = environment.main_address, environment.main_port
    if is_rank_zero() and not served:
        return serve_store(address, port, _bound(address, port))
    return TCPStore(address, port, wait_for_workers=False, multi_tenant=True)


def _bound(address: str, port: int) -> int | None:
    """A socket that listens at an address alone.

    None for a name, which may mean several addresses, and for an address that is not of an
    interface here, as in a container.
    """
    try:
        ip_address("127.0.0.1" if address == "localhost" else address)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family).detach()
    except (ValueError, OSError):
        return None


@cache  # keeps it alive
def serve_store(address: str, port: int, listener: int | None) -> TCPStore:
    """Serves the key-value store of this process, which its process group reuses.

    torch itself would listen on all interfaces, without authentication, for any address.

    Arguments:
        address: The address at which the other ranks connect.
        port: The port.
        listener: File descriptor of a socket bound to them; None binds one to all interfaces.
    """
    return TCPStore(
        address, port, is_master=True, wait_for_workers=False, multi_tenant=True,
        master_listen_fd=listener,
    )  # fmt: skip


def broadcast_from_rank_zero(value: str) -> str:
    """Returns the value of rank 0 on all externally launched ranks.

    The run's directory is named by the time, and ranks do not start in the same second.
    """
    store = _store() if launched_externally() else None
    if store is None:
        return value
    if is_rank_zero():
        store.set("diffusion_lab/agreed", value)
    agreed: bytes = store.get("diffusion_lab/agreed")
    return agreed.decode()
