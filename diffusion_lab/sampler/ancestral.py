r"""Ancestral sampling (DDPM) on all times of the chain or on a subset of them.

The step from t to s samples q(x_s | x_t, x_0 = x̂). With a = α_t / α_s and v = σ_t² - a² σ_s²
(DDPM's √(1 - β_t) and β_t if s is the index before t),

    x_s = (a σ_s² x_t + α_s v x̂) / σ_t² + √Σ z
        = 1/a (x_t - v / σ_t ε̂) + √Σ z,

    Σ = v σ_s² / σ_t²  ("small", written β̃_t: exact if x_0 is known)   or   v  ("large"),

or between the two for each element of x, where the network has learned it ("learned").

Sources:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 6, 7 and algorithm 2.
    Nichol, Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 15 and 19.
"""

__all__ = ["Ancestral"]

from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.constraints import PositiveInt, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.sampler.time_grid import TimeGrid
from diffusion_lab.schedule import Schedule, SubVP
from diffusion_lab.transition import transition

FIXED_FRACTIONS = {"small": 0.0, "large": 1.0}


class Ancestral(Sampler):
    """Ancestral sampler of DDPM.

    Arguments:
        steps: The number N of steps; 1000 uses every index of a schedule with T = 1000.
        variance: "small" (β̃_t, for many steps), "large" (β_t, for few steps) or "learned" (of a
            network trained with `loss.Hybrid`; the fraction between the two is that of the
            chain's own steps, so for longer steps the variance is near the right one, but small).
        grid: See `Sampler`; uniform in t by default.
        clip: Whether x̂ is clipped to [-1, 1].
    """

    @checked
    def __init__(
        self,
        steps: PositiveInt = 1000,
        variance: Literal["small", "large", "learned"] = "small",
        grid: TimeGrid | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__(steps, grid, clip)
        self.variance = variance

    def check(self, schedule: Schedule) -> None:
        if isinstance(schedule, SubVP):
            raise ValueError(
                "ancestral sampling is defined for the discrete chains of VP and VE (Song et al., "
                "2021, appendix F); the sub-VP SDE has none. Use euler_maruyama, heun, or ddim "
                "with eta=1"
            )

    def _fraction(self, state: State) -> Tensor | float:
        """The fraction between the small and the large variance.

        Raises:
            ConfigError: If it is to be a learned one and the denoiser has none.
        """
        if self.variance in FIXED_FRACTIONS:
            return FIXED_FRACTIONS[self.variance]
        if state.variance_fraction is None:
            raise ConfigError(
                "sampler.variance=learned: this denoiser has no learned variance. Set "
                "sampler.variance=small or large, or train a network with "
                "network.learn_variance=true loss=hybrid. A learned variance is not valid under "
                "another schedule=, nor with a guidance= that changes E[x_0 | x_t]"
            )
        return state.variance_fraction.double()

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, denoised = state.x_t, state.denoised
        step = transition(denoiser.schedule, state.t, s)
        alpha_s, sigma_s, alpha_t, sigma_t, v = step
        std = torch.sqrt(step.reverse_variance(self._fraction(state)))
        if s == 0:  # the last step adds no noise (algorithm 2, line 3)
            std = torch.zeros_like(std)
        mean = (
            (alpha_t / alpha_s) * sigma_s**2 / sigma_t**2 * x_t
            + alpha_s * v / sigma_t**2 * denoised
        )  # fmt: skip
        return mean + std.to(x_t.dtype) * noise(x_t)
