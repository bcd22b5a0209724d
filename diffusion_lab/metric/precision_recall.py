r"""Precision and recall of generated images, by nearest neighbours in feature space.

The support of each set is approximated by balls around its features, with the distance to the k-th
nearest neighbour in the same set as radius:

    precision = fraction of generated images in a ball of a real one,
    recall    = fraction of real images in a ball of a generated one.

Implausible images lower the precision, missing modes the recall; the Fréchet distance does not
separate the two. Both depend on the numbers of images: only values with the same numbers are
comparable.

Source:
    Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models",
    2019, equations 1 and 2 (k = 3).
"""

__all__ = ["precision_recall"]

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**24  # distances held in memory


def _squares(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Squared distances of parts of x from all of y, of shape (B, n)."""
    norms = y.square().sum(1)
    for part in torch.split(x, max(1, CHUNK // len(y))):
        yield (part.square().sum(1, keepdim=True) + norms - 2 * part @ y.T).clamp(min=0)


def _radii(x: Tensor, k: int) -> Tensor:
    """The squared distance of each point from its k-th nearest neighbour, of shape (n,)."""
    found, first = [], 0
    for squares in _squares(x, x):
        squares.diagonal(first).fill_(torch.inf)  # itself
        first += len(squares)
        found.append(squares.kthvalue(k, dim=1).values)
    return torch.cat(found)


def _inside(x: Tensor, centres: Tensor, k: int) -> float:
    """The fraction of x in any ball."""
    radii = _radii(centres, k)
    return float(torch.cat([(s <= radii).any(1) for s in _squares(x, centres)]).double().mean())


def precision_recall(drawn: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Returns precision and recall, computed in float64.

    Arguments:
        drawn: The features of generated images, of shape (m, d), m > k.
        real: The features of real images, of shape (n, d), n > k.
        k: The number of neighbours, >= 1.

    Raises:
        ValueError: If a set has no more than k images.
    """
    if not 1 <= k < min(len(drawn), len(real)):
        raise ValueError(f"{len(drawn)} and {len(real)} images; each set needs more than k={k}")
    drawn, real = drawn.double(), real.double()
    return _inside(drawn, real, k), _inside(real, drawn, k)
