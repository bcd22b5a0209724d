r"""Inverse problems whose posterior p(x_0 | y) is known in closed form.

| problem | prior | observed | σ_y |
|---|---|---|---|
| gaussian_denoise, mixture_denoise | d = 16, 1 or 4 components | all, σ_t = 0.5 | 0.577 |
| gaussian_mask, mixture_mask | the same | 4 of 16 coordinates | 0.1 |
| mixture_ambiguous | the same | 2 of 16: the posterior keeps several modes | 0.5 |
| spring_positions | a damped spring, 16 positions and velocities | every 4th position | 0.1 |
| image_blur | 8 x 8 images, 3 components | a Gaussian blur | 0.05 |
| atoms_clip | 64 points of the mixture | clip(2 x, -1, 1) of 4 of 16 coordinates | 0.2 |

The variances of each component along its axes span two decades; every coordinate of a mixture has
mean 0 and variance 1.
"""

__all__ = ["PROBLEMS", "Problem", "mixture"]

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.analytic import Atoms, Gaussian, GaussianMixture, damped_spring
from diffusion_lab.operator import GaussianBlur, Identity, Matrix, Operator

D = 16
ATOMS = 64


@dataclass(frozen=True)
class Problem:
    """A prior, an operator and a noise level.

    Attributes:
        name: `<prior>_<observation>`.
        prior: The prior p(x_0).
        operator: The operator A.
        sigma_y: The noise σ_y of y = A(x_0) + σ_y n.
        modes: Whether the weights of the modes and the distance within each are graded separately.
    """

    name: str
    prior: GaussianMixture | Atoms
    operator: Operator
    sigma_y: float
    modes: bool = False

    @property
    def covariance(self) -> Tensor:
        """The covariance of the prior, of shape (d, d)."""
        if isinstance(self.prior, Atoms):
            return self.prior.points.flatten(1).T.cov(correction=0)
        weights, means = self.prior.weights, self.prior.means
        centred = means - weights @ means
        within = torch.einsum("k,kde->de", weights, self.prior.covariances)
        return within + torch.einsum("k,kd,ke->de", weights, centred, centred)

    @property
    def zero(self) -> Tensor:
        """A(0), which has the shape (1, *') of one observation."""
        y: Tensor = self.operator(torch.zeros(1, *self.prior.shape, dtype=torch.float64))
        return y

    def observe(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws x_0 and y = A(x_0) + σ_y n, float64, of shapes (count, *) and (count, *')."""
        x_0 = self.prior.sample(count, generator)
        clean = self.operator(x_0)
        noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        return x_0, clean + self.sigma_y * noise


def mixture(components: int, d: int = D, seed: int = 0, spread: float = 1.5) -> GaussianMixture:
    """Returns a standardized mixture with random axes, means and weights.

    Arguments:
        components: The number K of components.
        d: The dimension.
        seed: The seed of all random numbers.
        spread: The standard deviation of the means before standardization.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(components, d, d + 1, generator=generator, dtype=torch.float64)
    axes, _ = torch.linalg.qr(normal[..., :-1])
    exponents = torch.rand(components, d, generator=generator, dtype=torch.float64)
    variances = 10 ** (2 * exponents - 2)
    covariances = (axes * variances[:, None]) @ axes.mT
    weights = 0.5 + torch.rand(components, generator=generator, dtype=torch.float64)
    weights = weights / weights.sum()
    means = spread * normal[..., -1] if components > 1 else torch.zeros_like(normal[..., -1])
    return _standardized(weights, means, covariances)


def _standardized(weights: Tensor, means: Tensor, covariances: Tensor) -> GaussianMixture:
    """Shifts and scales the coordinates so that each has mean 0 and variance 1."""
    means = means - weights @ means
    variance = weights @ (covariances.diagonal(dim1=1, dim2=2) + means**2)
    scale = variance.rsqrt()
    return GaussianMixture(weights, means * scale, covariances * scale[:, None] * scale[None, :])


def _rows(indices: list[int], d: int) -> Matrix:
    return Matrix(torch.eye(d, dtype=torch.float64)[indices])


def _images() -> GaussianMixture:
    """Smooth 8 x 8 images: three components whose covariances decay with the distance."""
    side, components = 8, 3
    place = torch.arange(side, dtype=torch.float64)
    grid = torch.cartesian_prod(place, place)
    distance = torch.cdist(grid, grid)
    generator = torch.Generator().manual_seed(5)
    smooth = torch.exp(-((distance / 3) ** 2))
    noise = torch.randn(components, side**2, generator=generator, dtype=torch.float64)
    means = noise @ smooth / 4
    floor = 0.002 * torch.eye(side**2, dtype=torch.float64)  # independent noise of the pixels
    covariances = torch.stack([0.05 * torch.exp(-distance / s) + floor for s in (1.5, 3.0, 6.0)])
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return GaussianMixture(weights, means, covariances, shape=(1, side, side))


class _Clip(Operator):
    """clip(2 x, -1, 1) of the first four coordinates, a saturating sensor."""

    def __init__(self) -> None:
        super().__init__((D,))

    def forward(self, x: Tensor) -> Tensor:
        return (2 * x[:, :4]).clamp(-1, 1)

    def to_image(self, y: Tensor) -> Tensor:
        return y


def _gaussian() -> GaussianMixture:
    prior = mixture(1)
    return Gaussian(prior.means[0], prior.covariances[0])


def _atoms() -> Atoms:
    return Atoms(mixture(4).sample(ATOMS, torch.Generator().manual_seed(3)))


def _spring() -> Gaussian:
    spring, _ = damped_spring()
    return Gaussian(spring.means[0], spring.covariances[0])  # as one vector of 32 elements


RATIO = 0.5 / math.sqrt(0.75)  # σ_t = 0.5
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "gaussian_denoise": lambda: Problem("gaussian_denoise", _gaussian(), Identity(), RATIO),
    "mixture_denoise": lambda: Problem("mixture_denoise", mixture(4), Identity(), RATIO),
    "gaussian_mask": lambda: Problem("gaussian_mask", _gaussian(), _rows([0, 1, 2, 3], D), 0.1),
    "mixture_mask": lambda: Problem("mixture_mask", mixture(4), _rows([0, 1, 2, 3], D), 0.1),
    "mixture_ambiguous": lambda: Problem(
        "mixture_ambiguous", mixture(4), _rows([0, 1], D), 0.5, modes=True
    ),
    "spring_positions": lambda: Problem(
        "spring_positions", _spring(), _rows([0, 8, 16, 24], 32), 0.1
    ),
    "image_blur": lambda: Problem("image_blur", _images(), GaussianBlur((1, 8, 8), std=1.0), 0.05),
    "atoms_clip": lambda: Problem("atoms_clip", _atoms(), _Clip(), 0.2, modes=True),
}
