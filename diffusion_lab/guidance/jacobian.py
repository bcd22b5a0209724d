r"""Posterior moments of x_0 given x_t by Tweedie's formulas.

    E[x_0 | x_t] = x̂(x_t),    Cov[x_0 | x_t] = V = σ_t² / α_t J,    J = ∂x̂ / ∂x_t.

V is never formed: a product with it is one backward pass. J is symmetric for an exact denoiser.
"""

__all__ = ["tweedie_moments"]

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.tensor import broadcast


def tweedie_moments(
    denoiser: Denoiser, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns x̂ = E[x_0 | x_t], and the function v -> σ_t² / α_t Jᵀ v = V v.

    Arguments:
        denoiser: The denoiser.
        x_t: The noisy state, of shape (B, *).
        t: Its time, of shape () or (B,).
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        denoised = denoiser(x_t, t)
    schedule = denoiser.schedule
    scale = broadcast(schedule(t.double())[1] * schedule.ratio(t), x_t)

    def covariance(v: Tensor) -> Tensor:
        return scale * torch.autograd.grad(denoised, x_t, v, retain_graph=True)[0]

    return denoised.detach(), covariance
