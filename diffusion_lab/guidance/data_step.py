r"""Likelihood steps: samples of x given an estimate x̂ and an observation,

    x ~ N(x; x̂, ρ² I) N(y; A(x), σ_y² I)    up to normalization.

For a linear operator A = U S Vᵀ the sample is exact. With c = Vᵀ x̂, ȳ = S⁺ Uᵀ y, ν_i = σ_y / s_i,

    c_i <- c_i + (ȳ_i - c_i) / (1 + ν_i² / ρ²) + ρ / √(1 + ρ² / ν_i²) z_i.

For a linear operator without an SVD, the system below is solved by conjugate gradients,

    x' = x̂ + ρ z,    x = x' + ρ² Aᵀ (σ_y² I + ρ² A Aᵀ)⁻¹ (y + σ_y n - A x').

For any other operator, K steps of Langevin dynamics start from x̂,

    x <- x - h ∇U(x) + √(2 h) z,    U(x) = ‖x - x̂‖² / (2 ρ²) + ‖y - A(x)‖² / (2 σ_y²),

with h a fraction of 1 / (1 / ρ² + 1 / σ_y²), which is stable for |∂A| <= 1.
"""

__all__ = ["LikelihoodStep", "data_fidelity_grad"]

import math
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.constraints import PositiveInt, Range, checked
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.linear_solve import pull_back
from diffusion_lab.operator import LinearOperator, SVDOperator
from diffusion_lab.sampler.base import Noise

StepSize = Annotated[float, Range(0, 2, low_open=True, high_open=True)]


def data_fidelity_grad(observation: Observation, x: Tensor) -> Tensor:
    """Returns ∇ ½ ‖y - A(x)‖², of shape (B, *)."""
    operator, y = observation.operator, observation.y
    if isinstance(operator, LinearOperator):
        return operator.adjoint(operator(x) - y)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        misfit = (operator(x) - y).square().sum() / 2  # the gradient of each row is its own
    return torch.autograd.grad(misfit, x)[0]


class LikelihoodStep(Guidance):
    """Base class of methods that alternate steps of the prior with likelihood steps.

    Arguments:
        langevin_steps: The number K of Langevin steps, for operators that are not linear.
        step_size: Their size h as a fraction of 1 / (1 / ρ² + 1 / σ_y²). The variance in observed
            directions is too large by about half of it; a smaller size needs more steps.
    """

    allows_noiseless = True

    @checked
    def __init__(self, langevin_steps: PositiveInt = 100, step_size: StepSize = 0.1) -> None:
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

    def likelihood_step(
        self, observation: Observation, denoised: Tensor, rho: float, noise: Noise
    ) -> Tensor:
        """Draws x ~ N(x; x̂, ρ² I) N(y; A(x), σ_y² I), of shape (B, *).

        Arguments:
            observation: y, A and σ_y; σ_y = 0 only for a linear A.
            denoised: x̂, of shape (B, *).
            rho: ρ, above 0.
            noise: Draws normal noise.
        """
        if not isinstance(observation.operator, LinearOperator):
            return self._langevin(observation, denoised, rho, noise)
        if not isinstance(observation.operator, SVDOperator):
            return self._perturbed(observation, denoised, rho, noise)
        operator, spectrum = observation.operator, observation.spectrum
        mean = spectrum.proximal(operator.vt(denoised), rho)
        std = rho / torch.sqrt(1 + (rho / spectrum.nu) ** 2)  # 0 for ν = 0, ρ for ν = ∞
        return operator.v(mean + std * operator.vt(noise(denoised)))

    def _perturbed(
        self, observation: Observation, denoised: Tensor, rho: float, noise: Noise
    ) -> Tensor:
        operator, y, sigma_y = observation.linear, observation.y, float(observation.sigma_y)
        x = denoised + rho * noise(denoised)
        residual = y + sigma_y * noise(y) - operator(x)
        variance = torch.tensor(rho**2, dtype=torch.float64)
        return x + rho**2 * pull_back(operator, residual, variance, sigma_y)

    def _langevin(
        self, observation: Observation, denoised: Tensor, rho: float, noise: Noise
    ) -> Tensor:
        precision = 1 / float(observation.sigma_y) ** 2
        h, x = self.step_size / (1 / rho**2 + precision), denoised
        for _ in range(self.langevin_steps):
            gradient = (x - denoised) / rho**2 + precision * data_fidelity_grad(observation, x)
            x = x - h * gradient + math.sqrt(2 * h) * noise(x)
        return x
