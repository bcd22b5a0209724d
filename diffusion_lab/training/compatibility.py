"""Constraints between the parts of a model: network, schedule, parameterization and loss."""

__all__ = ["check_model"]

import torch
from torch import nn

from diffusion_lab.errors import ConfigError
from diffusion_lab.loss import Loss
from diffusion_lab.parameterization import Epsilon, Parameterization, Score
from diffusion_lab.schedule import DiscreteSchedule, Schedule
from diffusion_lab.timesteps import TimestepSampler, Uniform


def check_model(
    network: nn.Module,
    schedule: Schedule,
    parameterization: Parameterization,
    loss: Loss,
    time: TimestepSampler,
) -> None:
    """Checks that the parts of a model can be trained together.

    Arguments:
        network: The network; only its attribute `learn_variance` is read.
        schedule: The noise schedule.
        parameterization: The quantity that the network predicts.
        loss: The loss.
        time: The distribution of the training times.

    Raises:
        ConfigError: If two parts contradict each other; names both keys and the way out.
    """
    learns, hybrid = getattr(network, "learn_variance", False), loss.learns_variance
    if learns and not hybrid:
        raise ConfigError(
            "network.learn_variance=true, but the loss does not train the variance; add "
            "loss=hybrid, or set network.learn_variance=false"
        )
    if hybrid and not learns:
        raise ConfigError(
            "loss=hybrid trains the variance, but network.learn_variance=false; add "
            "network.learn_variance=true, or choose loss=simple"
        )
    if hybrid and not isinstance(schedule, DiscreteSchedule):
        raise ConfigError(
            "loss=hybrid is the variational bound of a chain of T steps, and "
            f"schedule={type(schedule).__name__} has none; choose schedule=linear, quadratic, "
            "cosine, sigmoid or laplace"
        )
    if hybrid and not isinstance(time, Uniform):
        raise ConfigError(
            "loss=hybrid is a sum over the T steps of the chain, from which "
            f"time={type(time).__name__} does not draw; set time=uniform"
        )
    predicts_noise = isinstance(parameterization, Epsilon | Score)
    if predicts_noise and isinstance(schedule, DiscreteSchedule) and _has_no_signal(schedule):
        raise ConfigError(
            "schedule.zero_terminal_snr=true leaves no signal at t = 1, where the noise does not "
            "determine x_0; set parameterization=v, x0 or flow"
        )


def _has_no_signal(schedule: DiscreteSchedule) -> bool:
    """Whether α is zero at t = 1, to rounding."""
    alpha_1, _ = schedule(torch.ones((), dtype=torch.float64))
    return float(alpha_1) < 1e-9
