r"""Solvers of the reverse stochastic differential equation

    dx = [f(t) x - g(t)² ∇ log p(x)] dt + g(t) dw̄,    from t = 1 down to 0.

The last step, to t = 0, returns x̂: it removes the noise that is left.

Source:
    Song et al., "Score-based generative modeling through stochastic differential equations", 2021,
    eq. 6, appendix E and algorithms 2 and 3 (reverse diffusion).
"""

__all__ = ["EulerMaruyama", "ReverseDiffusion"]

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.sampler.time_grid import Grid
from diffusion_lab.transition import transition


def _score(state: State, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    x_t = state.x_t
    return (alpha_t.to(x_t.dtype) * state.denoised - x_t) / (sigma_t**2).to(x_t.dtype)


class EulerMaruyama(Sampler):
    r"""The Euler-Maruyama scheme, with the coefficients integrated over the step.

    With F = ∫_s^t f = log(α_t / α_s) and G = ∫_s^t g²,

        x_s = x_t - F x_t + G ∇ log p(x_t) + √G z,    ∇ log p(x_t) = (α_t x̂ - x_t) / σ_t².

    Where f and g are constant over the step this is the textbook's scheme to the letter. Unlike
    the small-variance ancestral step it errs to too much variance, not too little: at few steps
    the better side for posterior samples.

    Arguments:
        steps: The number N of steps.
        grid: See `Sampler`; uniform in t by default.
        clip: Whether x̂ is clipped to [-1, 1].
    """

    def __init__(self, steps: int = 64, grid: Grid | None = None, clip: bool = False) -> None:
        super().__init__(steps, grid, clip)

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, schedule = state.x_t, denoiser.schedule
        z = noise(x_t)
        if s == 0:
            return state.denoised
        alpha_s, _, alpha_t, sigma_t, _ = transition(schedule, state.t, s)
        f = torch.log(alpha_t / alpha_s)
        g = schedule.diffusion_integral(state.t) - schedule.diffusion_integral(s)
        score = _score(state, alpha_t, sigma_t)
        return (
            x_t - f.to(x_t.dtype) * x_t + g.to(x_t.dtype) * score + torch.sqrt(g).to(x_t.dtype) * z
        )


class ReverseDiffusion(Sampler):
    r"""Song et al.'s reverse diffusion: the forward chain's own discretisation, backwards.

    The forward step is x_t = a x_s + √v z with a = α_t / α_s, v = σ_t² - a² σ_s²; backwards

        x_s = (2 - a) x_t + v ∇ log p(x_t) + √v z.

    Arguments:
        steps: The number N of steps.
        grid: See `Sampler`; uniform in t by default.
        clip: Whether x̂ is clipped to [-1, 1].
    """

    def __init__(self, steps: int = 1000, grid: Grid | None = None, clip: bool = False) -> None:
        super().__init__(steps, grid, clip)

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t = state.x_t
        z = noise(x_t)
        if s == 0:
            return state.denoised
        alpha_s, _, alpha_t, sigma_t, v = transition(denoiser.schedule, state.t, s)
        score = _score(state, alpha_t, sigma_t)
        x_s = (2 - alpha_t / alpha_s).to(x_t.dtype) * x_t + v.to(x_t.dtype) * score
        return x_s + torch.sqrt(v).to(x_t.dtype) * z
