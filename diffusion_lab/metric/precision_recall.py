r"""Whether drawn images lie among the real ones, and whether they reach all of them.

Each set stands for the balls around its features, as far as the k-th nearest of its own others:

    precision = share of drawn images in some ball of the real ones,
    recall    = share of real images in some ball of the drawn ones.

Precision falls with what looks wrong, recall with what is never drawn; the Fréchet distance cannot
tell the two apart. Both depend on the numbers of images: compare only those of the same numbers.

Source:
    Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models",
    2019, equations 1 and 2 (k = 3).
"""

__all__ = ["precision_recall"]

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**24  # distances that are held at once


def _squares(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Squared distances of a few of x from all of y, of shape (B, n), one part after the other."""
    norms = y.square().sum(1)
    for part in x.split(max(1, CHUNK // len(y))):
        yield (part.square().sum(1, keepdim=True) + norms - 2 * part @ y.T).clamp(min=0)


def _radii(x: Tensor, k: int) -> Tensor:
    """The squared distance of each from the k-th nearest of the others, of shape (n,)."""
    found, first = [], 0
    for squares in _squares(x, x):
        squares.diagonal(first).fill_(torch.inf)  # itself
        first += len(squares)
        found.append(squares.kthvalue(k, dim=1).values)
    return torch.cat(found)


def _inside(x: Tensor, centres: Tensor, k: int) -> float:
    """The share of x in some ball."""
    radii = _radii(centres, k)
    return float(torch.cat([(s <= radii).any(1) for s in _squares(x, centres)]).double().mean())


def precision_recall(drawn: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Returns precision and recall, computed in float64.

    Arguments:
        drawn: The features of drawn images, of shape (m, d), m > k.
        real: The features of real ones, of shape (n, d), n > k.
        k: The number of neighbours, >= 1.

    Raises:
        ValueError: If a set has no k neighbours.
    """
    if not 1 <= k < min(len(drawn), len(real)):
        raise ValueError(f"{len(drawn)} and {len(real)} images; each set needs more than k={k}")
    drawn, real = drawn.double(), real.double()
    return _inside(drawn, real, k), _inside(real, drawn, k)
