r"""Source of procedural faces."""

__all__ = ["FacesSource"]

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffusion_lab.data.faces import HAIR_STYLES, SIZES, draw_faces, face_factors
from diffusion_lab.data.source import Item, Source, SourceOptions, chunk_ranges
from diffusion_lab.data.splits import SPLITS
from diffusion_lab.errors import ArgumentError, DataError


class FacesSource(Source):
    """Procedural faces; image k of the three splits together is drawn from (seed, k).

    Arguments:
        size: Height and width in pixels.
        splits: The number of images of each split.
        seed: Seed of the drawings.

    Raises:
        ArgumentError: If faces cannot be drawn at the size, or a split is not a number of images.
    """

    CHUNK = 1024  # images drawn at once: bounds the memory

    def __init__(self, size: int, splits: Mapping[str, float], seed: int) -> None:
        if size not in SIZES:
            allowed = f"a power of two from {SIZES[0]} to {SIZES[-1]} for faces"
            raise ArgumentError("size", size, allowed)
        for split, count in splits.items():
            if count != int(count) or count < 0:
                allowed = "a number of images, an integer >= 0, for faces"
                raise ArgumentError(f"splits.{split}", count, allowed)
        self.size, self.seed = size, seed
        self.counts = {split: int(splits[split]) for split in SPLITS}
        self.native_splits = [split for split in SPLITS for _ in range(self.counts[split])]
        self.names = [f"face {k}" for k in range(len(self.native_splits))]
        self.groups = chunk_ranges(len(self.names), self.CHUNK)

    @classmethod
    def open(cls, options: SourceOptions) -> Source:
        return cls(options.size, options.splits, options.seed)

    def describe(self) -> dict[str, Any]:
        # The first images represent the drawing code: a change of it is another dataset.
        probe = draw_faces(torch.arange(8), seed=self.seed, size=self.size)
        return {
            "source": "faces",
            "size": self.size,
            "seed": self.seed,
            "counts": self.counts,
            "probe": hashlib.sha256(probe.numpy().tobytes()).hexdigest(),
        }

    def read(self, group: int, places: Sequence[int] | None = None) -> Iterator[Item]:
        index = torch.tensor(self.groups[group], dtype=torch.int64)
        if places is not None:
            index = index[list(places)]
        yield from draw_faces(index, seed=self.seed, size=self.size).numpy()

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        factors = face_factors(torch.arange(len(self.names)), seed=self.seed)
        known = [k for k, factor in factors.items() if not factor.is_floating_point()]
        if name not in known:
            raise DataError(f"data.label={name} is not allowed; faces have {', '.join(known)}")
        classes = list(HAIR_STYLES) if name == "hair_style" else ["no", "yes"]
        return classes, factors[name].long().numpy()
