r"""Mean and covariance of the features of an image set, in one pass and any number of parts.

Two parts with counts n, means μ and scatter matrices M = Σ (f - μ)(f - μ)^T merge to

    δ = μ_b - μ_a,    μ = μ_a + δ n_b / n,    M = M_a + M_b + δ δ^T n_a n_b / n,    n = n_a + n_b,

all in float64; the covariance is M / (n - 1). Raw moments Σ f f^T in float32 would lose 3e-5.

Source:
    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979, equation (2.1).
"""

__all__ = ["Moments", "PooledPixels", "reference"]

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_lab.data.images import Split
from diffusion_lab.data.module import to_model
from diffusion_lab.errors import DataError
from diffusion_lab.files import write_atomic

VERSION = 1  # of what the file holds and how it is computed


class Moments:
    """Count, mean and scatter matrix of features.

    Attributes:
        n: The number of feature vectors.
        mean: μ, float64, of shape (d,).
        scatter: M, float64, of shape (d, d).
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Adds features, of shape (B, d)."""
        part = Moments(len(self.mean))
        features = features.cpu().double()  # not all devices have float64
        part.n, part.mean = len(features), features.mean(0)
        centred = features - part.mean
        part.scatter = centred.T @ centred
        self.merge(part)

    def merge(self, other: "Moments") -> None:
        """Adds all that another one has seen."""
        n = self.n + other.n
        if not other.n:
            return
        delta = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(delta, delta) * (self.n * other.n / n)
        self.mean += delta * (other.n / n)
        self.n = n

    @property
    def covariance(self) -> Tensor:
        """Returns the unbiased covariance, float64, of shape (d, d)."""
        return self.scatter / (self.n - 1)


class PooledPixels:
    """Features that need no weights: x_0 averaged over a coarse grid, then x_0 and x_0² over all.

    A Fréchet distance of them sees colours and their layout, and no more.

    Attributes:
        name: What distinguishes these features from others, also in file names.
        dim: Their number d.
    """

    def __init__(self, grid: int = 8) -> None:
        self.grid, self.name, self.dim = grid, f"pixels{grid}", 3 * grid * grid + 6

    def __call__(self, images: Tensor) -> Tensor:
        """Returns features (B, d) of uint8 images (B, H, W, 3)."""
        x_0 = to_model(images)
        grid = F.adaptive_avg_pool2d(x_0, self.grid).flatten(1)
        return torch.cat([grid, x_0.mean((2, 3)), x_0.square().mean((2, 3))], dim=1)


def reference(
    images: Split,
    content: str,
    extractor: Any,
    root: Path,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Callable[[range], Any] = iter,
) -> tuple[Moments, Path]:
    """Returns the moments of the features of a split, computed once and then read from a file.

    The file's name is a hash of all that decides them: the pixels, the size and the extractor.

    Arguments:
        images: The split; all of it is used, unflipped, in order.
        content: The hash of its pixels.
        extractor: Maps uint8 images (B, H, W, 3) to features (B, d); has a `name` and a `dim`.
        root: The directory of such files.
        batch_size: Images that go through the extractor at once.
        device: Where that happens.
        progress: Wraps the iteration over batches.

    Raises:
        DataError: If the file is damaged or cannot be written.
    """
    key = {
        "version": VERSION, "content": content, "n": len(images), "size": images.images.size,
        "extractor": extractor.name,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = root / f"{extractor.name}-{name}.npz"
    moments = Moments(extractor.dim)
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                if json.loads(str(file["key"])) != key:
                    raise ValueError("it belongs to other images")
                moments.n = int(file["n"])
                moments.mean, moments.scatter = map(
                    torch.from_numpy, (file["mean"], file["scatter"])
                )
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DataError(f"{path} is damaged ({error}); remove it to make it again") from error
        return moments, path
    for first in progress(range(0, len(images), batch_size)):
        batch = torch.from_numpy(images[first : first + batch_size])
        with torch.no_grad():
            moments.update(extractor(batch.to(device)))
    buffer = io.BytesIO()
    np.savez(
        buffer, key=np.array(json.dumps(key)), n=np.array(moments.n),
        mean=moments.mean.numpy(), scatter=moments.scatter.numpy(), allow_pickle=False,
    )  # fmt: skip
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; free space there, or set "
            "data.cache_dir to another disk"
        ) from error
    return moments, path
