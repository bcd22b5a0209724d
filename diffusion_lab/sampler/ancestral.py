r"""Ancestral sampling of DDPM, on every time or on a subset of them.

The step from t to s draws from the Gaussian q(x_s | x_t, x_0 = x̂). With a = α_t / α_s and
v = σ_t² - a² σ_s² (DDPM's √a_t and β_t where s is the index before t),

    x_s = (a σ_s² x_t + α_s v x̂) / σ_t² + s_t z
        = 1/a (x_t - v / σ_t ε̂) + s_t z,

    s_t² = v σ_s² / σ_t²  ("small": exact if x_0 is known; written β̃_t)   or   v  ("large"),

or between them for each number of the image, where the network has learned it ("learned").

Sources:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, eq. 6, 7 and algorithm 2.
    Nichol, Dhariwal, "Improved denoising diffusion probabilistic models", 2021, eq. 15 and 19.
"""

__all__ = ["Ancestral"]

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.sampler.time_grid import Grid
from diffusion_lab.schedule import Schedule, SubVP
from diffusion_lab.transition import step_variance, transition

FIXED = {"small": 0.0, "large": 1.0}  # the shares that are not learned


class Ancestral(Sampler):
    """DDPM's own sampler.

    Arguments:
        steps: The number N of steps; 1000 is every index of a schedule with T = 1000.
        variance: "small" (β̃_t, what CelebA-HQ wants), "large" (β_t, what few steps want) or
            "learned" (of a network that was trained with `loss.Hybrid`; its share is that of the
            chain's own steps, so for long ones it is near the right variance, and small).
        grid: See `Sampler`; uniform in t by default.
        clip: Whether x̂ is clipped to [-1, 1].

    Raises:
        ValueError: If `variance` is none of them.
    """

    def __init__(
        self, steps: int = 1000, variance: str = "small", grid: Grid | None = None,
        clip: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(steps, grid, clip)
        if variance not in (*FIXED, "learned"):
            raise ValueError(f"variance={variance!r} is unknown; choose small, large or learned")
        self.variance = variance

    def check(self, schedule: Schedule) -> None:
        if isinstance(schedule, SubVP):
            raise ValueError(
                "ancestral sampling is that of the discrete chains behind VP and VE (Song et al., "
                "2021, appendix F); the sub-VP SDE has none. Take euler_maruyama, heun, or ddim "
                "with eta=1"
            )

    def _share(self, state: State) -> Tensor | float:
        """The share of v in the variance of the step from a state.

        Raises:
            ConfigError: If it should be learned and is not.
        """
        if self.variance in FIXED:
            return FIXED[self.variance]
        if state.share is None:
            raise ConfigError(
                "sampler.variance=learned: this denoiser has no learned variance. Set "
                "sampler.variance=small or large, or train a network with "
                "network.learn_variance=true loss=hybrid; under another schedule= and with a "
                "guidance= that changes E[x_0 | x_t] the learned one does not hold either"
            )
        return state.share.double()

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, share = state.x_t, self._share(state)
        alpha_s, sigma_s, alpha_t, sigma_t, v = transition(denoiser.schedule, state.t, s)
        mean_of_x = (alpha_t / alpha_s) * sigma_s**2 / sigma_t**2
        mean_of_denoised = alpha_s * v / sigma_t**2
        std = torch.sqrt(step_variance(v, sigma_s, sigma_t, share))
        if s == 0:  # the last step adds no noise (algorithm 2, line 3)
            std = torch.zeros_like(std)
        mean = mean_of_x.to(x_t.dtype) * x_t + mean_of_denoised.to(x_t.dtype) * state.denoised
        return mean + std.to(x_t.dtype) * noise(x_t)
