r"""Mean and covariance of the features of an image set, in one pass and any number of parts.

Two parts with counts n, means μ and scatter matrices M = Σ (f - μ)(f - μ)^T merge to

    δ = μ_b - μ_a,    μ = μ_a + δ n_b / n,    M = M_a + M_b + δ δ^T n_a n_b / n,    n = n_a + n_b,

all in float64; the covariance is M / (n - 1). Raw moments Σ f f^T in float32 have an error of
3e-5.

Source:
    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979, equation (2.1).
"""

__all__ = ["KEPT", "Moments", "PooledPixels", "load_reference", "reference_features"]

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from diffusion_lab.atomic_io import write_atomic
from diffusion_lab.data.images import Split
from diffusion_lab.errors import DataError
from diffusion_lab.metric.features import Extractor, extract
from diffusion_lab.pixels import to_model

log = logging.getLogger(__name__)

VERSION = 1  # version of the content of the file
KEPT = 50_000  # largest number of stored features of a split


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

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Returns the moments of features of shape (N, d)."""
        moments = cls(features.shape[1])
        moments.update(features)
        return moments

    def update(self, features: Tensor) -> None:
        """Adds features, of shape (B, d)."""
        part = Moments(len(self.mean))
        features = features.cpu().double()  # not all devices have float64
        part.n, part.mean = len(features), features.mean(0)
        centred = features - part.mean
        part.scatter = centred.T @ centred
        self.merge(part)

    def merge(self, other: "Moments") -> None:
        """Adds the features of other moments."""
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


class PooledPixels(nn.Module):
    """Features without weights: means of x_0 over a coarse grid, and means of x_0 and x_0².

    Their Fréchet distance depends on colours and their layout only.

    Attributes:
        name: Identifies the features, also in file names.
        dim: The number d of features.
    """

    def __init__(self, grid: int = 8) -> None:
        super().__init__()
        self.grid, self.name, self.dim = grid, f"pixels{grid}", 3 * grid * grid + 6

    def forward(self, images: Tensor) -> Tensor:
        """Returns features (B, d) of uint8 images (B, H, W, 3)."""
        x_0 = to_model(images)
        grid = F.adaptive_avg_pool2d(x_0, self.grid).flatten(1)
        return torch.cat([grid, x_0.mean((2, 3)), x_0.square().mean((2, 3))], dim=1)


def load_reference(
    images: Split,
    content: str | None,
    extractor: Extractor,
    root: Path,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Callable[[range], Any] = iter,
) -> tuple[Moments, Path | None]:
    """Returns the moments of the features of a split, from a file if they were computed before.

    The name of the file is a hash of the pixels, the size and the extractor. If several processes
    need it, one computes it and the others wait.

    Arguments:
        images: The split; all of it is used, unflipped, in order.
        content: The hash of its pixels; None if unknown, then no file is used.
        extractor: The feature extractor.
        root: The directory of the files.
        batch_size: The number of images per batch.
        device: The device of the extractor.
        progress: Wraps the iteration over batches.

    Raises:
        DataError: If the file is damaged or cannot be written.
    """

    kept = _StatisticsFile(images, content, extractor, root, kept=len(images))

    def compute() -> dict[str, np.ndarray]:
        if kept.exists:
            parts: Iterable[Tensor] = torch.split(
                torch.from_numpy(kept.read()["features"]), batch_size
            )
        else:
            parts = _parts(images, None, extractor, batch_size, device, progress)
        moments = _merged(parts, extractor.dim)
        return {
            "n": np.array(moments.n), "mean": moments.mean.numpy(),
            "scatter": moments.scatter.numpy(),
        }  # fmt: skip

    file = _StatisticsFile(images, content, extractor, root)
    found = file.get(compute)
    moments = Moments(extractor.dim)
    moments.n = int(found["n"])
    moments.mean, moments.scatter = (torch.from_numpy(found[k]) for k in ("mean", "scatter"))
    return moments, file.path


def reference_features(
    images: Split,
    content: str | None,
    extractor: Extractor,
    root: Path,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Callable[[range], Any] = iter,
) -> tuple[Moments, Tensor]:
    """Returns the moments of a split, and the features themselves, float32, of shape (N, d).

    The features of at most `KEPT` evenly spaced images are returned; the moments are those of all
    images. Arguments and files are those of `load_reference`.

    Raises:
        DataError: If a file is damaged or cannot be written.
    """
    kept = min(KEPT, len(images))
    places = np.arange(kept) * len(images) // max(kept, 1)

    def compute() -> dict[str, np.ndarray]:
        parts = list(_parts(images, places, extractor, batch_size, device, progress))
        return {"features": torch.cat(parts).numpy()}

    found = _StatisticsFile(images, content, extractor, root, kept=kept).get(compute)
    features = torch.from_numpy(found["features"])
    if kept == len(images):
        return _merged(torch.split(features, batch_size), extractor.dim), features
    moments, _ = load_reference(
        images, content, extractor, root, batch_size=batch_size, device=device, progress=progress
    )
    return moments, features


def _parts(
    images: Split,
    places: np.ndarray | None,
    extractor: Extractor,
    batch_size: int,
    device: torch.device | str,
    progress: Callable[[range], Any],
) -> Iterator[Tensor]:
    """Features of a split, or of the images at `places`, batch by batch."""
    count = len(images) if places is None else len(places)
    for first in progress(range(0, count, batch_size)):
        chosen = slice(first, first + batch_size)
        batch = images[chosen if places is None else places[chosen]]
        yield extract(extractor, torch.from_numpy(batch).to(device))


def _merged(parts: Iterable[Tensor], dim: int) -> Moments:
    moments = Moments(dim)
    for part in parts:
        moments.update(part)
    return moments


def _is_writable(folder: Path) -> bool:
    """Whether a folder can be written, or created in the nearest of its parents that exists."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(nearest, os.W_OK)


class _StatisticsFile:
    """A file of moments or features, computed on first use."""

    def __init__(
        self, images: Split, content: str | None, extractor: Extractor, root: Path, kept: int = 0
    ) -> None:
        self.key = {
            "version": VERSION, "content": content, "n": len(images), "size": images.images.size,
            "extractor": extractor.name, **({"kept": kept} if kept else {}),
        }  # fmt: skip
        self.names = ("features",) if kept else ("n", "mean", "scatter")
        name = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if content is None else root / f"{extractor.name}-{name}.npz"

    @property
    def exists(self) -> bool:
        return self.path is not None and self.path.exists()

    def get(self, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Returns the arrays, from the file or computed."""
        if self.path is None:
            return compute()
        if self.exists:
            return self.read()
        if not _is_writable(self.path.parent):  # a shared cache, for example
            log.warning("%s cannot be written: the statistics are not stored", self.path.parent)
            return compute()
        with self._lock(self.path):
            if self.exists:
                return self.read()
            arrays = compute()
            self._write(self.path, arrays)
        return arrays

    def _lock(self, path: Path) -> AbstractContextManager[object]:
        """Returns the lock held while the file is computed."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return FileLock(path.with_suffix(".lock")).acquire()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"cannot write {self.path}: {error.strerror or error}; free space there, or set "
            "data.cache_dir to another disk"
        )

    def _write(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, key=np.array(json.dumps(self.key)), allow_pickle=False, **arrays)
        try:
            write_atomic(path, buffer.getvalue())
        except OSError as error:
            raise self._unwritable(error) from error

    def read(self) -> dict[str, np.ndarray]:
        """Returns the arrays from the file, which exists."""
        assert self.path is not None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                if json.loads(str(file["key"])) != self.key:
                    raise ValueError("it belongs to other images")
                return {name: file[name] for name in self.names}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DataError(
                f"{self.path} is damaged ({error}); delete it to compute it again"
            ) from error
