"""Distance of samples to a Gaussian mixture: in shape, and in the weights of the components.

Each sample is assigned to a component and whitened there. Exact samples of well-separated
components become z ~ N(0, I) for any mixture, and every projection of z is distributed as N(0, 1).
"""

import torch
from torch import Tensor

from diffusion_lab.analytic import GaussianMixture
from diffusion_lab.rng import KeyedGenerator, make_key

REPEATS = 5  # number of sets of exact draws


def distance(
    mixture: GaussianMixture, x: Tensor, slices: int = 256, seed: int = 0
) -> tuple[float, float]:
    """The mean W_2 distance of projections of z from N(0, 1), and max_k |fraction of k - w_k|.

    With the n projections sorted, W_2² is their mean square difference from the quantiles of N(0,
    1) at (i + 1/2) / n. A relative scale error s adds s to the first number in quadrature.

    Arguments:
        mixture: The target distribution.
        x: The samples, of shape (n, *).
        slices: The number of directions, uniform on the sphere.
        seed: Seed of the directions.
    """
    z, k = mixture.whitened(x)
    # Keyed streams: a torch generator with the seed of the samples would repeat their noise.
    keys = make_key(seed, "slices", torch.arange(slices))
    directions = KeyedGenerator(keys).normal(z.shape[1], dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    projected = (directions @ z.T).sort(1).values
    quantiles = torch.special.ndtri((torch.arange(len(z), dtype=torch.float64) + 0.5) / len(z))
    w_2 = (projected - quantiles).square().mean(1).sqrt()
    shares = k.bincount(minlength=len(mixture.weights)).double() / len(k)
    return float(w_2.mean()), float((shares - mixture.weights).abs().max())


def floor(mixture: GaussianMixture, n: int, seed: int) -> float:
    """The mean of the first number of `distance` over several sets of n exact draws."""
    total = 0.0
    for repeat in range(REPEATS):
        generator = torch.Generator().manual_seed(int(make_key(seed, "floor", repeat)))
        total += distance(mixture, mixture.sample(n, generator), seed=seed)[0]
    return total / REPEATS
