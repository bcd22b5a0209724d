r"""Heun's method for the probability-flow ODE, with optional churn (EDM).

In u = x_t / α_t and the ratio r, every schedule's ODE is the same, du/dr = (u - x̂) / r. One step
from r to r' is

    d = (u - x̂) / r,    ũ = u + (r' - r) d,    d' = (ũ - x̂(ũ, r')) / r',
    u' = u + (r' - r) (d + d') / 2,

and Euler's to r' = 0, where d' is not defined. With churn the step is preceded by new noise: r is
raised to r̂ = r (1 + γ), γ = min(S_churn / N, √2 - 1), and u gets S_noise √(r̂² - r²) z.

Source:
    Karras et al., "Elucidating the design space of diffusion-based generative models", 2022,
    algorithms 1 and 2.
"""

__all__ = ["Heun"]

import math

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.sampler.time_grid import Grid, LogSNR
from diffusion_lab.schedule.base import LARGEST
from diffusion_lab.transition import transition


class Heun(Sampler):
    """EDM's sampler: two calls of the denoiser a step (one in the last), second order.

    Arguments:
        steps: The number N of steps; 2N - 1 calls, and N - 1 more with churn.
        churn: S_churn, at least 0; 0 is deterministic.
        noise: S_noise, the factor of the churn's noise.
        churn_min: S_tmin, the ratio r below which there is no churn.
        churn_max: S_tmax, the ratio r above which there is none.
        grid: See `Sampler`; even in log SNR by default. EDM's own is `Karras`.
        clip: Whether x̂ is clipped to [-1, 1].

    Raises:
        ValueError: If the churn is negative.
    """

    own_grid = LogSNR

    def __init__(
        self, steps: int = 20, churn: float = 0.0, noise: float = 1.0, churn_min: float = 0.0,
        churn_max: float = math.inf, grid: Grid | None = None, clip: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(steps, grid, clip)
        if not churn >= 0:
            raise ValueError(f"churn={churn} is not allowed; it is at least 0")
        self.churn, self.noise = churn, noise
        self.churn_min, self.churn_max = churn_min, churn_max
        self.stochastic = churn > 0

    def _churned(self, denoiser: Denoiser, state: State, noise: Noise) -> State:
        """The state with new noise, or as it is."""
        schedule, x_t = denoiser.schedule, state.x_t
        r, largest = schedule.ratio(state.t), schedule.ratio(1.0)
        gamma = min(self.churn / self.steps, math.sqrt(2) - 1)
        raised = torch.minimum(r * (1 + gamma), largest)
        if not self.stochastic or not self.churn_min <= r <= self.churn_max or raised <= r:
            return state
        t = schedule.t_from_ratio(raised)
        alpha_t, _, alpha_new, _, _ = transition(schedule, t, state.t)
        std = self.noise * alpha_new * torch.sqrt(raised**2 - r**2)
        x_t = (alpha_new / alpha_t).to(x_t.dtype) * x_t + std.to(x_t.dtype) * noise(x_t)
        return State(float(t), x_t, denoiser(x_t, t))

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        state, schedule = self._churned(denoiser, state, noise), denoiser.schedule
        alpha_s, _, alpha_t, _, _ = transition(schedule, state.t, s)
        r_s, r_t = (schedule.ratio(t).to(state.x_t.dtype) for t in (s, state.t))
        u = state.x_t / alpha_t.to(state.x_t.dtype)
        slope = (u - state.denoised) / r_t
        x_s = alpha_s.to(u.dtype) * (u + (r_s - r_t) * slope)
        if s == 0 or r_t > LARGEST:  # from pure noise on, the mean slope would be all error
            return x_s
        slope_s = (x_s / alpha_s.to(u.dtype) - denoiser(x_s, s)) / r_s
        return alpha_s.to(u.dtype) * (u + (r_s - r_t) * (slope + slope_s) / 2)
