"""Noise schedule of EDM (Karras et al., 2022)."""

__all__ = ["EDM"]

import math

import torch
from torch import Tensor

from diffusion_lab.constraints import Positive, checked
from diffusion_lab.schedule.base import Schedule, check_order


class EDM(Schedule):
    """α_t = 1, σ_t = σ_max t; the network's time input is proportional to log σ_t.

    Arguments:
        sigma_min: The smallest σ of training and sampling.
        sigma_max: The largest σ, above `sigma_min`.

    Raises:
        ValueError: If `sigma_min` is not below `sigma_max`.
    """

    @checked
    def __init__(self, sigma_min: Positive = 0.002, sigma_max: Positive = 80.0) -> None:
        super().__init__()
        check_order(sigma_min=sigma_min, sigma_max=sigma_max)
        self.sigma_max, self.t_min = sigma_max, sigma_min / sigma_max

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_max * t

    def _inverse(self, ratio: Tensor) -> Tensor:
        return ratio / self.sigma_max

    def drift(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(torch.as_tensor(t, dtype=torch.float64))

    def diffusion(self, t: Tensor | float) -> Tensor:
        return self.sigma_max * torch.sqrt(2 * torch.as_tensor(t, dtype=torch.float64))

    def diffusion_integral(self, t: Tensor | float) -> Tensor:
        return (self.sigma_max * torch.as_tensor(t, dtype=torch.float64)) ** 2

    def index(self, t: Tensor) -> Tensor:
        return (self.steps - 1) * (1 - torch.log(t.double()) / math.log(self.t_min))
