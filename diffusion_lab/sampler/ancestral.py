r"""Ancestral sampling of DDPM, on every time or on a subset of them.

The step from t to s draws from the Gaussian q(x_s | x_t, x_0 = x̂). With a = α_t / α_s and
v = σ_t² - a² σ_s² (DDPM's √a_t and β_t where s is the index before t),

    x_s = (a σ_s² x_t + α_s v x̂) / σ_t² + s_t z
        = 1/a (x_t - v / σ_t ε̂) + s_t z,

    s_t² = v σ_s² / σ_t²  ("small": exact if x_0 is known; written β̃_t)   or   v  ("large").

Source:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 6, 7 and algorithm 2.
"""

__all__ = ["Ancestral"]

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State, transition
from diffusion_lab.sampler.grid import Grid
from diffusion_lab.schedule import Schedule, SubVP

VARIANCES = ("small", "large")


class Ancestral(Sampler):
    """DDPM's own sampler.

    Arguments:
        steps: The number N of steps; 1000 is every index of a schedule with T = 1000.
        variance: "small" (β̃_t, what CelebA-HQ wants) or "large" (β_t, what few steps want).
        grid: See `Sampler`; uniform in t by default.
        clip: Whether x̂ is clipped to [-1, 1].

    Raises:
        ValueError: If `variance` is neither.
    """

    def __init__(
        self, steps: int = 1000, variance: str = "small", grid: Grid | None = None,
        clip: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(steps, grid, clip)
        if variance not in VARIANCES:
            raise ValueError(f"variance={variance!r} is unknown; choose small or large")
        self.variance = variance

    def check(self, schedule: Schedule) -> None:
        if isinstance(schedule, SubVP):
            raise ValueError(
                "ancestral sampling is that of the discrete chains behind VP and VE (Song et al., "
                "2021, appendix F); the sub-VP SDE has none. Take euler_maruyama, heun, or ddim "
                "with eta=1"
            )

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t = state.x_t
        alpha_s, sigma_s, alpha_t, sigma_t, v = transition(denoiser.schedule, state.t, s)
        mean_of_x = (alpha_t / alpha_s) * sigma_s**2 / sigma_t**2
        mean_of_denoised = alpha_s * v / sigma_t**2
        variance = v * sigma_s**2 / sigma_t**2 if self.variance == "small" else v
        std = torch.sqrt(variance) * (s > 0)  # the last step adds no noise (algorithm 2, line 3)
        mean = mean_of_x.to(x_t) * x_t + mean_of_denoised.to(x_t) * state.denoised
        return mean + std.to(x_t) * noise(x_t)
