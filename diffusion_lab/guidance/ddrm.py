r"""Denoising diffusion restoration models: DDIM, one coefficient of the operator at a time.

With A = U S Vᵀ, an observation tells of the coefficients c = Vᵀ x_0 where s_i > 0

    ȳ_i = (S⁺ Uᵀ y)_i = c_i + ν_i n_i,    ν_i = σ_y / s_i,

and nothing (ν_i = ∞) where s_i = 0. At the ratio r = σ_t / α_t the state's coefficient is
c_i + r n_i: y knows it better than the state does if r >= ν_i. The start is

    α_1 ȳ_i + √(σ_1² - α_1² ν_i²) z_i where r_1 >= ν_i,    pure noise elsewhere,

and a step, with ĉ = Vᵀ x̂ and ε̂ the coefficients of the estimated noise, goes to

    α_s ĉ_i + σ_s (√(1 - η²) ε̂_i + η z_i)                               where s_i = 0,
    α_s ((1 - η_b) ĉ_i + η_b ȳ_i) + √(σ_s² - η_b² α_s² ν_i²) z_i         where r_s >= ν_i,
    α_s ĉ_i + σ_s (√(1 - η²) (ȳ_i - ĉ_i) / ν_i + η z_i)                  elsewhere.

Without noise, σ_y = 0, the result fits the observation as far as η_b says: A x_0 = y for η_b = 1.

Source:
    Kawar, Elad, Ermon, Song, "Denoising diffusion restoration models", 2022, section 3.
"""

__all__ = ["DDRM", "DDRMSampler"]

import math

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.svd_steps import Spectrum
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler, State
from diffusion_lab.transition import transition


class DDRMSampler(Sampler):
    """The steps of `DDRM`.

    Arguments:
        like: The sampler whose number of steps, grid and clipping are taken.
        spectrum: What was seen.
        eta: η.
        eta_b: η_b.
    """

    def __init__(self, like: Sampler, spectrum: Spectrum, eta: float, eta_b: float) -> None:
        super().__init__(like.steps, like.grid, like.clip)
        self.spectrum, self.eta, self.eta_b = spectrum, eta, eta_b

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, y, vt = state.x_t, self.spectrum.y, self.spectrum.operator.vt
        step = transition(denoiser.schedule, state.t, s).like(x_t)
        alpha_s, sigma_s, alpha_t, sigma_t = step[:4]
        share, eta_b, nu = math.sqrt(1 - self.eta**2), self.eta_b, self.spectrum.nu
        c, z = vt(state.denoised), vt(noise(x_t))
        epsilon = vt((x_t - alpha_t * state.denoised) / sigma_t)
        free = alpha_s * c + sigma_s * (share * epsilon + self.eta * z)
        seen = alpha_s * c + sigma_s * (share * (y - c) / nu + self.eta * z)
        std = torch.sqrt((sigma_s**2 - (eta_b * alpha_s * nu) ** 2).clamp(min=0))
        known = alpha_s * ((1 - eta_b) * c + eta_b * y) + std * z
        c_s = torch.where(nu.isfinite(), seen, free)
        return self.spectrum.operator.v(torch.where(sigma_s >= alpha_s * nu, known, c_s))


class DDRM(Guidance):
    """Restores by DDIM's steps on the coefficients of a linear operator.

    The sampler gives the number of steps, the grid and the clipping; its own step is not used.
    One call of the network a step.

    Arguments:
        eta: The share η in [0, 1] of fresh noise where y is no help (yet, or any more).
        eta_b: η_b in [0, 1]: how far y replaces x̂ where y knows better than the state.

    Raises:
        ValueError: If η or η_b is outside [0, 1].
    """

    requires = "svd"
    noiseless = True

    def __init__(self, eta: float = 0.85, eta_b: float = 1.0) -> None:
        for key, value in (("eta", eta), ("eta_b", eta_b)):
            if not 0 <= value <= 1:
                raise ValueError(f"{key}={value} is not allowed; it lies in [0, 1]")
        self.eta, self.eta_b = eta, eta_b

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        spectrum, operator = Spectrum.of(observation), observation.svd
        z, schedule = observation.noise(generator), denoiser.schedule
        ends = (c.to(z) for c in schedule(torch.ones((), dtype=torch.float64)))
        c = operator.vt(z)
        start = operator.v(spectrum.replaced(schedule.prior_std * c, c, *ends))
        method = DDRMSampler(sampler, spectrum, self.eta, self.eta_b)
        return method(denoiser, start, generator=generator, callback=callback)
