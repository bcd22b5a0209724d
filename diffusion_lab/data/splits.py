r"""Assignment of images to the train, val and test splits, by a hash of their names."""

__all__ = ["SPLITS", "SPLIT_ALIASES", "split_images"]

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from diffusion_lab.errors import DataError
from diffusion_lab.rng import make_key

SPLITS = ("train", "val", "test")
SPLIT_ALIASES = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def split_images(
    names: Sequence[str],
    native_splits: Sequence[str],
    shares: Mapping[str, float],
    seed: int,
    pooled: str | None = None,
) -> dict[str, np.ndarray]:
    """Returns the positions of the images of train, val and test, int64, ascending.

    The native splits of a dataset are kept. If it has no test split, its validation images are
    divided between val and test; if it has no validation split, its training images between train
    and val; and a dataset of one split among all three, in proportion to `shares`. A hash of its
    name decides the split of an image, so that adding or removing images moves no other image.

    Arguments:
        names: The names of the images.
        native_splits: The split of each image in the dataset.
        shares: The share of each split, up to a common factor.
        seed: Seed of the assignment.
        pooled: Native splits, joined by "+", whose images are divided among all three instead;
            None keeps the native splits.

    Raises:
        DataError: If `pooled` names a split that the dataset does not have.
    """
    position, native = np.arange(len(names)), np.asarray(native_splits, dtype="U5")
    present = set(native.tolist())
    if pooled is not None:
        chosen = [SPLIT_ALIASES.get(part, part) for part in pooled.split("+")]
        if missing := [part for part in chosen if part not in present]:
            raise DataError(
                f"data.split={pooled}: the dataset has no split {missing[0]}; "
                f"it has {', '.join(split for split in SPLITS if split in present)}"
            )
        pools: list[tuple[np.ndarray, tuple[str, ...]]] = [(np.isin(native, chosen), SPLITS)]
    elif len(present) == 1:
        pools = [(np.ones(len(names), dtype=bool), SPLITS)]
    elif present == {"train", "val"}:
        pools = [(native == "train", ("train",)), (native == "val", ("val", "test"))]
    elif present == {"train", "test"}:
        pools = [(native == "train", ("train", "val")), (native == "test", ("test",))]
    else:
        pools = [(native == split, (split,)) for split in SPLITS]
    u = _uniform(names, seed)
    result = {split: position[:0] for split in SPLITS}
    for members, targets in pools:
        total, first = sum(shares[split] for split in targets), 0.0
        for split in targets:
            last = first + shares[split] / total if total and split != targets[-1] else 1.0
            result[split] = position[members & (first <= u) & (u < last)]
            first = last
    return result


def _uniform(names: Sequence[str], seed: int) -> np.ndarray:
    """A number in [0, 1) for each name, float64."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    number = torch.from_numpy(np.frombuffer(b"".join(digests), dtype="<i8").copy())
    return (make_key(seed, "split", number) & (2**53 - 1)).numpy() / 2**53
