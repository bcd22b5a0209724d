r"""DMPS: diffusion model based posterior sampling, without a backward pass.

With a flat prior, x_0 given x_t is N(x_t / α_t, r_t² I) with r_t = σ_t / α_t, and

    p(y | x_t) = N(y; A x_t / α_t, σ_y² I + r_t² A Aᵀ),
    E[x_0 | x_t, y] = E[x_0 | x_t] + λ r_t² Aᵀ (σ_y² I + r_t² A Aᵀ)⁻¹ (y - A x_t / α_t),

with λ = 1. For A = I this equals the residual rule λ_t (y - x_t / α_t) with a λ_t set by the noise
levels. Where r_t is not small compared with the spread of the data, the flat prior is a
poor approximation and the samples spread too widely.

Source:
    Meng, Kabashima, "Diffusion model based posterior sampling for noisy linear inverse problems",
    2022.
"""

__all__ = ["DMPS"]

from copy import copy

from torch import Tensor

from diffusion_lab.constraints import NonNegative, checked
from diffusion_lab.denoiser import Clipped, Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.guidance.linear_solve import pull_back
from diffusion_lab.sampler.base import Callback, Generator, Sampler
from diffusion_lab.tensor import broadcast


class DMPS(Guided):
    """DMPS: one call of the denoiser per step, as many as the prior alone needs.

    The estimate is as far outside the range of pixels as x_t / α_t is. If the sampler clips, only
    the prior's estimate is clipped.

    Arguments:
        data_weight: Weight λ of the likelihood's score.
    """

    requires = "linear"
    allows_noiseless = True

    @checked
    def __init__(self, data_weight: NonNegative = 1.0) -> None:
        self.data_weight = data_weight

    def posterior_mean(
        self, denoiser: Denoiser, observation: Observation, x_t: Tensor, t: Tensor
    ) -> Tensor:
        schedule, sigma_y = denoiser.schedule, float(observation.sigma_y)
        variance = schedule.ratio(t) ** 2
        alpha_t, _ = schedule(t.double())
        residual = observation.y - observation.operator(x_t / broadcast(alpha_t, x_t))
        shift = pull_back(observation.linear, residual, variance, sigma_y)
        denoised: Tensor = denoiser(x_t, t)
        return denoised + self.data_weight * broadcast(variance, x_t) * shift

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        if sampler.clip:
            denoiser, sampler = Clipped(denoiser), copy(sampler)
            sampler.clip = False
        return super().draw(denoiser, sampler, observation, generator, callback)
