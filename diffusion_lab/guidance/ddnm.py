r"""The denoising diffusion null-space model, DDNM, and with noise DDNM+.

Without noise, x̂ is made consistent with y in A's range and left alone in its null space,

    x̂' = x̂ - A⁺ (A x̂ - y),    x_s = α_s x̂' + σ_s (√(1 - η²) ε̂ + η z),    so that A x_0 = y.

With noise, in the coefficients of A = U S Vᵀ with ν_i = σ_y / s_i and ȳ = S⁺ Uᵀ y,

    ĉ'_i = ĉ_i + λ_i (ȳ_i - ĉ_i),    λ_i = 1 where r_s >= ν_i,  √(1 - η²) r_s / ν_i elsewhere,

and the noise is what completes the noise of y, α_s λ_i ν_i, to the level σ_s:

    √(σ_s² - α_s² ν_i²) z_i where r_s >= ν_i,    η σ_s z_i elsewhere,

and σ_s (√(1 - η²) ε̂_i + η z_i) where s_i = 0. That is DDRM's step with η_b = 1, by another way.

Time travel is RePaint's: after every j steps x is noised again by as many (from x_s, as in the
paper; its published code does it from x̂), and the steps are repeated.

Source:
    Wang, Yu, Zhang, "Zero-shot image restoration using denoising diffusion null-space model",
    2023.
"""

__all__ = ["DDNM", "DDNMSampler"]

import math

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.svd_steps import Spectrum
from diffusion_lab.guidance.time_travel import Travelling, check_travel
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler, State
from diffusion_lab.transition import transition


class DDNMSampler(Sampler):
    """The steps of `DDNM`.

    Arguments:
        like: The sampler whose number of steps, grid and clipping are taken.
        spectrum: What was seen.
        eta: η.
    """

    def __init__(self, like: Sampler, spectrum: Spectrum, eta: float) -> None:
        super().__init__(like.steps, like.grid, like.clip)
        self.spectrum, self.eta = spectrum, eta

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, vt, nu = state.x_t, self.spectrum.operator.vt, self.spectrum.nu
        step = transition(denoiser.schedule, state.t, s).like(x_t)
        alpha_s, sigma_s, alpha_t, sigma_t = step[:4]
        share = math.sqrt(1 - self.eta**2)
        c, z = vt(state.denoised), vt(noise(x_t))
        epsilon = vt((x_t - alpha_t * state.denoised) / sigma_t)
        known = sigma_s >= alpha_s * nu
        strength = torch.where(known, 1.0, share * sigma_s / (alpha_s * nu))
        c = c + strength * (self.spectrum.y - c)
        noisy = (nu > 0) & nu.isfinite()
        rest = torch.sqrt((sigma_s**2 - (alpha_s * nu) ** 2).clamp(min=0))
        of_z = torch.where(known & noisy, rest, self.eta * sigma_s)
        of_epsilon = torch.where(noisy, 0.0, share * sigma_s)
        return self.spectrum.operator.v(alpha_s * c + of_epsilon * epsilon + of_z * z)


class DDNM(Guidance):
    """Puts y in place of x̂ in the range of a linear operator, at every step.

    The sampler gives the number N of steps, the grid and the clipping; its own step is not used.
    N + (r - 1) j ⌊(N - 1) / j⌋ calls of the network.

    Arguments:
        eta: The share η in [0, 1] of fresh noise.
        repeats: r, how often each stretch of steps is walked (time travel), at least 1; 1 is no
            time travel.
        jump: The length j of a stretch in steps, at least 1.

    Raises:
        ValueError: If η is outside [0, 1], or r or j below 1.
    """

    requires = "svd"
    noiseless = True

    def __init__(self, eta: float = 0.85, repeats: int = 1, jump: int = 1) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} is not allowed; it lies in [0, 1]")
        check_travel(repeats, jump)
        self.eta, self.repeats, self.jump = eta, repeats, jump

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        schedule = denoiser.schedule
        steps = DDNMSampler(sampler, Spectrum.of(observation), self.eta)
        method = Travelling(steps, schedule, self.repeats, self.jump)
        start = observation.start(schedule, generator)
        return method(denoiser, start, generator=generator, callback=callback)
