r"""Ancestral sampling of DDPM, on every time or on a subset of them.

The step from t to s draws from the Gaussian q(x_s | x_t, x_0 = x̂). With a = α_t / α_s and
β = 1 - a² (DDPM's a_t and β_t where s is the index before t),

    x_s = (a σ_s² x_t + α_s β x̂) / σ_t² + s_t z
        = 1/a (x_t - β / σ_t ε̂) + s_t z,

    s_t² = β σ_s² / σ_t²  ("small": exact if x_0 is known; written β̃_t)   or   β  ("large").

Source:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 6, 7 and algorithm 2.
"""

__all__ = ["Ancestral", "transition"]

import torch
from torch import Tensor

from diffusion_lab.sampler.base import Sampler
from diffusion_lab.schedule import Schedule

VARIANCES = ("small", "large")


def transition(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """Returns α_s, σ_s, α_t, σ_t and β = 1 - α_t² / α_s² of the step from t to s, float64."""
    alpha_s, sigma_s = schedule(s.double())
    alpha_t, sigma_t = schedule(t.double())
    return alpha_s, sigma_s, alpha_t, sigma_t, 1 - (alpha_t / alpha_s) ** 2


class Ancestral(Sampler):
    """DDPM's own sampler.

    Arguments:
        steps: The number N of steps; 1000 is every index of a schedule with T = 1000.
        variance: "small" (β̃_t, what CelebA-HQ wants) or "large" (β_t, what few steps want).
        clip: Whether x̂ is clipped to [-1, 1].

    Raises:
        ValueError: If `variance` is neither.
    """

    def __init__(self, steps: int = 1000, variance: str = "small", clip: bool = False) -> None:
        super().__init__(steps, clip)
        if variance not in VARIANCES:
            raise ValueError(f"variance={variance!r} is unknown; choose small or large")
        self.variance = variance

    def step(
        self, schedule: Schedule, x_t: Tensor, denoised: Tensor, t: Tensor, s: Tensor, z: Tensor
    ) -> Tensor:
        alpha_s, sigma_s, alpha_t, sigma_t, beta = transition(schedule, t, s)
        mean_of_x = (alpha_t / alpha_s) * sigma_s**2 / sigma_t**2
        mean_of_denoised = alpha_s * beta / sigma_t**2
        variance = beta * sigma_s**2 / sigma_t**2 if self.variance == "small" else beta
        std = torch.sqrt(variance) * (s > 0)  # the last step adds no noise (algorithm 2, line 3)
        return mean_of_x.to(x_t) * x_t + mean_of_denoised.to(x_t) * denoised + std.to(x_t) * z
