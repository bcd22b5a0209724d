"""Noise schedule of EDM (Karras et al., 2022)."""

__all__ = ["EDM"]

import math

import torch
from torch import Tensor

from diffusion_lab.schedule.base import Schedule


class EDM(Schedule):
    """Karras et al.'s σ as the time: α_t = 1, σ_t = σ_max t; networks are told log σ_t.

    Arguments:
        sigma_min: The smallest level of training and sampling, above 0.
        sigma_max: The largest, above `sigma_min`.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__()
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min={sigma_min} and sigma_max={sigma_max} are not allowed; "
                "0 < sigma_min < sigma_max"
            )
        self.sigma_max, self.t_min = sigma_max, sigma_min / sigma_max

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
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
