r"""DDNM and DDNM+: denoising diffusion null-space models.

Without noise, x̂ is made consistent with y in the range of A and kept in its null space,

    x̂' = x̂ - A⁺ (A x̂ - y),    x_s = α_s x̂' + σ_s (√(1 - η²) ε̂ + η z),    so that A x_0 = y.

With noise (DDNM+), in the coefficients of A = U S Vᵀ with ν_i = σ_y / s_i and ȳ = S⁺ Uᵀ y,

    ĉ'_i = ĉ_i + λ_i (ȳ_i - ĉ_i),    λ_i = 1 where r_s >= ν_i,  √(1 - η²) r_s / ν_i elsewhere,

and the added noise completes the noise of y, α_s λ_i ν_i, to the level σ_s:

    √(σ_s² - α_s² ν_i²) z_i where r_s >= ν_i,    η σ_s z_i elsewhere,

and σ_s (√(1 - η²) ε̂_i + η z_i) where s_i = 0. This equals the step of DDRM with η_b = 1.

Time travel is that of RePaint: after every j steps, x is noised again by j steps (from x_s, as in
the paper; the published code noises x̂) and the steps are repeated.

Source:
    Wang, Yu, Zhang, "Zero-shot image restoration using denoising diffusion null-space model",
    2023.
"""

__all__ = ["DDNM"]

import math

import torch
from torch import Tensor

from diffusion_lab.constraints import PositiveInt, UnitInterval, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import CustomStep, Observation
from diffusion_lab.guidance.time_travel import TimeTravelSampler
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.schedule import Schedule
from diffusion_lab.transition import transition


class DDNM(CustomStep):
    """DDNM and DDNM+: N + (r - 1) j ⌊(N - 1) / j⌋ calls of the network for N steps.

    Arguments:
        eta: The fraction η of fresh noise.
        repeats: The number r of passes over each segment of steps (time travel); 1 is no time
            travel.
        jump: The length j of a segment in steps.
    """

    requires = "svd"
    allows_noiseless = True

    @checked
    def __init__(
        self, eta: UnitInterval = 0.85, repeats: PositiveInt = 1, jump: PositiveInt = 1
    ) -> None:
        self.eta, self.repeats, self.jump = eta, repeats, jump

    def make_sampler(
        self, sampler: Sampler, observation: Observation, schedule: Schedule
    ) -> Sampler:
        steps = super().make_sampler(sampler, observation, schedule)
        return TimeTravelSampler(steps, schedule, self.repeats, self.jump)

    def step(
        self,
        denoiser: Denoiser,
        observation: Observation,
        state: State,
        s: Tensor,
        noise: Noise,
    ) -> Tensor:
        spectrum, operator = observation.spectrum, observation.svd
        x_t, nu = state.x_t, spectrum.nu
        step = transition(denoiser.schedule, state.t, s).like(x_t)
        alpha_s, sigma_s, alpha_t, sigma_t = step[:4]
        eta, kept = self.eta, math.sqrt(1 - self.eta**2)
        c, z = operator.vt(state.denoised), operator.vt(noise(x_t))
        epsilon = operator.vt((x_t - alpha_t * state.denoised) / sigma_t)
        accurate = sigma_s >= alpha_s * nu
        weight = torch.where(accurate, 1.0, kept * sigma_s / (alpha_s * nu))  # λ
        c = c + weight * (spectrum.y - c)
        noisy = (nu > 0) & nu.isfinite()
        rest = torch.sqrt((sigma_s**2 - (alpha_s * nu) ** 2).clamp(min=0))
        of_z = torch.where(accurate & noisy, rest, eta * sigma_s)
        of_epsilon = torch.where(noisy, 0.0, kept * sigma_s)
        return operator.v(alpha_s * c + of_epsilon * epsilon + of_z * z)
