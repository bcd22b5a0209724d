r"""Random access to images: memory-mapped pixels, encoded images, or reads from a source.

All three give the same uint8 pixels for the same positions, and are thread-safe.
"""

__all__ = [
    "EncodedImages", "Images", "MappedImages", "SourceImages", "Split", "checked_pixels",
]  # fmt: skip

import hashlib
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import cached_property
from itertools import groupby
from mmap import mmap
from pathlib import Path
from threading import Lock

import numpy as np

from diffusion_lab.data.decode import decode
from diffusion_lab.data.source import Item, Source, chunk_ranges
from diffusion_lab.errors import DataError

Read = Item | memoryview


def checked_pixels(item: object, size: int, name: str) -> np.ndarray:
    """Returns the pixels that a source yields.

    Raises:
        DataError: If they are not uint8 of shape (size, size, 3). A number would otherwise be
            broadcast to an image of one colour.
    """
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.shape == (size, size, 3):
        return item
    found = f"{item.dtype} of shape {item.shape}" if isinstance(item, np.ndarray) else repr(item)
    raise DataError(
        f"{name}: the source yields {found:.80}, not a file or pixels, uint8 of shape "
        f"({size}, {size}, 3)"
    )


class Images(ABC):
    """An ordered set of images of one size.

    Attributes:
        size: Height and width in pixels.
        names: The name of each image.
        groups: The ranges of images that are stored together.
    """

    size: int
    names: list[str]
    groups: list[range]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([group.start for group in self.groups])

    def group_of(self, positions: np.ndarray) -> np.ndarray:
        """Returns the index of the group of each image."""
        return np.searchsorted(self._starts, positions, side="right") - 1

    @abstractmethod
    def gather(self, positions: np.ndarray) -> np.ndarray:
        """Returns the images at the given positions, uint8, of shape (B, size, size, 3)."""


class _MappedFile:
    """A memory-mapped file whose length is checked before each access.

    Access to a mapping beyond the end of its file kills the process by SIGBUS.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb")  # stays open, also if the file is renamed or removed
        self.length = os.fstat(self.file.fileno()).st_size

    def check(self) -> None:
        """Raises DataError if the file has been truncated."""
        length = os.fstat(self.file.fileno()).st_size
        if length < self.length:
            raise DataError(
                f"{self.path} was truncated while it was in use: it has {length} bytes, not "
                f"{self.length}; remove its directory, and it is created again"
            )


class MappedImages(Images):
    """Pixels in a memory-mapped file: shared by all processes, evicted by the system if needed.

    Arguments:
        path: The array, uint8, of shape (N, size, size, 3).
        names: The names.
        block: The number of images of a group.
        sha256: The hash of the pixels of each image, uint8, of shape (N, 32), compared at the
            first access; None compares nothing.
    """

    def __init__(
        self, path: Path, names: list[str], block: int = 64, sha256: np.ndarray | None = None
    ) -> None:
        self.array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        self.names, self.size = names, self.array.shape[1]
        self.groups = chunk_ranges(len(names), block)
        self.file, self.sha256 = _MappedFile(path), sha256
        self.compared = np.zeros(len(names), dtype=bool)

    def gather(self, positions: np.ndarray) -> np.ndarray:
        self.file.check()
        images = np.asarray(self.array[positions])
        if self.sha256 is not None and not self.compared[positions].all():
            for image, k in zip(images, positions.tolist(), strict=True):
                self._compare(image, k, self.sha256[k])
        return images

    def _compare(self, image: np.ndarray, position: int, sha256: np.ndarray) -> None:
        if self.compared[position]:
            return
        if hashlib.sha256(image.tobytes()).digest() != sha256.tobytes():
            raise DataError(
                f"{self.names[position]} has changed in {self.file.path} since it was packed: the "
                "disk or a copy is faulty. Remove the directory of that file, and it is created "
                "again"
            )
        self.compared[position] = True


class EncodedImages(Images):
    """Encoded images in a memory-mapped file, decoded at each access.

    Arguments:
        path: The bytes of all images.
        offsets: Start of each image in the file, and the end of the last, int64, (N + 1,).
        names: The names.
        size: Height and width in pixels.
        block: The number of images of a group.
    """

    def __init__(
        self, path: Path, offsets: np.ndarray, names: list[str], size: int, block: int = 64
    ) -> None:
        self.data = np.memmap(path, mode="r") if len(names) else np.zeros(0, dtype=np.uint8)
        self.file = _MappedFile(path)
        self.offsets, self.names, self.size = offsets, names, size
        self.groups = chunk_ranges(len(names), block)

    def gather(self, positions: np.ndarray) -> np.ndarray:
        self.file.check()
        images = np.empty((len(positions), self.size, self.size, 3), dtype=np.uint8)
        for k, position in enumerate(positions):
            first, last = self.offsets[position : position + 2]
            data = self.data[first:last].tobytes()
            decode(data, self.size, self.names[position], out=images[k])
        return images


class SourceImages(Images):
    """Images read from their source at each access.

    If the source reads whole groups only, the most recently used groups are kept encoded, up to
    a bound in bytes that includes the group being read.

    Arguments:
        source: The source.
        memory: The bound in bytes.
    """

    def __init__(self, source: Source, memory: int) -> None:
        self.source, self.memory = source, memory
        self.size, self.names, self.groups = source.size, source.names, source.groups
        self.reads = 0  # of whole groups
        self._lock = Lock()
        self._kept: OrderedDict[int, Future[list[Read]]] = OrderedDict()

    def gather(self, positions: np.ndarray) -> np.ndarray:
        images = np.empty((len(positions), self.size, self.size, 3), dtype=np.uint8)
        number = self.group_of(positions)
        # In the order of the batch, so that the last images of old groups are read before new
        # groups replace them.
        _, first, inverse = np.unique(number, return_index=True, return_inverse=True)
        order = np.argsort(first[inverse], kind="stable")
        for group, run in groupby(order.tolist(), key=lambda k: int(number[k])):
            members = list(run)
            places = [int(positions[k] - self.groups[group].start) for k in members]
            items: Iterable[Read]
            if self.source.group_access_only:
                everything = self._group(group)
                items = [everything[place] for place in places]
            else:
                items = self.source.read(group, places)
            for k, item in zip(members, items, strict=True):
                self._decode(item, int(positions[k]), images[k])
        return images

    def _decode(self, item: Read, position: int, out: np.ndarray) -> None:
        if isinstance(item, DataError):
            raise item
        if isinstance(item, bytes | memoryview):
            decode(bytes(item), self.size, self.source.location(position), out=out)
        else:
            out[:] = checked_pixels(item, self.size, self.source.location(position))

    def _group(self, group: int) -> list[Read]:
        """A whole group; the first thread reads it while the others wait."""
        with self._lock:
            mine = group not in self._kept
            if mine:
                self._kept[group] = Future()
                self.reads += 1
            future = self._kept[group]
            self._kept.move_to_end(group)
            held = sum(self.source.group_bytes[k] for k in self._kept)
            for other in [k for k, read in self._kept.items() if read.done() and k != group]:
                if held > self.memory:  # including the group about to be read
                    held -= self.source.group_bytes[other]
                    del self._kept[other]
        if mine:
            try:
                future.set_result(_collate(self.source.read(group)))
            except BaseException as error:
                with self._lock:
                    self._kept.pop(group, None)
                future.set_exception(error)
                raise
        return future.result()


def _collate(items: Iterator[Item]) -> list[Read]:
    """Copies encoded images into one block, which is returned to the system with the group.

    Thousands of small allocations would fragment the heap, and the process would grow.
    """
    images: list[Read] = list(items)
    size = sum(len(item) for item in images if isinstance(item, bytes))
    block, first = memoryview(mmap(-1, max(1, size))), 0
    for k, item in enumerate(images):
        if isinstance(item, bytes):
            last = first + len(item)
            block[first:last] = item
            images[k] = block[first:last]
            first = last
    return images


class Split:
    """A subset of images.

    Arguments:
        images: The images.
        positions: Positions of the subset, int64, ascending, of shape (N,).
        labels: The class of each image of the subset, int64, of shape (N,); None without classes.
    """

    def __init__(
        self, images: Images, positions: np.ndarray, labels: np.ndarray | None = None
    ) -> None:
        self.images, self.positions, self.labels = images, positions, labels

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        """Returns images by their positions in the split, uint8, of shape (B, size, size, 3)."""
        return self.images.gather(self.positions[index])

    @property
    def names(self) -> list[str]:
        """The names of the images."""
        return [self.images.names[k] for k in self.positions]

    @property
    def groups(self) -> list[int]:
        """The number of images of each group in the split, for groups that have any."""
        number = self.images.group_of(self.positions)
        return [int(count) for count in np.unique(number, return_counts=True)[1]]
