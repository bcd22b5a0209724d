r"""TMPD: Tweedie moment projected diffusion.

    p(y | x_t) = N(y; A x̂, σ_y² I + diag(A V Aᵀ 1)),    V = Cov[x_0 | x_t] = σ_t² / α_t J,
    E[x_0 | x_t, y] = x̂ + V Aᵀ (y - A x̂) / (σ_y² + A V Aᵀ 1).

The row sums of A V Aᵀ replace its diagonal, which is correct where the matrix is diagonal.
Negative correlations make a row sum too small or negative, which is not a variance; with a small
σ_y the samples then diverge. Each sum is therefore bounded below by a fraction κ of its value for
independent data of variance 1 (with r_t = σ_t / α_t),

    A V Aᵀ 1 >= κ r_t² / (1 + r_t²) |A|² / m,    |A|² the sum of the m x d squares.

On Gaussian priors κ = 0.3 has no effect; on mixtures with σ_y = 0.01 it reduces the largest
distance to the posterior from 364 and 1e20 (of a standard deviation of 1) to below 0.8.

Source:
    Boys, Girolami, Pidstrigach, Reich, Mosca, Akyildiz, "Tweedie moment projected diffusions for
    inverse problems", 2023.
"""

__all__ = ["TMPD"]

import torch
from torch import Tensor

from diffusion_lab.constraints import UnitInterval, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.guidance.jacobian import tweedie_moments
from diffusion_lab.tensor import broadcast


class TMPD(Guided):
    """TMPD: one call of the denoiser and two backward passes per step.

    Arguments:
        floor: The fraction κ; 0 only keeps the sums from being negative.
    """

    requires = "linear"
    requires_scalar_noise = False

    @checked
    def __init__(self, floor: UnitInterval = 0.3) -> None:
        self.floor = floor

    def posterior_mean(
        self, denoiser: Denoiser, observation: Observation, x_t: Tensor, t: Tensor
    ) -> Tensor:
        y, a = observation.y, observation.linear
        denoised, covariance = tweedie_moments(denoiser, x_t, t)
        sums = a(covariance(a.adjoint(torch.ones_like(y))))
        independent = broadcast(1 / (1 + denoiser.schedule.ratio(t) ** -2), y)
        least = self._least(observation) * independent
        variance = observation.sigma_y**2 + torch.maximum(sums, least)
        return denoised + covariance(a.adjoint((y - a(denoised)) / variance))

    def _least(self, observation: Observation) -> Tensor:
        """κ |A|² / m."""
        y = observation.y
        return broadcast(self.floor * observation.squared_norm / y[0].numel(), y)
