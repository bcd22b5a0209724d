r"""Kernel distance of two sets of features; with the features of Inception, KID.

The squared maximum mean discrepancy with the kernel k(x, y) = (x · y / d + 1)³,

    MMD² = Σ_{i≠j} k(x_i, x_j) / m(m-1) + Σ_{i≠j} k(y_i, y_j) / n(n-1) - 2 Σ_ij k(x_i, y_j) / mn,

is unbiased for any number of images, whereas the Fréchet distance has a bias of O(1/n). For two
sets of the same distribution its mean is 0, and it is often negative. It is computed from all
images in float64; the mean over random subsets, as in torchmetrics, has the same expectation and a
larger variance.

The standard error is that of the jackknife over B blocks of both sets: with the estimate d_b
without block b and their mean d̄,

    error² = (B - 1) / B Σ_b (d_b - d̄)².

For a good model MMD² is close to 0, where an estimate from n images has an error of O(1/n), and
that from the n / B images of a block one of O(B/n): the spread of the blocks over √B would be √B
times too large.

Source:
    Bińkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", 2018, section 4.
    Efron, Stein, "The jackknife estimate of variance", 1981.
"""

__all__ = ["kernel_distance"]

import torch
from torch import Tensor

CHUNK = 2**24  # elements of a matrix held in memory


def _sums(x: Tensor, y: Tensor, blocks: int) -> Tensor:
    """The sums of k over all pairs of a block of x and a block of y, of shape (blocks, blocks).

    Row i is in block i modulo the number of blocks, since a set may be sorted.
    """
    total = x.new_zeros(blocks, blocks)
    columns = torch.arange(len(y), device=y.device) % blocks
    rows = torch.arange(len(x), device=x.device) % blocks
    size = max(1, CHUNK // len(y))
    for part, block in zip(torch.split(x, size), torch.split(rows, size), strict=True):
        kernel = (part @ y.T / x.shape[1] + 1).pow(3)
        by_column = kernel.new_zeros(len(part), blocks).index_add_(1, columns, kernel)
        total.index_add_(0, block, by_column)
    return total


class _Pairs:
    """The mean of k over pairs of images that are in none of the omitted blocks.

    Arguments:
        x: The features of the first set.
        y: Those of the second, or None for pairs of different images of the first.
        blocks: The number of blocks.
    """

    def __init__(self, x: Tensor, y: Tensor | None, blocks: int) -> None:
        other = x if y is None else y
        self.sums, self.counts = _sums(x, other, blocks), _counts(len(x), len(other), blocks)
        if y is None:
            itself = (x.square().mean(1) + 1).pow(3)
            places = torch.arange(len(x), device=x.device) % blocks
            own = itself.new_zeros(blocks).index_add_(0, places, itself)
            self.sums = self.sums - own.diag()
            self.counts = self.counts - places.bincount(minlength=blocks).to(own).diag()

    def mean(self) -> Tensor:
        """The mean over all pairs."""
        return self.sums.sum() / self.counts.sum()

    def means_without(self) -> Tensor:
        """The means without each of the blocks, of shape (blocks,)."""
        sums, counts = (m.sum() - m.sum(0) - m.sum(1) + m.diag() for m in (self.sums, self.counts))
        return sums / counts


def _counts(m: int, n: int, blocks: int) -> Tensor:
    """The numbers of pairs of two blocks, float64."""
    x, y = ((torch.arange(size) % blocks).bincount(minlength=blocks).double() for size in (m, n))
    return x[:, None] * y


def kernel_distance(x: Tensor, y: Tensor, blocks: int = 10) -> tuple[float, float]:
    """Returns MMD², and its standard error by the jackknife.

    Arguments:
        x: The features of the first set, of shape (m, d), m >= 2.
        y: The features of the second set, of shape (n, d), n >= 2.
        blocks: The number B of blocks; with fewer than 2 images in one the error is NaN.

    Raises:
        ValueError: If a set has fewer than 2 images.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} images are not enough; each set needs at least 2")
    x, y = x.double().cpu(), y.double().cpu()
    terms = [(1, _Pairs(x, None, blocks)), (1, _Pairs(y, None, blocks))]
    terms.append((-2, _Pairs(x, y, blocks)))
    value = float(sum(sign * pairs.mean() for sign, pairs in terms))
    if min(len(x), len(y)) < 2 * blocks:
        return value, float("nan")
    without = torch.stack([sign * pairs.means_without() for sign, pairs in terms]).sum(0)
    variance = (blocks - 1) * without.var(correction=0)
    return value, float(variance.sqrt())
