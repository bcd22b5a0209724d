r"""Kernel distance of two sets of features; with the features of Inception, KID.

The squared maximum mean discrepancy with the kernel k(x, y) = (x · y / d + 1)³,

    MMD² = Σ_{i≠j} k(x_i, x_j) / m(m-1) + Σ_{i≠j} k(y_i, y_j) / n(n-1) - 2 Σ_ij k(x_i, y_j) / mn,

is unbiased for any number of images, whereas the Fréchet distance has a bias of O(1/n). For two
sets of the same distribution its mean is 0, and it is often negative. It is computed from all
images in float64; the mean over random subsets, as in torchmetrics, has the same expectation and a
larger variance.

Source:
    Bińkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", 2018, section 4.
"""

__all__ = ["kernel_distance"]

import torch
from torch import Tensor

CHUNK = 2**24  # elements of a matrix held in memory


def _mean(x: Tensor, y: Tensor | None = None) -> float:
    """The mean of k over all pairs of two sets, or over all different pairs of one."""
    other = x if y is None else y
    total, rows = 0.0, max(1, CHUNK // len(other))
    for part in torch.split(x, rows):
        total += float((part @ other.T / x.shape[1] + 1).pow(3).sum())
    if y is not None:
        return total / (len(x) * len(y))
    itself = float((x.square().mean(1) + 1).pow(3).sum())
    return (total - itself) / (len(x) * (len(x) - 1))


def kernel_distance(x: Tensor, y: Tensor, blocks: int = 10) -> tuple[float, float]:
    """Returns MMD², and its standard error.

    The error is the standard deviation over blocks of both sets divided by √blocks, slightly
    too large, since the estimate from all images has a smaller variance than the mean of blocks.

    Arguments:
        x: The features of the first set, of shape (m, d), m >= 2.
        y: The features of the second set, of shape (n, d), n >= 2.
        blocks: The number of blocks; with fewer than 2 images in one the error is NaN.

    Raises:
        ValueError: If a set has fewer than 2 images.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} images are not enough; each set needs at least 2")
    x, y = x.double(), y.double()
    value = _mean(x) + _mean(y) - 2 * _mean(x, y)
    if min(len(x), len(y)) < 2 * blocks:
        return value, float("nan")
    # Every tenth image, since the set may be sorted.
    parts = [(x[k::blocks], y[k::blocks]) for k in range(blocks)]
    each = torch.tensor([_mean(a) + _mean(b) - 2 * _mean(a, b) for a, b in parts])
    return value, float(each.std() / blocks**0.5)
