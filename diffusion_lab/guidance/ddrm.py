r"""DDRM: denoising diffusion restoration models, DDIM in the singular basis of the operator.

With A = U S Vᵀ, an observation determines the coefficients c = Vᵀ x_0 where s_i > 0,

    ȳ_i = (S⁺ Uᵀ y)_i = c_i + ν_i n_i,    ν_i = σ_y / s_i,

and ν_i = ∞ where s_i = 0. At the ratio r = σ_t / α_t the coefficient of the state is c_i + r n_i:
ȳ_i is more accurate if r >= ν_i. The start is

    α_1 ȳ_i + √(σ_1² - α_1² ν_i²) z_i where r_1 >= ν_i,    pure noise elsewhere,

and a step, with ĉ = Vᵀ x̂ and ε̂ the coefficients of the estimated noise, goes to

    α_s ĉ_i + σ_s (√(1 - η²) ε̂_i + η z_i)                               where s_i = 0,
    α_s ((1 - η_b) ĉ_i + η_b ȳ_i) + √(σ_s² - η_b² α_s² ν_i²) z_i         where r_s >= ν_i,
    α_s ĉ_i + σ_s (√(1 - η²) (ȳ_i - ĉ_i) / ν_i + η z_i)                  elsewhere.

Without noise, σ_y = 0, η_b = 1 gives A x_0 = y.

Source:
    Kawar, Elad, Ermon, Song, "Denoising diffusion restoration models", 2022, section 3.
"""

__all__ = ["DDRM"]

import math

import torch
from torch import Tensor

from diffusion_lab.constraints import UnitInterval, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import CustomStep, Observation
from diffusion_lab.sampler.base import Generator, Noise, State
from diffusion_lab.transition import transition


class DDRM(CustomStep):
    """DDRM: one call of the network per step.

    Arguments:
        eta: The fraction η of fresh noise in coefficients where y is not used in place of x̂.
        eta_b: The weight η_b of y against x̂ where y is more accurate than the state.
    """

    requires = "svd"
    allows_noiseless = True

    @checked
    def __init__(self, eta: UnitInterval = 0.85, eta_b: UnitInterval = 1.0) -> None:
        self.eta, self.eta_b = eta, eta_b

    def start(self, denoiser: Denoiser, observation: Observation, generator: Generator) -> Tensor:
        spectrum, operator = observation.spectrum, observation.svd
        z, schedule = observation.noise(generator), denoiser.schedule
        alpha_1, sigma_1 = (c.to(z) for c in schedule(torch.ones((), dtype=torch.float64)))
        c = operator.vt(z)
        return operator.v(spectrum.with_replaced(schedule.prior_std * c, c, alpha_1, sigma_1))

    def step(
        self,
        denoiser: Denoiser,
        observation: Observation,
        state: State,
        s: Tensor,
        noise: Noise,
    ) -> Tensor:
        spectrum, operator = observation.spectrum, observation.svd
        x_t, y, nu = state.x_t, spectrum.y, spectrum.nu
        step = transition(denoiser.schedule, state.t, s).like(x_t)
        alpha_s, sigma_s, alpha_t, sigma_t = step[:4]
        eta, eta_b, kept = self.eta, self.eta_b, math.sqrt(1 - self.eta**2)
        c, z = operator.vt(state.denoised), operator.vt(noise(x_t))
        epsilon = operator.vt((x_t - alpha_t * state.denoised) / sigma_t)
        unobserved = alpha_s * c + sigma_s * (kept * epsilon + eta * z)
        observed = alpha_s * c + sigma_s * (kept * (y - c) / nu + eta * z)
        std = torch.sqrt((sigma_s**2 - (eta_b * alpha_s * nu) ** 2).clamp(min=0))
        accurate = alpha_s * ((1 - eta_b) * c + eta_b * y) + std * z
        c_s = torch.where(nu.isfinite(), observed, unobserved)
        return operator.v(torch.where(sigma_s >= alpha_s * nu, accurate, c_s))
