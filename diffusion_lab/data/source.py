r"""Image sources: base class, and opening of a source by its address.

A source lists its images and reads them, group by group. The packed cache reads it once; with
`data.cache=none` the loader reads it again in every epoch. A new source is a subclass of `Source`;
`data.source` may be a node with its `_target_`. One that has an address of its own also has `open`
and a line in `registry.py`.
"""

__all__ = ["Item", "Source", "SourceOptions", "chunk_ranges", "classes_of", "count_ignored"]

import posixpath
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from diffusion_lab.data.storage import Storage, open_storage
from diffusion_lab.errors import DataError

# An image as a source yields it: the bytes of a file, pixels, or the reason why it is unreadable.
Item = bytes | np.ndarray | DataError


@dataclass(frozen=True)
class SourceOptions:
    """Options for opening a source by its address.

    Arguments:
        address: See `registry.open_source`.
        size: Height and width of the images in pixels.
        splits: The number of images of each split, for generated images.
        seed: Seed of generated images.
        image_column: The column of images in parquet files.
        download: See `open_storage`.
        link_root: See `open_storage`.
    """

    address: str
    size: int
    splits: Mapping[str, float]
    seed: int = 0
    image_column: str = "image"
    download: bool = True
    link_root: str | None = None

    @cached_property
    def storage(self) -> Storage:
        """The files at the address.

        Raises:
            DataError: If there are none, or they cannot be reached.
        """
        return open_storage(self.address, self.download, self.link_root)


class Source(ABC):
    """An ordered set of images.

    Attributes:
        size: Height and width of the images in pixels.
        names: The name of each image, unique in the source.
        native_splits: The split of each image in the dataset itself: train, val or test.
        groups: The ranges of images that are read together.
        group_access_only: Whether a read of one image reads its whole group.
        group_bytes: The encoded size of each group, where `group_access_only`.
        ignored: The number of files that are not used, by suffix or reason.
    """

    size: int
    names: list[str]
    native_splits: list[str]
    groups: list[range]
    group_access_only: bool = False
    group_bytes: list[int]
    ignored: Mapping[str, int] = MappingProxyType({})

    @classmethod
    def open(cls, options: SourceOptions) -> "Source | None":
        """Opens the source at an address; None if the address is not one of this class.

        Only classes in `registry.py` need it.

        Raises:
            DataError: If the source is missing, unreadable or cannot be reached.
        """
        return None

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns everything that determines the pixels, as plain data.

        Its hash names the packed cache. It has at least `source` and `size`.
        """

    @abstractmethod
    def read(self, group: int, places: Sequence[int] | None = None) -> Iterator[Item]:
        """Yields the images of a group in order.

        Arguments:
            group: The index of the group.
            places: Positions in the group; None yields all images.

        Raises:
            DataError: If the network fails. The error of a bad image is yielded instead.
        """

    def location(self, k: int) -> str:
        """Returns the location of image k, for error messages."""
        return self.names[k]

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        """Returns the names of the classes, and the class of each image, int64, of shape (N,).

        Arguments:
            name: The attribute that defines the classes.

        Raises:
            DataError: If the source has no such attribute; names those that it has.
        """
        raise DataError(f"data.label={name}: {type(self).__name__} has no classes")


def count_ignored(storage: Storage, used: Collection[str]) -> dict[str, int]:
    """Returns the number of files that a source does not use, by suffix or reason."""
    suffixes = Counter(
        posixpath.splitext(name)[1].lower() or "without suffix"
        for name in storage.files
        if name not in used
    )
    counts = suffixes + storage.ignored
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def classes_of(values: Sequence[Any]) -> tuple[list[str], np.ndarray]:
    """Returns the sorted distinct values as text, and each value's index among them, int64."""
    distinct, index = np.unique(np.asarray(values), return_inverse=True)
    return [str(value) for value in distinct], index.astype(np.int64)


def chunk_ranges(count: int, length: int) -> list[range]:
    """Returns 0, ..., count - 1 in ranges of equal length; the last one may be shorter."""
    return [range(first, min(first + length, count)) for first in range(0, count, length)]
