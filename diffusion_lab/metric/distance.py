r"""Sliced Wasserstein distance of two sets of samples, and total variation of weights.

The sliced distance W_2 of sets x and y of n points each is that of their projections on
directions v_l, uniform on the sphere; in one dimension sorting gives the optimal pairing:

    SW_2² = 1 / (L n) Σ_l Σ_i ((v_lᵀ x)_(i) - (v_lᵀ y)_(i))².

For two sets of the same distribution the distance is above 0: compare with the distance of two
such sets of the same n. For well separated modes it mostly measures random differences of their
weights.

Source:
    Bonneel, Rabin, Peyré, Pfister, "Sliced and Radon Wasserstein barycenters of measures", 2015.
"""

__all__ = ["sliced_wasserstein", "total_variation", "unit_vectors"]

from functools import lru_cache

import torch
from torch import Tensor

from diffusion_lab.rng import KeyedGenerator, make_key


@lru_cache(maxsize=2)  # 64 directions for 256 x 256 pixels take 5 s, and every batch needs them
def unit_vectors(count: int, dim: int, seed: int) -> Tensor:
    """Returns directions v, uniform on the sphere and a function of the seed, (count, dim).

    The tensor is float64 and cached: callers must not modify it.

    Arguments:
        count: The number L of directions; the first ones do not depend on it.
        dim: The dimension d.
        seed: The seed.
    """
    keys = make_key(seed, "direction", torch.arange(count))
    v = KeyedGenerator(keys).normal(dim, dtype=torch.float64)
    unit: Tensor = v / v.norm(dim=1, keepdim=True)
    return unit


def sliced_wasserstein(
    x: Tensor, y: Tensor, directions: int = 256, seed: int = 0, *, groups: bool = False
) -> Tensor:
    """Returns SW_2 of two sets, in float64, of shape (), or (G,) of G pairs of sets.

    Arguments:
        x: The first set, of shape (n, *), or (G, n, *) with `groups`.
        y: The second set, of the same shape.
        directions: The number L of directions, the same for all groups.
        seed: Seed of the directions.
        groups: Whether the first dimension enumerates pairs of sets.

    Raises:
        ValueError: If the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(
            f"sets of shapes {tuple(x.shape)} and {tuple(y.shape)} are not allowed; "
            "the shapes must agree"
        )
    x, y = (s.double().flatten(2) if groups else s.double().flatten(1)[None] for s in (x, y))
    v = unit_vectors(directions, x.shape[2], seed).to(x.device)
    difference = (x @ v.T).sort(1).values - (y @ v.T).sort(1).values
    distance = difference.square().mean((1, 2)).sqrt()
    return distance if groups else distance[0]


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Returns the total variation 1/2 Σ_k |p_k - q_k| in [0, 1], of shape (...).

    Arguments:
        p: Weights of K outcomes, of shape (..., K), with sum 1.
        q: Weights of the same outcomes; broadcasts against p.
    """
    return (p - q).abs().sum(-1) / 2
