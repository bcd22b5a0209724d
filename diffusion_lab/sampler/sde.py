r"""Solvers of the reverse stochastic differential equation

    dx = [f(t) x - g(t)² ∇ log p(x)] dt + g(t) dw̄,    from t = 1 down to 0.

Source:
    Song et al., "Score-based generative modeling through stochastic differential equations", 2021,
    eq. 6 and appendix E (Euler-Maruyama; the last step removes the noise that is left).
"""

__all__ = ["EulerMaruyama"]

import torch
from torch import Tensor

from diffusion_lab.sampler.base import Sampler
from diffusion_lab.schedule import Schedule


class EulerMaruyama(Sampler):
    r"""The Euler-Maruyama scheme, with the coefficients integrated over the step.

    With the variance-preserving f = -g²/2 and B = ∫_s^t g² = log(ᾱ_s / ᾱ_t), the step is

        x_s = x_t + B (x_t / 2 + ∇ log p(x_t)) + √B z,    ∇ log p(x_t) = (α_t x̂ - x_t) / σ_t².

    Where g is constant over the step this is the textbook's scheme to the letter. The last step
    returns x̂. Unlike the small-variance ancestral step it errs to too much variance, not too
    little: at few steps the better side for posterior samples.

    Arguments:
        steps: The number N of steps.
        clip: Whether x̂ is clipped to [-1, 1].
    """

    def __init__(self, steps: int = 64, clip: bool = False) -> None:
        super().__init__(steps, clip)

    def step(
        self, schedule: Schedule, x_t: Tensor, denoised: Tensor, t: Tensor, s: Tensor, z: Tensor
    ) -> Tensor:
        if s == 0:
            return denoised
        alpha_s, _ = schedule(s.double())
        alpha_t, sigma_t = schedule(t.double())
        b = 2 * torch.log(alpha_s / alpha_t)
        score = (alpha_t.to(x_t) * denoised - x_t) / (sigma_t**2).to(x_t)
        return x_t + b.to(x_t) * (x_t / 2 + score) + torch.sqrt(b).to(x_t) * z
