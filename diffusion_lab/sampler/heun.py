r"""Heun's method for the probability-flow ODE, with optional churn (EDM).

In u = x_t / α_t and the ratio r, the ODE of every schedule is du/dr = (u - x̂) / r. One step from r
to r' is

    d = (u - x̂) / r,    ũ = u + (r' - r) d,    d' = (ũ - x̂(ũ, r')) / r',
    u' = u + (r' - r) (d + d') / 2,

and Euler's step to r' = 0, where d' is not defined. With churn, noise is added before the step: r
is raised to r̂ = r (1 + γ), γ = min(S_churn / N, √2 - 1), and u gets S_noise √(r̂² - r²) z.

Source:
    Karras et al., "Elucidating the design space of diffusion-based generative models", 2022,
    algorithms 1 and 2.
"""

__all__ = ["Heun"]

import math
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.constraints import NonNegative, PositiveInt, Range, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.sampler.time_grid import LogSNR, TimeGrid
from diffusion_lab.schedule.base import MAX_RATIO
from diffusion_lab.transition import transition


class Heun(Sampler):
    """EDM's sampler: second order, two calls of the denoiser per step (one in the last step).

    Arguments:
        steps: The number N of steps; 2N - 1 calls, and N - 1 more with churn.
        churn: S_churn; 0 is deterministic.
        noise: S_noise, the factor of the churn's noise.
        churn_min: S_tmin, the ratio r below which there is no churn.
        churn_max: S_tmax, the ratio r above which there is no churn.
        grid: See `Sampler`; uniform in log SNR by default. EDM's own is `Karras`.
        clip: Whether x̂ is clipped to [-1, 1].

    Raises:
        ValueError: If `churn_min` is above `churn_max`.
    """

    default_grid = LogSNR

    @checked
    def __init__(
        self,
        steps: PositiveInt = 20,
        churn: NonNegative = 0.0,
        noise: NonNegative = 1.0,
        churn_min: NonNegative = 0.0,
        churn_max: Annotated[float, Range(0, infinite=True)] = math.inf,
        grid: TimeGrid | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__(steps, grid, clip)
        if churn_min > churn_max:
            raise ValueError(f"churn_min={churn_min} must not be above churn_max={churn_max}")
        self.churn, self.noise = churn, noise
        self.churn_min, self.churn_max = churn_min, churn_max
        self.stochastic = churn > 0

    def _churned(self, denoiser: Denoiser, state: State, noise: Noise) -> State:
        """The state after the churn, at its higher noise level; unchanged without churn."""
        schedule = denoiser.schedule
        r, maximum = schedule.ratio(state.t), schedule.ratio(1.0)
        gamma = min(self.churn / self.steps, math.sqrt(2) - 1)
        raised = torch.minimum(r * (1 + gamma), maximum)
        if not self.stochastic or not self.churn_min <= r <= self.churn_max or raised <= r:
            return state
        t = schedule.t_from_ratio(raised)
        alpha, alpha_raised = (
            schedule(torch.tensor(state.t, dtype=torch.float64))[0],
            schedule(t)[0],
        )
        std = self.noise * alpha_raised * torch.sqrt(raised**2 - r**2)
        x_t = (alpha_raised / alpha) * state.x_t + std * noise(state.x_t)
        return State(float(t), x_t, denoiser(x_t, t))

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        state, schedule = self._churned(denoiser, state, noise), denoiser.schedule
        step = transition(schedule, state.t, s)
        r_s, r_t = (schedule.ratio(t).to(state.x_t.dtype) for t in (s, state.t))
        u = state.x_t / step.alpha_t
        slope = (u - state.denoised) / r_t
        x_s = step.alpha_s * (u + (r_s - r_t) * slope)
        if s == 0 or r_t > MAX_RATIO:  # the slope at pure noise has no accuracy to average
            return x_s
        slope_s = (x_s / step.alpha_s - denoiser(x_s, s)) / r_s
        return step.alpha_s * (u + (r_s - r_t) * (slope + slope_s) / 2)
