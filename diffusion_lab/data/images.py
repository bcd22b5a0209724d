r"""Images at hand: mapped from a packed cache, decoded from one, or read from their source.

All three give the same uint8 pixels for the same positions, and may be read by several threads.
"""

__all__ = ["EncodedImages", "Images", "MappedImages", "SourceImages", "Split"]

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from functools import cached_property
from itertools import groupby
from mmap import mmap
from pathlib import Path
from threading import Lock

import numpy as np

from diffusion_lab.data.decode import decode
from diffusion_lab.data.source import Item, Source, cut
from diffusion_lab.errors import DataError


class Images(ABC):
    """An ordered set of images of one size.

    Attributes:
        size: Height and width in pixels.
        names: What identifies each image to the user.
        groups: The stretches of images that lie together where they are read from.
    """

    size: int
    names: list[str]
    groups: list[range]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([group.start for group in self.groups])

    def group_of(self, positions: np.ndarray) -> np.ndarray:
        """Returns the number of the group that each image is in."""
        return np.searchsorted(self._starts, positions, side="right") - 1

    @abstractmethod
    def gather(self, positions: np.ndarray) -> np.ndarray:
        """Returns the images at some positions, uint8, of shape (B, size, size, 3)."""


class MappedImages(Images):
    """Pixels in a file, mapped: shared by all processes, and the system may drop their pages.

    Arguments:
        path: The array, uint8, of shape (N, size, size, 3).
        names: The names.
        block: How many images make a group.
    """

    def __init__(self, path: Path, names: list[str], block: int = 64) -> None:
        self.array = np.load(path, mmap_mode="r", allow_pickle=False)
        self.names, self.size = names, self.array.shape[1]
        self.groups = cut(len(names), block)

    def gather(self, positions: np.ndarray) -> np.ndarray:
        return self.array[positions]


class EncodedImages(Images):
    """Encoded images one after the other in a file, mapped, and decoded when asked for.

    Arguments:
        path: The bytes of all images.
        offsets: Where each image begins, and where the last ends, int64, of shape (N + 1,).
        names: The names.
        size: Height and width in pixels.
        block: How many images make a group.
    """

    def __init__(
        self, path: Path, offsets: np.ndarray, names: list[str], size: int, block: int = 64
    ) -> None:
        self.data = np.memmap(path, mode="r") if len(names) else np.zeros(0, dtype=np.uint8)
        self.offsets, self.names, self.size = offsets, names, size
        self.groups = cut(len(names), block)

    def gather(self, positions: np.ndarray) -> np.ndarray:
        images = np.empty((len(positions), self.size, self.size, 3), dtype=np.uint8)
        for k, position in enumerate(positions):
            first, last = self.offsets[position : position + 2]
            data = self.data[first:last].tobytes()
            decode(data, self.size, self.names[position], out=images[k])
        return images


class SourceImages(Images):
    """Images read from their source whenever they are asked for.

    Of a source that can only be read by whole groups, the encoded groups read last are kept, up
    to a bound in bytes, which the group that is being read counts towards.

    Arguments:
        source: The source.
        memory: The bound, in bytes.
    """

    def __init__(self, source: Source, memory: int) -> None:
        self.source, self.memory = source, memory
        self.size, self.names, self.groups = source.size, source.names, source.groups
        self.reads = 0  # of whole groups
        self._lock = Lock()
        self._kept: OrderedDict[int, Future] = OrderedDict()

    def gather(self, positions: np.ndarray) -> np.ndarray:
        images = np.empty((len(positions), self.size, self.size, 3), dtype=np.uint8)
        number = self.group_of(positions)
        # In the order in which they come, so that the last images of old groups are read before
        # new groups take their places.
        _, first, inverse = np.unique(number, return_index=True, return_inverse=True)
        order = np.argsort(first[inverse], kind="stable")
        for group, members in groupby(order, key=lambda k: int(number[k])):
            members = list(members)
            places = [int(positions[k] - self.groups[group].start) for k in members]
            if self.source.whole:
                items = self._group(group)
                items = [items[place] for place in places]
            else:
                items = self.source.read(group, places)
            for k, item in zip(members, items, strict=True):
                self._decode(item, int(positions[k]), images[k])
        return images

    def _decode(self, item: Item | memoryview, position: int, out: np.ndarray) -> None:
        if isinstance(item, DataError):
            raise item
        if isinstance(item, bytes | memoryview):
            decode(bytes(item), self.size, self.source.where(position), out=out)
        else:
            out[:] = item

    def _group(self, group: int) -> list[Item | memoryview]:
        """A whole group, read by the first thread that asks for it while the others wait."""
        with self._lock:
            future = self._kept.get(group)
            mine = future is None
            if mine:
                future = self._kept[group] = Future()
                self.reads += 1
            self._kept.move_to_end(group)
            held = sum(self.source.bytes[k] for k in self._kept)
            for other in [k for k, read in self._kept.items() if read.done() and k != group]:
                if held > self.memory:  # what is about to be read counts, too
                    held -= self.source.bytes[other]
                    del self._kept[other]
        if mine:
            try:
                future.set_result(_together(self.source.read(group)))
            except BaseException as error:
                with self._lock:
                    self._kept.pop(group, None)
                future.set_exception(error)
                raise
        return future.result()


def _together(items: Iterator[Item]) -> list[Item | memoryview]:
    """Moves encoded images into one block, which goes back to the system with the group.

    Thousands of small pieces would leave holes between what stays, and the process would grow.
    """
    images = list(items)
    lengths = [len(item) if isinstance(item, bytes) else 0 for item in images]
    block, first = memoryview(mmap(-1, max(1, sum(lengths)))), 0
    for k, length in enumerate(lengths):
        if isinstance(images[k], bytes):
            block[first : first + length] = images[k]
            images[k] = block[first : first + length]
            first += length
    return images


class Split:
    """Some of the images, in order.

    Arguments:
        images: The images.
        positions: Which of them, int64, ascending, of shape (N,).
        labels: The class of each of them, int64, of shape (N,); None without classes.
    """

    def __init__(
        self, images: Images, positions: np.ndarray, labels: np.ndarray | None = None
    ) -> None:
        self.images, self.positions, self.labels = images, positions, labels

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        """Returns images by their places in the split, uint8, of shape (B, size, size, 3)."""
        return self.images.gather(self.positions[index])

    @property
    def names(self) -> list[str]:
        """The images' names."""
        return [self.images.names[k] for k in self.positions]

    @property
    def groups(self) -> list[int]:
        """How many images of each group are in the split, for groups that have any."""
        number = self.images.group_of(self.positions)
        return np.unique(number, return_counts=True)[1].tolist()
