"""Noise schedules of the VP, sub-VP and VE SDEs (Song et al., 2021)."""

__all__ = ["VE", "VP", "SubVP"]

import math

import torch
from torch import Tensor

from diffusion_lab.constraints import NonNegative, OpenUnit, Positive, checked
from diffusion_lab.schedule.base import Schedule, check_order


class _LinearBeta(Schedule):
    """Song et al.'s SDEs with β(t) = β_min + t (β_max - β_min), and B(t) = ∫_0^t β.

    Arguments:
        beta_min: β(0).
        beta_max: β(1), above `beta_min`.
        t_min: The smallest training time.

    Raises:
        ValueError: If `beta_min` is not below `beta_max`.
    """

    @checked
    def __init__(
        self, beta_min: NonNegative = 0.1, beta_max: Positive = 20.0, t_min: OpenUnit = 1e-3
    ) -> None:
        super().__init__()
        check_order(beta_min=beta_min, beta_max=beta_max)
        self.beta_min, self.beta_max, self.t_min = beta_min, beta_max, t_min

    def _beta(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Tensor | float) -> Tensor:
        """B(t)."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def _t_from_integral(self, integral: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2 * slope * integral)
        return 2 * integral / (self.beta_min + root).clamp(min=1e-300)  # not 0 / 0 at t = 0

    def drift(self, t: Tensor | float) -> Tensor:
        return -self._beta(t) / 2


class VP(_LinearBeta):
    """Variance-preserving SDE, f = -β/2, g = √β: α_t² = e^{-B(t)}, σ_t² = 1 - α_t².

    The limit of DDPM's linear schedule for many steps (Song et al., 2021, eq. 11 and 33).
    """

    variance_preserving = True

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self._integral(t)
        return torch.exp(-integral / 2), torch.sqrt(-torch.expm1(-integral))

    def ratio(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(torch.expm1(self._integral(t)))

    def _inverse(self, ratio: Tensor) -> Tensor:
        return self._t_from_integral(torch.log1p(ratio**2))

    def diffusion(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(self._beta(t))

    def diffusion_integral(self, t: Tensor | float) -> Tensor:
        return self._integral(t)


class SubVP(_LinearBeta):
    """Sub-VP SDE, f = -β/2, g² = β (1 - e^{-2B}): α_t = e^{-B/2}, σ_t = 1 - e^{-B}.

    Song et al., 2021, eq. 14 and 33.
    """

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self._integral(t)
        return torch.exp(-integral / 2), -torch.expm1(-integral)

    def ratio(self, t: Tensor | float) -> Tensor:
        return 2 * torch.sinh(self._integral(t) / 2)

    def _inverse(self, ratio: Tensor) -> Tensor:
        return self._t_from_integral(2 * torch.asinh(ratio / 2))

    def diffusion(self, t: Tensor | float) -> Tensor:
        return torch.sqrt(-self._beta(t) * torch.expm1(-2 * self._integral(t)))

    def diffusion_integral(self, t: Tensor | float) -> Tensor:
        integral = self._integral(t)
        return integral + torch.expm1(-2 * integral) / 2


class VE(Schedule):
    """Variance-exploding SDE, f = 0: α_t = 1, σ_t² = σ_min² ((σ_max / σ_min)^{2t} - 1).

    Song et al., 2021, eq. 30 and 31, minus σ_min², as σ_0 = 0 here: σ_1 is σ_max up to a factor
    √(1 - (σ_min / σ_max)²).

    Arguments:
        sigma_min: σ_min, in units of x_0.
        sigma_max: σ_max, above `sigma_min`; about the largest distance between two training
            examples.

    Raises:
        ValueError: If `sigma_min` is not below `sigma_max`.
    """

    @checked
    def __init__(self, sigma_min: Positive = 0.01, sigma_max: Positive = 348.0) -> None:
        super().__init__()
        check_order(sigma_min=sigma_min, sigma_max=sigma_max)
        self.sigma_min, self.growth = sigma_min, math.log(sigma_max / sigma_min)
        self.t_min = math.log(2) / (2 * self.growth)  # where σ_t = σ_min

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * torch.sqrt(torch.expm1(2 * self.growth * t))

    def _inverse(self, ratio: Tensor) -> Tensor:
        return torch.log1p((ratio / self.sigma_min) ** 2) / (2 * self.growth)

    def drift(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(torch.as_tensor(t, dtype=torch.float64))

    def diffusion(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return self.sigma_min * torch.exp(self.growth * t) * math.sqrt(2 * self.growth)

    def diffusion_integral(self, t: Tensor | float) -> Tensor:
        return self.alpha_sigma(torch.as_tensor(t, dtype=torch.float64))[1] ** 2
