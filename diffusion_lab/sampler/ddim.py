r"""Denoising diffusion implicit models: from deterministic (η = 0) to ancestral (η = 1).

    x_s = α_s x̂ + √(σ_s² - s_t²) ε̂ + s_t z,    s_t = η √(β σ_s² / σ_t²),    β = 1 - α_t² / α_s².

Source:
    Song, Meng, Ermon, "Denoising diffusion implicit models", 2021, eq. 12 and 16.
"""

__all__ = ["DDIM"]

import torch
from torch import Tensor

from diffusion_lab.sampler.ancestral import transition
from diffusion_lab.sampler.base import Sampler
from diffusion_lab.schedule import Schedule


class DDIM(Sampler):
    """Song et al.'s sampler, which needs few steps.

    Arguments:
        steps: The number N of steps.
        eta: The share η in [0, 1] of the ancestral noise; at 0 the result is a function of the
            start alone.
        clip: Whether x̂ is clipped to [-1, 1]; ε̂ follows from the clipped one.

    Raises:
        ValueError: If η is outside [0, 1].
    """

    def __init__(self, steps: int = 50, eta: float = 0.0, clip: bool = False) -> None:
        super().__init__(steps, clip)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} is not allowed; it lies in [0, 1]")
        self.eta = eta
        self.stochastic = eta > 0

    def step(
        self, schedule: Schedule, x_t: Tensor, denoised: Tensor, t: Tensor, s: Tensor, z: Tensor
    ) -> Tensor:
        alpha_s, sigma_s, alpha_t, sigma_t, beta = transition(schedule, t, s)
        std = self.eta * torch.sqrt(beta) * sigma_s / sigma_t
        epsilon = (x_t - alpha_t.to(x_t) * denoised) / sigma_t.to(x_t)
        direction = torch.sqrt((sigma_s**2 - std**2).clamp(min=0))
        return alpha_s.to(x_t) * denoised + direction.to(x_t) * epsilon + std.to(x_t) * z
