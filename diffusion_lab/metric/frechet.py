r"""The Fréchet distance of two sets of features, as if both were normally distributed.

    d² = |μ_1 - μ_2|² + tr(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}),

the squared distance W_2² of N(μ_1, C_1) and N(μ_2, C_2). With n images it is too large by about
a constant / n: compare only distances of the same n, and name them with it.

Sources:
    Dowson, Landau, "The Fréchet distance between multivariate normal distributions", 1982, eq. 4.
    Heusel et al., "GANs trained by a two time-scale update rule", 2017, eq. 6.
"""

__all__ = ["frechet_distance"]

import torch

from diffusion_lab.metric.feature_statistics import Moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Returns d² of two sets of features, computed in float64.

    Arguments:
        a: Moments of the one set, of at least 2 images.
        b: Moments of the other.

    Raises:
        ValueError: If a set has fewer than 2 images.
    """
    if min(a.n, b.n) < 2:
        raise ValueError(f"{a.n} and {b.n} images have no covariance; at least 2 of each")
    values, axes = torch.linalg.eigh(a.covariance)
    root = axes * values.clamp(min=0).sqrt() @ axes.T
    # Symmetric and positive: its eigenvalues are those of C_1 C_2, without complex rounding.
    product = torch.linalg.eigvalsh(root @ b.covariance @ root)
    trace = a.covariance.trace() + b.covariance.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + trace.clamp(min=0))
