r"""Solvers of the reverse-time stochastic differential equation

    dx = [f(t) x - g(t)² ∇ log p(x)] dt + g(t) dw̄,    from t = 1 down to 0.

The last step, to t = 0, returns x̂: it removes the remaining noise.

Source:
    Song et al., "Score-based generative modeling through stochastic differential equations", 2021,
    eq. 6, appendix E and algorithms 2 and 3 (reverse diffusion).
"""

__all__ = ["EulerMaruyama", "ReverseDiffusion"]

import torch
from torch import Tensor

from diffusion_lab.constraints import PositiveInt, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.sampler.time_grid import TimeGrid
from diffusion_lab.transition import transition


class EulerMaruyama(Sampler):
    r"""Euler-Maruyama scheme, with the coefficients integrated over the step.

    With F = ∫_s^t f = log(α_t / α_s) and G = ∫_s^t g²,

        x_s = x_t - F x_t + G ∇ log p(x_t) + √G z,    ∇ log p(x_t) = (α_t x̂ - x_t) / σ_t².

    Where f and g are constant over the step this is the textbook scheme. With few steps its
    variance is too large, that of the small-variance ancestral step too small: prefer it for
    posterior samples.

    Arguments:
        steps: The number N of steps.
        grid: See `Sampler`; uniform in t by default.
        clip: Whether x̂ is clipped to [-1, 1].
    """

    @checked
    def __init__(
        self, steps: PositiveInt = 64, grid: TimeGrid | None = None, clip: bool = False
    ) -> None:
        super().__init__(steps, grid, clip)

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, schedule = state.x_t, denoiser.schedule
        z = noise(x_t)
        if s == 0:
            return state.denoised
        step = transition(schedule, state.t, s)
        f = torch.log(step.alpha_t / step.alpha_s)
        g = schedule.diffusion_integral(state.t) - schedule.diffusion_integral(s)
        score = (step.alpha_t * state.denoised - x_t) / step.sigma_t**2
        return x_t - f * x_t + g * score + torch.sqrt(g) * z


class ReverseDiffusion(Sampler):
    r"""Reverse diffusion sampler: the discretization of the forward chain, reversed.

    The forward step is x_t = a x_s + √v z with a = α_t / α_s, v = σ_t² - a² σ_s²; the reverse one

        x_s = (2 - a) x_t + v ∇ log p(x_t) + √v z.

    Arguments:
        steps: The number N of steps.
        grid: See `Sampler`; uniform in t by default.
        clip: Whether x̂ is clipped to [-1, 1].
    """

    @checked
    def __init__(
        self, steps: PositiveInt = 1000, grid: TimeGrid | None = None, clip: bool = False
    ) -> None:
        super().__init__(steps, grid, clip)

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t = state.x_t
        z = noise(x_t)
        if s == 0:
            return state.denoised
        step = transition(denoiser.schedule, state.t, s)
        a, v = step.alpha_t / step.alpha_s, step.variance
        score = (step.alpha_t * state.denoised - x_t) / step.sigma_t**2
        return (2 - a) * x_t + v * score + torch.sqrt(v) * z
