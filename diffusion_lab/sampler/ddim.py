r"""Denoising diffusion implicit models (DDIM): from deterministic (η = 0) to ancestral (η = 1).

    x_s = α_s x̂ + √(σ_s² - s_t²) ε̂ + s_t z,    s_t² = η² v σ_s² / σ_t²,

v = σ_t² - (α_t / α_s)² σ_s². With η = 0 it is Euler's method for the probability-flow ODE.

Source:
    Song, Meng, Ermon, "Denoising diffusion implicit models", 2021, eq. 12 and 16.
"""

__all__ = ["DDIM"]

import torch
from torch import Tensor

from diffusion_lab.constraints import PositiveInt, UnitInterval, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.sampler.time_grid import TimeGrid
from diffusion_lab.transition import transition


class DDIM(Sampler):
    """DDIM sampler, which needs few steps.

    Arguments:
        steps: The number N of steps.
        eta: η, the fraction of the ancestral noise; at 0 the result is a function of the start
            alone.
        grid: See `Sampler`; uniform in t by default.
        clip: Whether x̂ is clipped to [-1, 1]; ε̂ is computed from the clipped one.
    """

    @checked
    def __init__(
        self,
        steps: PositiveInt = 50,
        eta: UnitInterval = 0.0,
        grid: TimeGrid | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__(steps, grid, clip)
        self.eta = eta
        self.stochastic = eta > 0

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, denoised = state.x_t, state.denoised
        alpha_s, sigma_s, alpha_t, sigma_t, v = transition(denoiser.schedule, state.t, s)
        std = self.eta * torch.sqrt(v) * sigma_s / sigma_t
        epsilon = (x_t - alpha_t * denoised) / sigma_t
        x_s = alpha_s * denoised + torch.sqrt((sigma_s**2 - std**2).clamp(min=0)) * epsilon
        return x_s + std * noise(x_t) if self.stochastic else x_s
