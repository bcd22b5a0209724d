r"""Source of image files in a folder."""

__all__ = ["FolderSource"]

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from diffusion_lab.data.source import (
    Item,
    Source,
    SourceOptions,
    chunk_ranges,
    classes_of,
    count_ignored,
)
from diffusion_lab.data.splits import native_splits, split_part
from diffusion_lab.data.storage import Storage
from diffusion_lab.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png")


class FolderSource(Source):
    """All JPEG and PNG files under a folder; folders named train, val or test are native splits.

    The outermost such folder on the way to an image decides, see `native_splits`.

    Arguments:
        storage: The folder.
        size: Height and width in pixels.

    Raises:
        DataError: If the folder holds no image.
    """

    CHUNK = 64  # files of a group

    def __init__(self, storage: Storage, size: int) -> None:
        self.storage, self.size = storage, size
        files = storage.files.items()
        self.files = {k: state for k, state in files if k.lower().endswith(SUFFIXES)}
        self.ignored = count_ignored(storage, self.files)
        if not self.files:
            found = ", ".join(f"{count} {kind}" for kind, count in self.ignored.items())
            raise DataError(
                f"data.source={storage.address} holds no image (.jpg, .jpeg or .png)"
                + (f", only: {found}" if found else "")
                + "; point data.source at the folder that holds them"
            )
        self.names = list(self.files)
        self.folders = [name.split("/")[:-1] for name in self.names]
        self.native_splits = native_splits(self.folders)
        self.groups = chunk_ranges(len(self.names), self.CHUNK)

    @classmethod
    def open(cls, options: SourceOptions) -> Source:
        return cls(options.storage, options.size)

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.storage.address,
            "size": self.size,
            "resample": "lanczos",
            "files": self.files,
        }

    def read(self, group: int, places: Sequence[int] | None = None) -> Iterator[Item]:
        span = self.groups[group]
        for k in span if places is None else [span[place] for place in places]:
            try:
                yield self.storage.read(self.names[k])
            except DataError as error:
                if self.storage.remote:
                    raise
                yield error

    def location(self, k: int) -> str:
        return self.storage.location(self.names[k])

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        """The class of a file is the folder that holds it, without the folder of its split."""
        if name != "folder":
            raise DataError(
                f"data.label={name} is not allowed; a folder of images has the classes of folder"
            )
        classes = []
        for parts in self.folders:
            place = split_part(parts)
            classes.append("/".join(part for k, part in enumerate(parts) if k != place))
        return classes_of(classes)
