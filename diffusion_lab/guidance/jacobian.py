r"""Derivatives of the denoiser, J = ∂x̂ / ∂x_t, by one backward pass.

Cov[x_0 | x_t] = σ_t² / α_t J    (J is symmetric for an exact denoiser).
"""

__all__ = ["denoised_and_vjp"]

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser


def denoised_and_vjp(
    denoiser: Denoiser, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns x̂ = E[x_0 | x_t], and the function v -> Jᵀ v, which may be called repeatedly.

    Arguments:
        denoiser: The denoiser.
        x_t: Of shape (B, *).
        t: Of shape () or (B,).
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        denoised = denoiser(x_t, t)

    def vjp(v: Tensor) -> Tensor:
        return torch.autograd.grad(denoised, x_t, v, retain_graph=True)[0]

    return denoised.detach(), vjp
