r"""ΠGDM: pseudoinverse-guided diffusion models.

Data of variance s² in every direction have Cov[x_0 | x_t] = r̃_t² I, and

    p(y | x_t) = N(y; A x̂, σ_y² I + r̃_t² A Aᵀ),    r̃_t² = r_t² s² / (r_t² + s²),
    E[x_0 | x_t, y] = x̂ + σ_t² / α_t Jᵀ Aᵀ (σ_y² I + r̃_t² A Aᵀ)⁻¹ (y - A x̂),

with x̂ = E[x_0 | x_t], J = ∂x̂ / ∂x_t, r_t = σ_t / α_t. The paper has s = 1. The method is exact
for p(x_0) = N(μ, s² I). Without noise the inverse becomes the pseudoinverse, the paper's A⁺.

Source:
    Song, Vahdat, Mardani, Kautz, "Pseudoinverse-guided diffusion models for inverse problems",
    2023.
"""

__all__ = ["PiGDM"]

from torch import Tensor

from diffusion_lab.constraints import Positive, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.guidance.jacobian import tweedie_moments
from diffusion_lab.guidance.linear_solve import pull_back


class PiGDM(Guided):
    """ΠGDM: one call of the denoiser and one backward pass per step.

    Arguments:
        data_std: The standard deviation s of the data: 1 in the paper; about 0.5 for images in
            [-1, 1].
    """

    requires = "linear"
    allows_noiseless = True

    @checked
    def __init__(self, data_std: Positive = 1.0) -> None:
        self.data_std = data_std

    def posterior_mean(
        self, denoiser: Denoiser, observation: Observation, x_t: Tensor, t: Tensor
    ) -> Tensor:
        denoised, covariance = tweedie_moments(denoiser, x_t, t)
        variance = 1 / (denoiser.schedule.ratio(t) ** -2 + self.data_std**-2)
        residual = observation.y - observation.operator(denoised)
        sigma_y = float(observation.sigma_y)
        return denoised + covariance(pull_back(observation.linear, residual, variance, sigma_y))
