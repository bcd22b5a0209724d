r"""TMPD: the covariance of x_0 given x_t by its rows' sums, Tweedie moment projected diffusion.

    p(y | x_t) = N(y; A x̂, σ_y² I + diag(A V Aᵀ 1)),    V = Cov[x_0 | x_t] = σ_t² / α_t J,
    E[x_0 | x_t, y] = x̂ + V Aᵀ (y - A x̂) / (σ_y² + A V Aᵀ 1).

The sums of the rows of A V Aᵀ stand for its diagonal: right where it is diagonal. Of numbers that
vary against each other a sum is too small, or negative, which no variance is and which would turn
the likelihood into a force away from y; it counts as 0 then.

Source:
    Boys, Girolami, Pidstrigach, Reich, Mosca, Akyildiz, "Tweedie moment projected diffusions for
    inverse problems", 2023.
"""

__all__ = ["TMPD"]

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guided, Observation
from diffusion_lab.guidance.conditional import Conditional
from diffusion_lab.guidance.jacobian import denoised_and_vjp


class TMPD(Guided):
    """One call of the denoiser and two backward passes a step."""

    requires = "linear"
    isotropic = False

    def denoiser(self, denoiser: Denoiser, observation: Observation) -> Denoiser:
        return _TMPD(denoiser, observation)


class _TMPD(Conditional):
    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        denoised, vjp = denoised_and_vjp(self.denoiser, x_t, t)
        scale, a = self.scale(x_t, t), self.operator
        sums = a(scale * vjp(a.transpose(torch.ones_like(self.y))))
        variance = self.sigma_y**2 + sums.clamp(min=0)
        return denoised + scale * vjp(a.transpose((self.y - a(denoised)) / variance))
