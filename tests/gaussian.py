"""A Gaussian prior with an exact denoiser, and the exact moments of a sampler's output.

For x_0 ~ N(m, C), E[x_0 | x_t] = m + α_t C (α_t² C + σ_t² I)⁻¹ (x_t - α_t m) is linear in x_t.
Every step of every sampler is then linear too, and its output is a constant plus a linear map of
the start and all noise draws. `BasisNoise` determines this map: one run of the sampler, with one
batch row per random number, gives the mean and covariance of its output to rounding, without Monte
Carlo.
"""

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance import Guidance, Observation
from diffusion_lab.rng import KeyedGenerator
from diffusion_lab.sampler import Sampler
from diffusion_lab.schedule import Schedule

MEAN = torch.tensor([0.5, -0.3, 0.1, -0.7], dtype=torch.float64)
ROTATION = torch.linalg.qr(torch.arange(16.0, dtype=torch.float64).reshape(4, 4).sin()).Q
EIGENVALUES = torch.tensor([0.09, 0.16, 0.3, 0.5], dtype=torch.float64)
COVARIANCE = ROTATION @ EIGENVALUES.diag() @ ROTATION.T


class GaussianDenoiser(Denoiser):
    """The denoiser E[x_0 | x_t] for x_0 ~ N(m, C), for x_t of shape (B, d)."""

    def __init__(
        self, schedule: Schedule, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE
    ) -> None:
        super().__init__(schedule)
        self.mean, self.covariance = mean, covariance

    def marginal(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x_t at one time t."""
        alpha_t, sigma_t = self.schedule(torch.as_tensor(t, dtype=torch.float64))
        identity = torch.eye(len(self.mean), dtype=torch.float64)
        return alpha_t * self.mean, alpha_t**2 * self.covariance + sigma_t**2 * identity

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        if t.ndim:
            return torch.stack([self(x[None], s)[0] for x, s in zip(x_t, t, strict=True)])
        alpha_t, _ = self.schedule(t.double())
        mean, covariance = self.marginal(t)
        gain = alpha_t * torch.linalg.solve(covariance, self.covariance)
        return self.mean + (x_t.double() - mean) @ gain


class BasisNoise(KeyedGenerator):
    """A replacement of the random generator: row 0 gets zeros, draw k gets unit vectors in its own
    rows.

    Arguments:
        draws: The maximum number of draws.
        size: d, the number of values in a draw.
        extra: Number of rows between row 0 and those of the first draw, for use by the caller.
    """

    def __init__(self, draws: int, size: int, extra: int = 0) -> None:
        self.rows, self.size, self.next = 1 + extra + draws * size, size, 1 + extra
        super().__init__(torch.zeros(self.rows, dtype=torch.int64))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        assert shape == (self.size,) and self.next + self.size <= self.rows
        z = torch.zeros(self.rows, self.size, dtype=dtype)
        z[self.next : self.next + self.size] = torch.eye(self.size, dtype=dtype)
        self.next += self.size
        return z


def moments(output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of an output computed with `BasisNoise`."""
    response = output[1:] - output[0]
    return output[0], response.T @ response


def sampler_moments(
    sampler: Sampler, denoiser: GaussianDenoiser, mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Moments of the output of a sampler that starts from N(mean, covariance) at t = 1."""
    size = len(mean)
    noise = BasisNoise(sampler.steps, size, extra=size)
    start = mean.repeat(noise.rows, 1)
    start[1 : 1 + size] += torch.linalg.cholesky(covariance).T
    return moments(sampler(denoiser, start, generator=noise))


def guidance_moments(
    guidance: Guidance, sampler: Sampler, denoiser: Denoiser, y: Tensor, sigma_y: float
) -> tuple[Tensor, Tensor]:
    """Moments of a posterior method's output for the observation y of shape (d,)."""
    noise = BasisNoise(sampler.steps + 1, len(y))
    observation = Observation(y.repeat(noise.rows, 1), sigma_y)
    return moments(guidance(denoiser, sampler, observation, generator=noise))
