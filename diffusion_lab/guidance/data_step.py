r"""Draws of x given an estimate of it and an observation: x ~ N(x; x̂, ρ² I) N(y; A(x), σ_y² I).

For a linear operator A = U S Vᵀ the draw is exact. With c = Vᵀ x̂, ȳ = S⁺ Uᵀ y, ν_i = σ_y / s_i,

    c_i <- c_i + (ȳ_i - c_i) / (1 + ν_i² / ρ²) + ρ / √(1 + ρ² / ν_i²) z_i.

For a linear operator without that decomposition the draw is as exact as conjugate gradients are:

    x' = x̂ + ρ z,    x = x' + ρ² Aᵀ (σ_y² I + ρ² A Aᵀ)⁻¹ (y + σ_y n - A x').

For any other it is K steps of Langevin dynamics from x̂,

    x <- x - h ∇U(x) + √(2 h) z,    U(x) = ‖x - x̂‖² / (2 ρ²) + ‖y - A(x)‖² / (2 σ_y²),

with h a share of the smaller scale, 1 / (1 / ρ² + 1 / σ_y²), which is stable for |∂A| <= 1.
"""

__all__ = ["Coupled", "Coupling", "misfit_gradient"]

import math

import torch
from torch import Tensor

from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.linear_solve import pull_back
from diffusion_lab.guidance.svd_steps import Spectrum
from diffusion_lab.operator import LinearOperator, SVDOperator
from diffusion_lab.sampler.base import Noise


def misfit_gradient(observation: Observation, x: Tensor) -> Tensor:
    """Returns ∇ ½ ‖y - A(x)‖², of shape (B, *)."""
    operator, y = observation.operator, observation.y
    if isinstance(operator, LinearOperator):
        return operator.adjoint(operator(x) - y)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        misfit = (operator(x) - y).square().sum() / 2  # rows do not meet in the gradient
    return torch.autograd.grad(misfit, x)[0]


class Coupling:
    """Draws x ~ N(x; x̂, ρ² I) N(y; A(x), σ_y² I): exactly for linear operators, else by Langevin.

    Arguments:
        observation: y, A and σ_y; σ_y = 0 only for a linear A.
        steps: K, the number of Langevin steps.
        size: h as a share of 1 / (1 / ρ² + 1 / σ_y²).
    """

    def __init__(self, observation: Observation, steps: int, size: float) -> None:
        self.observation, self.steps, self.size = observation, steps, size
        svd = isinstance(observation.operator, SVDOperator)
        self.spectrum = Spectrum.of(observation) if svd else None

    def __call__(self, centre: Tensor, rho: float, noise: Noise) -> Tensor:
        """Returns x, of shape (B, *).

        Arguments:
            centre: x̂, of shape (B, *).
            rho: ρ, above 0.
            noise: Draws normal noise.
        """
        if self.spectrum is None and isinstance(self.observation.operator, LinearOperator):
            return self._perturbed(centre, rho, noise)
        if self.spectrum is None:
            return self._langevin(centre, rho, noise)
        operator, nu = self.spectrum.operator, self.spectrum.nu
        mean = self.spectrum.pulled(operator.vt(centre), rho)
        std = rho / torch.sqrt(1 + (rho / nu) ** 2)  # 0 where ν = 0, ρ where it is infinite
        return operator.v(mean + std * operator.vt(noise(centre)))

    def _perturbed(self, centre: Tensor, rho: float, noise: Noise) -> Tensor:
        operator, y = self.observation.linear, self.observation.y
        sigma_y = float(self.observation.sigma_y)
        x = centre + rho * noise(centre)
        e = y + sigma_y * noise(y) - operator(x)
        variance = torch.tensor(rho**2, dtype=torch.float64)
        return x + rho**2 * pull_back(operator, e, variance, sigma_y)

    def _langevin(self, centre: Tensor, rho: float, noise: Noise) -> Tensor:
        precision = 1 / float(self.observation.sigma_y) ** 2
        h, x = self.size / (1 / rho**2 + precision), centre
        for _ in range(self.steps):
            slope = (x - centre) / rho**2 + precision * misfit_gradient(self.observation, x)
            x = x - h * slope + math.sqrt(2 * h) * noise(x)
        return x


class Coupled(Guidance):
    """A method that splits the prior from the observation, and couples them by a `Coupling`.

    Arguments:
        langevin_steps: K, the number of Langevin steps of a draw, at least 1; for operators that
            are not linear.
        step_size: Their size in (0, 2), as a share of 1 / (1 / ρ² + 1 / σ_y²). The variance of
            what y sees is too large by about half of it; the smaller, the more steps are needed.

    Raises:
        ValueError: If a setting is outside its range.
    """

    noiseless = True

    def __init__(self, langevin_steps: int = 100, step_size: float = 0.1) -> None:
        if langevin_steps < 1:
            raise ValueError(f"langevin_steps={langevin_steps} is not allowed; it is at least 1")
        if not 0 < step_size < 2:
            raise ValueError(f"step_size={step_size} is not allowed; it lies in (0, 2)")
        self.langevin_steps, self.step_size = langevin_steps, step_size

    def check(self, observation: Observation) -> None:
        super().check(observation)
        operator = observation.operator
        if not isinstance(operator, LinearOperator) and not bool(observation.sigma_y > 0):
            raise ValueError(
                f"sigma_y={observation.sigma_y}: {type(self).__name__} divides by it where "
                f"{type(operator).__name__} is not linear; set sigma_y above 0, for example "
                "sigma_y=0.01"
            )

    def coupling(self, observation: Observation) -> Coupling:
        """Returns the draw of x given x̂, ρ and y."""
        return Coupling(observation, self.langevin_steps, self.step_size)
