r"""Linear observations in the singular basis of the operator.

With A = U S Vᵀ and the coefficients c = Vᵀ x_0,

    ȳ_i = (S⁺ Uᵀ y)_i = c_i + ν_i n_i,    ν_i = σ_y / s_i,    n_i ~ N(0, 1),

and ν_i = ∞ (no observation) where s_i = 0. At the ratio r_t = σ_t / α_t the coefficient of
x_t / α_t is c_i + r_t n_i, so that ȳ_i is the more accurate of the two where r_t >= ν_i.
"""

__all__ = ["Spectrum"]

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.operator import SVDOperator


@dataclass(frozen=True)
class Spectrum:
    """Observation of each coefficient, ȳ_i = c_i + ν_i n_i.

    Attributes:
        operator: A = U S Vᵀ.
        y: ȳ = S⁺ Uᵀ y, coefficients; zero where s_i = 0.
        nu: ν_i = σ_y / s_i, of the shape of S; infinite where s_i = 0.
    """

    operator: SVDOperator
    y: Tensor
    nu: Tensor

    @classmethod
    def of(cls, operator: SVDOperator, y: Tensor, sigma_y: float) -> "Spectrum":
        """Returns the spectrum of an observation y = A x_0 + σ_y n, with one σ_y >= 0."""
        s = operator.singular_values.to(y)
        # Both branches are computed; the division by zero is never selected.
        nu = torch.where(s > 0, sigma_y / s, math.inf)
        return cls(operator, torch.where(s > 0, 1 / s, 0.0) * operator.ut(y), nu)

    def with_replaced(self, c: Tensor, z: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Returns c, with ȳ in place of the coefficients where it is more accurate than x_t.

        c_i = α_t ȳ_i + √(σ_t² - α_t² ν_i²) z_i where r_t >= ν_i: given x_0, it is N(α_t c_i, σ_t²)
        as for any x_t.

        Arguments:
            c: Coefficients of x_t.
            z: Coefficients of noise.
            alpha_t: α_t, of the type of y.
            sigma_t: σ_t, of the type of y.
        """
        std = torch.sqrt((sigma_t**2 - (alpha_t * self.nu) ** 2).clamp(min=0))
        return torch.where(sigma_t >= alpha_t * self.nu, alpha_t * self.y + std * z, c)

    def proximal(self, c: Tensor, rho: Tensor | float) -> Tensor:
        """Returns the mean of N(c, ρ² I) given y, c_i + ρ² / (ρ² + ν_i²) (ȳ_i - c_i).

        It is the proximal operator of ‖y - A x‖² / (2 σ_y²) with step ρ².

        Arguments:
            c: Coefficients.
            rho: ρ, above 0.
        """
        return c + (self.y - c) / (1 + (self.nu / rho) ** 2)
