"""Parts that training and evaluation build in the same way."""

__all__ = ["make_sampler", "require_unet"]

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from torch import nn

from diffusion_lab.errors import ConfigError
from diffusion_lab.nn import UNet
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.sampler import Sampler
from diffusion_lab.schedule import DiscreteSchedule, Schedule


def make_sampler(
    node: DictConfig | Mapping[str, Any], schedule: Schedule, key: str = "sampler"
) -> Sampler:
    """Returns the sampler that a node describes.

    Arguments:
        node: The node.
        schedule: The schedule that it will run under.
        key: The full key of the node, for error messages.

    Raises:
        ConfigError: If it is not defined under the schedule, or takes more steps than the
            schedule has.
    """
    sampler: Sampler = instantiate(node, key)
    try:
        sampler.check(schedule)
    except ValueError as error:
        raise ConfigError(f"{key}={type(sampler).__name__}: {error}") from error
    adaptive = getattr(sampler, "adaptive", False)
    if isinstance(schedule, DiscreteSchedule) and sampler.steps > schedule.steps and not adaptive:
        raise ConfigError(
            f"{key}.steps={sampler.steps} is more than the {schedule.steps} steps of the "
            f"schedule (schedule.steps); lower it to at most {schedule.steps}"
        )
    return sampler


def require_unet(network: nn.Module, setting: str) -> UNet:
    """Returns the network if it is a UNet, which has blocks to compile or cast.

    Arguments:
        network: The network.
        setting: The setting that needs the blocks, for the error message.

    Raises:
        ConfigError: If it is another network.
    """
    if not isinstance(network, UNet):
        raise ConfigError(
            f"{setting} applies to the blocks of a UNet, and this network is a "
            f"{type(network).__name__}; remove {setting.partition('=')[0]}="
        )
    return network
