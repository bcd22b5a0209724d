"""Ranks of a distributed command: which process is rank 0, and how many there are.

Ranks that torchrun or srun start are left as they are. Each of them runs the whole command; rank 0
decides where the run is.
"""

__all__ = ["agree", "external", "gpus", "is_first", "processes", "set_up_ddp"]

import os
from functools import cache

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from omegaconf import DictConfig
from torch.distributed import TCPStore


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
