r"""Assignment of images to the train, val and test splits, by folders or a hash of their names."""

__all__ = ["SPLITS", "UNNAMED", "native_splits", "split_images", "split_part"]

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from diffusion_lab.errors import DataError
from diffusion_lab.rng import make_key

SPLITS = ("train", "val", "test")
# Words in the names of folders and of parquet files, in any case.
WORDS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
UNNAMED = "none"  # the native split of an image without one, in a dataset that has splits


def _split_of(part: str) -> str | None:
    """The split that a part of a path names: `Valid`, `train2017`, `DIV2K_test_HR`, `trainA`."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)
    found = {WORDS[word.lower()] for word in words if word.lower() in WORDS}
    return found.pop() if len(found) == 1 else None


def split_part(parts: Sequence[str]) -> int | None:
    """Returns the position of the first part of a path that names a split; None if none does."""
    return next((k for k, part in enumerate(parts) if _split_of(part)), None)


def native_splits(paths: Sequence[Sequence[str]]) -> list[str]:
    """Returns the native split of each path: that of its first part that names one.

    If no path has one, all are train. If only some have one, the others are `UNNAMED`, which
    `split_images` rejects.

    Arguments:
        paths: The parts of each path that may name a split.
    """
    known: dict[str, str | None] = {}
    result = []
    for path in paths:
        for part in path:
            if part not in known:
                known[part] = _split_of(part)
        result.append(next((split for part in path if (split := known[part])), UNNAMED))
    return result if set(result) != {UNNAMED} else ["train"] * len(result)


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
    and val; and a dataset of training images alone among all three, in proportion to `shares`.
    Test images are never used for training. A hash of its name decides the split of an image, so
    that adding or removing images moves no other image.

    Arguments:
        names: The names of the images.
        native_splits: The split of each image in the dataset.
        shares: The share of each split, up to a common factor.
        seed: Seed of the assignment.
        pooled: Native splits, joined by "+", whose images are divided among all three instead,
            or "all" for all images; None keeps the native splits.

    Raises:
        DataError: If `pooled` names a split that the dataset does not have, or some images have a
            native split and others do not; lists the folders of both.
    """
    position, native = np.arange(len(names)), np.asarray(native_splits, dtype="U5")
    present = set(native.tolist())
    if UNNAMED in present and pooled != "all":
        raise DataError(_describe_unnamed(names, native_splits))
    pools: list[tuple[np.ndarray, tuple[str, ...]]]
    if pooled == "all" or present == {"train"}:
        pools = [(np.ones(len(names), dtype=bool), SPLITS)]
    elif pooled is not None:
        chosen = [WORDS.get(part.lower(), part) for part in pooled.split("+")]
        if missing := [part for part in chosen if part not in present]:
            raise DataError(
                f"data.split={pooled}: the dataset has no split {missing[0]}; "
                f"it has {', '.join(split for split in SPLITS if split in present)}"
            )
        pools = [(np.isin(native, chosen), SPLITS)]
    else:
        parts: dict[str, tuple[str, ...]] = {split: (split,) for split in SPLITS}
        if "test" not in present:
            parts["val"] = ("val", "test")
        elif "val" not in present:
            parts["train"] = ("train", "val")
        pools = [(native == split, parts[split]) for split in SPLITS if split in present]
    u = _uniform(names, seed)
    result = {split: position[:0] for split in SPLITS}
    for members, targets in pools:
        total, first = sum(shares[split] for split in targets), 0.0
        for split in targets:
            last = first + shares[split] / total if total and split != targets[-1] else 1.0
            result[split] = position[members & (first <= u) & (u < last)]
            first = last
    return result


def _describe_unnamed(names: Sequence[str], native_splits: Sequence[str]) -> str:
    """The error of a dataset in which only some images have a native split."""
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name, split in zip(names, native_splits, strict=True):
        file, _, row = name.rpartition(".parquet:")  # images of folders are named by their file
        parts = f"{file}.parquet".split("/") if row.isdecimal() else name.split("/")[:-1]
        place = None if split == UNNAMED else split_part(parts)
        counts[split != UNNAMED]["/".join(parts if place is None else parts[: place + 1])] += 1
    named, unnamed = (
        ", ".join(f"{where or '.'} ({count})" for where, count in sorted(counts[key].items())[:10])
        for key in (True, False)
    )
    return (
        f"data.source has images in splits: {named}; and others in no split: {unnamed}. Name each "
        "folder or parquet file train, val or test, move the others out of data.source, or set "
        "data.split=all to divide all images by data.splits"
    )


def _uniform(names: Sequence[str], seed: int) -> np.ndarray:
    """A number in [0, 1) for each name, float64."""
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    number = torch.from_numpy(np.frombuffer(b"".join(digests), dtype="<i8").copy())
    return (make_key(seed, "split", number) & (2**53 - 1)).numpy() / 2**53
