r"""DiffPIR: plug-and-play image restoration, with a proximal step on the observation.

    x̂' = argmin_x ‖y - A x‖² + ρ_t ‖x - x̂‖²,    ρ_t = λ σ_y² / r_t²,    r_t = σ_t / α_t,
    ε̂' = (x_t - α_t x̂') / σ_t,
    x_s = α_s x̂' + σ_s (√(1 - ζ) ε̂' + √ζ z).

The minimum is the mean of N(x̂, r_t² / λ I) given y: with A = U S Vᵀ, ĉ = Vᵀ x̂, ȳ = S⁺ Uᵀ y and
ν_i = σ_y / s_i,

    ĉ'_i = ĉ_i + (ȳ_i - ĉ_i) / (1 + λ ν_i² / r_t²).

Without noise, σ_y = 0, it is the projection onto A x = y, the limit of ρ_t -> 0. (The published
code sets σ_y = 0.001 there instead, and omits the step of the lowest level.)

Source:
    Zhu et al., "Denoising diffusion models for plug-and-play image restoration", 2023,
    algorithm 1.
"""

__all__ = ["DiffPIR"]

import math

from torch import Tensor

from diffusion_lab.constraints import Positive, UnitInterval, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import CustomStep, Observation
from diffusion_lab.sampler.base import Noise, State
from diffusion_lab.transition import transition


class DiffPIR(CustomStep):
    """DiffPIR: one call of the network per step.

    Arguments:
        prior_weight: Weight λ of x̂ against y: x_0 given x_t is assumed to spread by r_t / √λ.
        zeta: The fraction ζ of fresh noise; 0 keeps the estimated noise.
    """

    requires = "svd"
    allows_noiseless = True

    @checked
    def __init__(self, prior_weight: Positive = 7.0, zeta: UnitInterval = 0.3) -> None:
        self.prior_weight, self.zeta = prior_weight, zeta

    def step(
        self,
        denoiser: Denoiser,
        observation: Observation,
        state: State,
        s: Tensor,
        noise: Noise,
    ) -> Tensor:
        x_t, operator = state.x_t, observation.svd
        step = transition(denoiser.schedule, state.t, s).like(x_t)
        alpha_s, sigma_s, alpha_t, sigma_t = step[:4]
        rho = sigma_t / alpha_t / math.sqrt(self.prior_weight)
        c = observation.spectrum.proximal(operator.vt(state.denoised), rho)
        denoised = operator.v(c)
        epsilon = (x_t - alpha_t * denoised) / sigma_t
        mixed = math.sqrt(1 - self.zeta) * epsilon + math.sqrt(self.zeta) * noise(x_t)
        return alpha_s * denoised + sigma_s * mixed
