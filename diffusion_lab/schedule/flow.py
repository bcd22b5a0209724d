"""Noise schedule of rectified flow (Liu, Gong, Liu, 2022)."""

__all__ = ["Flow"]

import torch
from torch import Tensor

from diffusion_lab.constraints import OpenUnit, checked
from diffusion_lab.schedule.base import Schedule


class Flow(Schedule):
    """The straight paths of flow matching: α_t = 1 - c t, σ_t = t, with c = 1 - 1e-5.

    c is not 1 so that the noise level of t = 1 is finite.

    Arguments:
        t_min: The smallest training time.
    """

    C = 1 - 1e-5

    @checked
    def __init__(self, t_min: OpenUnit = 1e-3) -> None:
        super().__init__()
        self.t_min = t_min

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - self.C * t, t.clone()

    def _inverse(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + self.C * ratio)

    def drift(self, t: Tensor | float) -> Tensor:
        return -self.C / (1 - self.C * torch.as_tensor(t, dtype=torch.float64))

    def diffusion(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return torch.sqrt(2 * t / (1 - self.C * t))

    def diffusion_integral(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return -2 * (t / self.C + torch.log1p(-self.C * t) / self.C**2)
