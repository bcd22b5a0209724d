r"""DiffPIR: plug-and-play restoration, a proximal step on the observation after each estimate.

    x̂' = argmin_x ‖y - A x‖² + ρ_t ‖x - x̂‖²,    ρ_t = λ σ_y² / r_t²,    r_t = σ_t / α_t,
    ε̂' = (x_t - α_t x̂') / σ_t,
    x_s = α_s x̂' + σ_s (√(1 - ζ) ε̂' + √ζ z).

The minimum is the mean of N(x̂, r_t² / λ I) after y was seen: with A = U S Vᵀ, ĉ = Vᵀ x̂,
ȳ = S⁺ Uᵀ y and ν_i = σ_y / s_i,

    ĉ'_i = ĉ_i + (ȳ_i - ĉ_i) / (1 + λ ν_i² / r_t²).

Without noise, σ_y = 0, this is the projection onto A x = y, the limit of ρ_t -> 0. (The published
code puts a σ_y of 0.001 there instead, and leaves out the step of the lowest level.)

Source:
    Zhu et al., "Denoising diffusion models for plug-and-play image restoration", 2023,
    algorithm 1.
"""

__all__ = ["DiffPIR", "DiffPIRSampler"]

import math

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.svd_steps import Spectrum
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler, State
from diffusion_lab.transition import transition


class DiffPIRSampler(Sampler):
    """The steps of `DiffPIR`.

    Arguments:
        like: The sampler whose number of steps, grid and clipping are taken.
        spectrum: What was seen.
        strength: λ.
        zeta: ζ.
    """

    def __init__(self, like: Sampler, spectrum: Spectrum, strength: float, zeta: float) -> None:
        super().__init__(like.steps, like.grid, like.clip)
        self.spectrum, self.strength, self.zeta = spectrum, strength, zeta

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, operator = state.x_t, self.spectrum.operator
        step = transition(denoiser.schedule, state.t, s).like(x_t)
        alpha_s, sigma_s, alpha_t, sigma_t = step[:4]
        rho = sigma_t / alpha_t / math.sqrt(self.strength)
        denoised = operator.v(self.spectrum.pulled(operator.vt(state.denoised), rho))
        epsilon = (x_t - alpha_t * denoised) / sigma_t
        mixed = math.sqrt(1 - self.zeta) * epsilon + math.sqrt(self.zeta) * noise(x_t)
        return alpha_s * denoised + sigma_s * mixed


class DiffPIR(Guidance):
    """Takes x̂ towards y by a proximal step, then to the next level.

    The sampler gives the number of steps, the grid and the clipping; its own step is not used.
    One call of the network a step.

    Arguments:
        strength: λ, above 0: the weight of x̂ against y. The spread of x_0 around x̂ is taken for
            r_t / √λ.
        zeta: The share ζ in [0, 1] of fresh noise; 0 keeps the estimated noise.

    Raises:
        ValueError: If λ is not above 0 or ζ outside [0, 1].
    """

    requires = "svd"
    noiseless = True

    def __init__(self, strength: float = 7.0, zeta: float = 0.3) -> None:
        if not strength > 0:
            raise ValueError(f"strength={strength} is not allowed; λ is above 0, for example 7")
        if not 0 <= zeta <= 1:
            raise ValueError(f"zeta={zeta} is not allowed; it lies in [0, 1]")
        self.strength, self.zeta = strength, zeta

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        method = DiffPIRSampler(sampler, Spectrum.of(observation), self.strength, self.zeta)
        start = observation.start(denoiser.schedule, generator)
        return method(denoiser, start, generator=generator, callback=callback)
