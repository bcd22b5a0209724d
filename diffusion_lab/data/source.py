r"""Where images come from: the embedded faces, a folder of files, or parquet files of the hub.

A source says which images each split holds and reads them in order. It is read once, by `pack`
in `cache.py`; training never touches it.
"""

__all__ = ["SPLITS", "FacesSource", "FolderSource", "ParquetSource", "Source", "open_source"]

import hashlib
import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion_lab.data.faces import draw_faces
from diffusion_lab.errors import DataError
from diffusion_lab.noise import make_key

SPLITS = ("train", "val", "test")
SUFFIXES = (".jpg", ".jpeg", ".png")
MODES = (
    "RGB",
    "RGBA",
    "L",
    "P",
    "CMYK",
)  # Pillow makes 8-bit RGB of these without loss of range


class Source(ABC):
    """An ordered set of images, divided into splits.

    Attributes:
        size: Height and width of the images, in pixels.
        items: For each split the names of its images: what identifies an image to the user.
    """

    size: int
    items: dict[str, list[str]]

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns what decides the pixels, as plain data; its hash names the packed cache."""

    @abstractmethod
    def read(self, split: str) -> Iterator[np.ndarray]:
        """Yields the images of a split in the order of `items`, uint8, of shape (size, size, 3).

        Raises:
            DataError: If an image cannot be read; names it.
        """


class FacesSource(Source):
    """Procedural faces; image k of the three splits together is drawn from (seed, k).

    Arguments:
        size: Height and width in pixels, a power of two.
        counts: The number of images of each split.
        seed: Seed of the drawings.
    """

    CHUNK = 1024  # images drawn at once: bounds the memory

    def __init__(self, size: int, counts: Mapping[str, int], seed: int) -> None:
        self.size = size
        self.seed = seed
        self.ranges, first = {}, 0
        for split in SPLITS:
            self.ranges[split] = range(first, first + int(counts[split]))
            first += int(counts[split])
        self.items = {split: [f"face {k}" for k in r] for split, r in self.ranges.items()}

    def describe(self) -> dict[str, Any]:
        # The first drawings stand for the code that makes them: a change of it is a new set.
        probe = draw_faces(torch.arange(8), seed=self.seed, size=self.size)
        return {
            "source": "faces",
            "size": self.size,
            "seed": self.seed,
            "counts": {split: len(r) for split, r in self.ranges.items()},
            "probe": hashlib.sha256(probe.numpy().tobytes()).hexdigest(),
        }

    def read(self, split: str) -> Iterator[np.ndarray]:
        indices = torch.tensor(self.ranges[split], dtype=torch.int64)
        for chunk in indices.split(self.CHUNK):
            yield from draw_faces(chunk, seed=self.seed, size=self.size).numpy()


def decode(data: bytes, size: int, name: str) -> np.ndarray:
    """Decodes a JPEG or PNG to uint8 RGB, of shape (size, size, 3).

    A larger square image is resized with Pillow's Lanczos filter; anything else that does not fit
    is refused: what an image looked like before it was cropped is not ours to guess.

    Raises:
        DataError: If the image is corrupt, not square, too small or of an unusual mode.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            mode, width, height = image.mode, image.width, image.height
            if mode not in MODES:
                raise DataError(f"{name}: mode {mode} is not supported; convert it to 8-bit RGB")
            if width != height or width < size:
                raise DataError(
                    f"{name}: {width}x{height} pixels do not make {size}x{size}; "
                    f"crop it to a square of at least {size} pixels, or set data.size"
                )
            image = image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # Pillow raises many kinds; all mean that the file is no good
        raise DataError(
            f"{name}: not a readable JPEG or PNG ({error}); repair or remove the file"
        ) from error
    if width != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def split_by_name(
    names: list[str], fractions: Mapping[str, float], seed: int
) -> dict[str, list[str]]:
    """Divides names by a hash of each: adding or removing images moves no other image.

    Arguments:
        names: The names.
        fractions: The share of each split; they are normalised to sum to one.
        seed: Another seed gives another division.
    """
    total = sum(fractions[split] for split in SPLITS)
    result: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in names:
        u = (int(make_key(seed, "split", name)) & (2**53 - 1)) / 2**53
        edge = 0.0
        for split in SPLITS:
            edge += fractions[split] / total
            if u < edge or split == SPLITS[-1]:
                result[split].append(name)
                break
    return result


def _state(path: Path) -> list[int]:
    """What changes when a file does: its size and time of modification."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


class FolderSource(Source):
    """All JPEG and PNG files under a folder.

    Arguments:
        folder: The folder.
        size: Height and width in pixels.
        fractions: The share of each split, by a hash of the file's path under the folder.
        seed: Seed of that division.

    Raises:
        DataError: If the folder holds no image.
    """

    def __init__(self, folder: Path, size: int, fractions: Mapping[str, float], seed: int) -> None:
        self.folder, self.size = folder, size
        names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES and path.is_file()
        )
        if not names:
            raise DataError(
                f"data.source={folder} holds no image (.jpg, .jpeg or .png); "
                "point data.source at the folder that holds them"
            )
        self.items = split_by_name(names, fractions, seed)

    def describe(self) -> dict[str, Any]:
        names = sorted(chain.from_iterable(self.items.values()))
        return {
            "source": str(self.folder.resolve()),
            "size": self.size,
            "resample": "lanczos",
            "splits": self.items,
            "files": {name: _state(self.folder / name) for name in names},
        }

    def read(self, split: str) -> Iterator[np.ndarray]:
        for name in self.items[split]:
            path = self.folder / name
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
            yield decode(data, self.size, str(path))


class ParquetSource(Source):
    """Parquet files with a column of encoded images, as the hub stores image sets.

    Files whose name, or whose folder's name, begins with train, validation or test are the set's
    own splits. Where there is no
    test split the validation split is divided into val and test in proportion of `fractions`;
    where there is but one split, all three come from it. The division is by a hash of file and
    row.

    Arguments:
        files: The parquet files.
        size: Height and width in pixels.
        fractions: The share of each split, where the set does not say.
        seed: Seed of that division.
        column: Name of the column of images.
        origin: What the user called the set.

    Raises:
        DataError: If pyarrow is missing, a file is unreadable or has no such column.
    """

    def __init__(
        self,
        files: list[Path],
        size: int,
        fractions: Mapping[str, float],
        seed: int,
        column: str = "image",
        origin: str = "",
    ) -> None:
        root = Path(os.path.commonpath([path.parent for path in files]))
        self.files = {path.relative_to(root).as_posix(): path for path in sorted(files)}
        self.size, self.column, self.origin = size, column, origin
        own: dict[str, list[str]] = {}
        for name, path in self.files.items():
            table = self._open(path)
            if column not in table.schema_arrow.names:
                raise DataError(
                    f"{path} has no column {column!r}; "
                    f"it has {', '.join(table.schema_arrow.names)}"
                )
            match = re.search(r"(?:^|/)(train|validation|val|test)(?![a-z])", name)
            split = {"validation": "val"}.get(match[1], match[1]) if match else "train"
            own.setdefault(split, []).extend(
                f"{name}:{row}" for row in range(table.metadata.num_rows)
            )
        if "val" in own and "test" not in own:
            shares = {**fractions, "train": 0.0}
            own = {**split_by_name(own["val"], shares, seed), "train": own.get("train", [])}
        elif len(own) == 1:
            own = split_by_name(next(iter(own.values())), fractions, seed)
        self.items = {split: own.get(split, []) for split in SPLITS}

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise DataError(
                "reading parquet needs pyarrow; pip install 'diffusion-lab[parquet]'"
            ) from error
        try:
            return parquet.ParquetFile(path)
        except (ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({error})") from error

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.origin,
            "size": self.size,
            "resample": "lanczos",
            "column": self.column,
            "splits": self.items,
            "files": {name: _state(path) for name, path in self.files.items()},
        }

    def read(self, split: str) -> Iterator[np.ndarray]:
        wanted = set(self.items[split])
        for name, path in self.files.items():
            if not any(item.startswith(f"{name}:") for item in wanted):
                continue
            for row, image in enumerate(self._rows(path)):
                if f"{name}:{row}" in wanted:
                    data = image["bytes"] if isinstance(image, dict) else image
                    yield decode(data or b"", self.size, f"{path} row {row}")

    def _rows(self, path: Path) -> Iterator[Any]:
        batches = self._open(path).iter_batches(batch_size=64, columns=[self.column])
        try:
            for batch in batches:
                yield from batch.column(0).to_pylist()
        except OSError as error:  # pyarrow's errors of damaged pages are OSErrors
            raise DataError(f"{path}: damaged ({error}); fetch the file again") from error


def open_source(
    source: str, size: int, splits: Mapping[str, float], seed: int, column: str = "image"
) -> Source:
    """Opens the source that a string names.

    Arguments:
        source: "faces", a folder of images, a parquet file or a folder of them, or
            "hf://datasets/<owner>/<name>[@<revision>]" for a set of the Hugging Face hub.
        size: Height and width in pixels.
        splits: For faces the number of images of each split, otherwise shares.
        seed: Seed of the drawings or of the division into splits.
        column: The column of images in parquet files.

    Raises:
        DataError: If there is nothing there, or it cannot be reached.
    """
    if source == "faces":
        return FacesSource(size, {split: int(splits[split]) for split in SPLITS}, seed)
    if source.startswith("hf://"):
        files = _from_hub(source)
        return ParquetSource(files, size, splits, seed, column, origin=source)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"data.source={source} does not exist; give a folder of images, a parquet file, "
            "hf://datasets/<owner>/<name>, or faces"
        )
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if files:
        return ParquetSource(files, size, splits, seed, column, origin=str(path.resolve()))
    return FolderSource(path, size, splits, seed)


def _from_hub(source: str) -> list[Path]:
    """Downloads the parquet files of a hub data set, once; the hub's own cache keeps them."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@(.+))?", source)
    if not match:
        raise DataError(
            f"data.source={source} is not understood; write hf://datasets/<owner>/<name>, "
            "with @<revision> after it if you like"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DataError(
            "reading from the hub needs huggingface_hub; pip install 'diffusion-lab[parquet]'"
        ) from error
    try:
        folder = snapshot_download(
            match[1], repo_type="dataset", revision=match[2], allow_patterns="*.parquet"
        )
    except Exception as error:  # the hub's client raises its own, httpx's and requests' errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data.source={source} cannot be downloaded ({reason}); check the network, or give "
            "a folder of images on this machine: data.source=<folder>"
        ) from error
    files = sorted(Path(folder).rglob("*.parquet"))
    if not files:
        raise DataError(f"data.source={source} holds no parquet file")
    return files
