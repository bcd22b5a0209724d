"""Parts that training and evaluation make in the same way."""

__all__ = ["blocks_of", "sampler_for"]

from omegaconf import DictConfig
from torch import nn

from diffusion_lab.errors import ConfigError
from diffusion_lab.nn import UNet
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.sampler import Sampler
from diffusion_lab.schedule import Schedule


def sampler_for(config: DictConfig, schedule: Schedule) -> Sampler:
    """Makes the sampler of the configuration.

    Raises:
        ConfigError: If it is not defined under the schedule.
    """
    sampler = instantiate(config.sampler, "sampler")
    try:
        sampler.check(schedule)
    except ValueError as error:
        raise ConfigError(f"sampler={type(sampler).__name__}: {error}") from error
    return sampler


def blocks_of(network: nn.Module, setting: str) -> UNet:
    """Returns the network if it has blocks that a setting is for.

    Raises:
        ConfigError: If it has none; names the setting.
    """
    if not isinstance(network, UNet):
        raise ConfigError(
            f"{setting} is for the blocks of a UNet, and this network is a "
            f"{type(network).__name__}; leave it out"
        )
    return network
