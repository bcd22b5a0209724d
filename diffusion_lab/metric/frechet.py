r"""Fréchet distance of two sets of features, approximated by normal distributions.

    d² = |μ_1 - μ_2|² + tr(C_1 + C_2 - 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}),

the squared distance W_2² of N(μ_1, C_1) and N(μ_2, C_2). With n images it has a positive
bias of O(1/n): only distances with the same n are comparable. torchmetrics accumulates raw
moments and does not store those of the reference images.

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
        a: Moments of the first set, of at least 2 images.
        b: Moments of the second set.

    Raises:
        ValueError: If a set has fewer than 2 images.
    """
    if min(a.n, b.n) < 2:
        raise ValueError(f"{a.n} and {b.n} images are not enough; each set needs at least 2")
    values, axes = torch.linalg.eigh(a.covariance)
    root = axes * values.clamp(min=0).sqrt() @ axes.T
    # Symmetric and positive semidefinite, with the eigenvalues of C_1 C_2.
    product = torch.linalg.eigvalsh(root @ b.covariance @ root)
    trace = a.covariance.trace() + b.covariance.trace() - 2 * product.clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + trace.clamp(min=0))
