r"""How far apart two sets of samples are, or two sets of weights.

The sliced distance W_2 of sets x and y of n points each is that of their projections on
directions v_l, even on the sphere, for which sorting gives the best pairing:

    SW_2² = 1 / (L n) Σ_l Σ_i ((v_lᵀ x)_(i) - (v_lᵀ y)_(i))².

Two sets of one distribution are not at distance 0: compare with the distance of such sets, of the
same n. For separate modes it is mostly luck in their shares that it measures.

Source:
    Bonneel, Rabin, Peyré, Pfister, "Sliced and Radon Wasserstein barycenters of measures", 2015.
"""

__all__ = ["sliced_wasserstein", "total_variation", "unit_vectors"]

from functools import lru_cache

import torch
from torch import Tensor

from diffusion_lab.rng import KeyedGenerator, make_key


@lru_cache(maxsize=2)  # 64 of images of 256 x 256 take 5 s, and are needed for every batch
def unit_vectors(count: int, dim: int, seed: int) -> Tensor:
    """Returns directions v, even on the sphere and a pure function of the seed, (count, dim).

    They are float64 and shared by all who ask for them: not to be changed.

    Arguments:
        count: How many, L; the first of a larger number are the same.
        dim: The numbers d of each.
        seed: Which.
    """
    keys = make_key(seed, "direction", torch.arange(count))
    v = KeyedGenerator(keys).normal(dim, dtype=torch.float64)
    return v / v.norm(dim=1, keepdim=True)


def sliced_wasserstein(
    x: Tensor, y: Tensor, directions: int = 256, seed: int = 0, *, groups: bool = False
) -> Tensor:
    """Returns SW_2 of two sets, in float64, of shape (), or (G,) of G pairs of sets.

    Arguments:
        x: The one set, of shape (n, *), or (G, n, *) with `groups`.
        y: The other, of the same shape.
        directions: The number L of directions, the same for all groups.
        seed: Of the directions.
        groups: Whether the first dimension counts sets.

    Raises:
        ValueError: If the shapes differ: quantiles are compared one by one.
    """
    if x.shape != y.shape:
        raise ValueError(f"sets of shapes {tuple(x.shape)} and {tuple(y.shape)}; they must agree")
    x, y = (s.double().flatten(2) if groups else s.double().flatten(1)[None] for s in (x, y))
    v = unit_vectors(directions, x.shape[2], seed).to(x.device)
    difference = (x @ v.T).sort(1).values - (y @ v.T).sort(1).values
    distance = difference.square().mean((1, 2)).sqrt()
    return distance if groups else distance[0]


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Returns the total variation 1/2 Σ_k |p_k - q_k| in [0, 1], of shape (...).

    Arguments:
        p: Weights of K outcomes, of shape (..., K), with sum 1.
        q: Others, of a shape that broadcasts against it.
    """
    return (p - q).abs().sum(-1) / 2
