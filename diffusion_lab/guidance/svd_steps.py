r"""What a linear observation says of each coefficient of x_0: with A = U S Vᵀ and c = Vᵀ x_0,

    ȳ_i = (S⁺ Uᵀ y)_i = c_i + ν_i n_i,    ν_i = σ_y / s_i,    n_i ~ N(0, 1),

and nothing (ν_i = ∞) where s_i = 0. At the ratio r_t = σ_t / α_t the coefficient of x_t / α_t is
c_i + r_t n_i: y knows it better than x_t does where r_t >= ν_i.
"""

__all__ = ["Spectrum"]

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.guidance.base import Observation
from diffusion_lab.operator import SVDOperator


@dataclass(frozen=True)
class Spectrum:
    """What an observation says of each coefficient: ȳ_i = c_i + ν_i n_i.

    Attributes:
        operator: A = U S Vᵀ.
        y: ȳ = S⁺ Uᵀ y, coefficients; zero where s_i = 0.
        nu: ν_i = σ_y / s_i, of S's shape; infinite where s_i = 0.
    """

    operator: SVDOperator
    y: Tensor
    nu: Tensor

    @classmethod
    def of(cls, observation: Observation) -> "Spectrum":
        """Returns that of an observation by an `SVDOperator`, with noise of one σ_y >= 0."""
        operator, y = observation.svd, observation.y
        s = operator.singular_values.to(y)
        # Both branches are computed: what is chosen is never the division by zero.
        nu = torch.where(s > 0, float(observation.sigma_y) / s, math.inf)
        return cls(operator, torch.where(s > 0, 1 / s, 0.0) * operator.ut(y), nu)

    def replaced(self, c: Tensor, z: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns c with those coefficients replaced that y knows better than level r_t.

        c_i = α_t ȳ_i + √(σ_t² - α_t² ν_i²) z_i where r_t >= ν_i: given x_0, it is N(α_t c_i, σ_t²)
        as for any x_t.

        Arguments:
            c: Coefficients of x_t.
            z: Coefficients of noise.
            alpha_t: α_t, of y's type.
            sigma_t: σ_t, of y's type.
        """
        std = torch.sqrt((sigma_t**2 - (alpha_t * self.nu) ** 2).clamp(min=0))
        return torch.where(sigma_t >= alpha_t * self.nu, alpha_t * self.y + std * z, c)

    def pulled(self, c: Tensor, rho: Tensor | float) -> Tensor:
        """Returns the mean of N(c, ρ² I) after y was seen, c_i + ρ² / (ρ² + ν_i²) (ȳ_i - c_i).

        Arguments:
            c: Coefficients.
            rho: ρ, above 0.
        """
        return c + (self.y - c) / (1 + (self.nu / rho) ** 2)
