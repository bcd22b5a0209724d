r"""Denoising diffusion implicit models: from deterministic (η = 0) to ancestral (η = 1).

    x_s = α_s x̂ + √(σ_s² - s_t²) ε̂ + s_t z,    s_t² = η² v σ_s² / σ_t²,

v = σ_t² - (α_t / α_s)² σ_s². With η = 0 it is Euler's method for the probability-flow ODE.

Source:
    Song, Meng, Ermon, "Denoising diffusion implicit models", 2021, eq. 12 and 16.
"""

__all__ = ["DDIM"]

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.sampler.time_grid import Grid
from diffusion_lab.transition import transition


class DDIM(Sampler):
    """Song et al.'s sampler, which needs few steps.

    Arguments:
        steps: The number N of steps.
        eta: The share η in [0, 1] of the ancestral noise; at 0 the result is a function of the
            start alone.
        grid: See `Sampler`; uniform in t by default.
        clip: Whether x̂ is clipped to [-1, 1]; ε̂ follows from the clipped one.

    Raises:
        ValueError: If η is outside [0, 1].
    """

    def __init__(
        self, steps: int = 50, eta: float = 0.0, grid: Grid | None = None, clip: bool = False
    ) -> None:
        super().__init__(steps, grid, clip)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} is not allowed; it lies in [0, 1]")
        self.eta = eta
        self.stochastic = eta > 0

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, denoised = state.x_t, state.denoised
        alpha_s, sigma_s, alpha_t, sigma_t, v = transition(denoiser.schedule, state.t, s)
        std = self.eta * torch.sqrt(v) * sigma_s / sigma_t
        epsilon = (x_t - alpha_t.to(x_t.dtype) * denoised) / sigma_t.to(x_t.dtype)
        direction = torch.sqrt((sigma_s**2 - std**2).clamp(min=0))
        x_s = alpha_s.to(x_t.dtype) * denoised + direction.to(x_t.dtype) * epsilon
        return x_s + std.to(x_t.dtype) * noise(x_t) if self.stochastic else x_s
