r"""Linear-Gaussian state-space model: a trajectory prior with an exact posterior.

    z_1 ~ N(0, P),    z_{k+1} = F z_k + w_k,    w_k ~ N(0, Q).

The trajectory x_0 = (z_1, ..., z_L) is jointly Gaussian, with E[z_j z_kᵀ] = F^{j-k} C_k for
j >= k, C_1 = P, C_{k+1} = F C_k Fᵀ + Q. Its posterior given noisy observations is that of the
Kalman smoother.
"""

__all__ = ["damped_spring", "trajectory"]

import torch
from torch import Tensor

from diffusion_lab.analytic.gaussian_mixture import Gaussian


def trajectory(transition: Tensor, noise: Tensor, start: Tensor, length: int) -> Gaussian:
    """Returns the distribution of trajectories, of shape (L, n).

    Arguments:
        transition: F, of shape (n, n).
        noise: Q, of shape (n, n), symmetric and positive semidefinite.
        start: P, of the same kind.
        length: L, at least 1.
    """
    n = len(transition)
    blocks = torch.zeros(length, length, n, n, dtype=torch.float64)
    variance = start.double()
    for k in range(length):
        block = variance
        for j in range(k, length):
            blocks[j, k], blocks[k, j] = block, block.T
            block = transition.double() @ block
        variance = transition.double() @ variance @ transition.double().T + noise.double()
    covariance = blocks.permute(0, 2, 1, 3).reshape(length * n, length * n)
    return Gaussian(covariance.new_zeros(length * n), covariance, shape=(length, n))


def damped_spring(length: int = 16) -> tuple[Gaussian, tuple[Tensor, Tensor, Tensor]]:
    """Returns positions and velocities (L, 2) of a damped spring with random forcing.

    Arguments:
        length: The number L of time steps.

    Returns:
        The distribution, stationary with unit variances, and (F, Q, P).
    """
    angle, damping = torch.tensor(0.5, dtype=torch.float64), 0.95
    rotation = torch.stack([
        torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])
    ])  # fmt: skip
    identity = torch.eye(2, dtype=torch.float64)
    transition, noise = damping * rotation, (1 - damping**2) * identity
    return trajectory(transition, noise, identity, length), (transition, noise, identity)
