r"""Where images come from: the embedded faces, a folder of files, or parquet files.

A source lists its images and reads them, group by group. The packed cache reads it once; with
`data.cache=none` the loader reads it again every epoch.
"""

__all__ = [
    "SPLITS", "FacesSource", "FolderSource", "ParquetSource", "Source", "divide", "open_source",
]  # fmt: skip

import hashlib
import posixpath
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from diffusion_lab.data.faces import HAIR_STYLES, draw_faces, face_factors
from diffusion_lab.data.storage import EXTRA, Storage, open_storage
from diffusion_lab.errors import DataError
from diffusion_lab.rng import make_key

SPLITS = ("train", "val", "test")
OWN = {"train": "train", "val": "val", "validation": "val", "test": "test"}
SUFFIXES = (".jpg", ".jpeg", ".png")

# What a source gives for an image: the bytes of a file, drawn pixels, or why there is neither.
Item = bytes | np.ndarray | DataError


class Source(ABC):
    """An ordered set of images.

    Attributes:
        size: Height and width of the images, in pixels.
        names: What identifies each image to the user.
        own: The split that the set itself puts each image in: train, val or test.
        groups: The stretches of images that are read together.
        whole: Whether a group can only be read as a whole, so that a random access costs one.
        bytes: Then the size of each group as it is read.
    """

    size: int
    names: list[str]
    own: list[str]
    groups: list[range]
    whole: bool = False
    bytes: list[int]

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns what decides the pixels, as plain data; its hash names the packed cache."""

    @abstractmethod
    def read(self, group: int, places: Sequence[int] | None = None) -> Iterator[Item]:
        """Yields the images of a group in their order.

        Arguments:
            group: The group's number.
            places: Which images, counted from the first of the group; all if None.

        Raises:
            DataError: If the network fails. A bad image is no reason: its error is yielded.
        """

    def where(self, k: int) -> str:
        """Returns where image k is, for messages."""
        return self.names[k]

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        """Returns the names of K classes, and the class of each image, int64, of shape (N,).

        Arguments:
            name: What the images are divided by.

        Raises:
            DataError: If the source does not know it; says what it knows.
        """
        raise DataError(f"data.label={name}: {type(self).__name__} knows no classes")


def classes_of(values: Sequence[Any]) -> tuple[list[str], np.ndarray]:
    """Returns the distinct values in order, as text, and the place of each value among them."""
    distinct, places = np.unique(np.asarray(values), return_inverse=True)
    return [str(value) for value in distinct], places.astype(np.int64)


def cut(count: int, length: int) -> list[range]:
    """Returns 0, ..., count - 1 in stretches of a length; the last may be shorter."""
    return [range(first, min(first + length, count)) for first in range(0, count, length)]


class FacesSource(Source):
    """Procedural faces; image k of the three splits together is drawn from (seed, k).

    Arguments:
        size: Height and width in pixels, a power of two.
        counts: The number of images of each split.
        seed: Seed of the drawings.
    """

    CHUNK = 1024  # images drawn at once: bounds the memory

    def __init__(self, size: int, counts: Mapping[str, int], seed: int) -> None:
        self.size, self.seed = size, seed
        self.counts = {split: int(counts[split]) for split in SPLITS}
        self.own = [split for split in SPLITS for _ in range(self.counts[split])]
        self.names = [f"face {k}" for k in range(len(self.own))]
        self.groups = cut(len(self.own), self.CHUNK)

    def describe(self) -> dict[str, Any]:
        # The first drawings stand for the code that makes them: a change of it is a new set.
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
            raise DataError(f"data.label={name}: faces have the classes of {', '.join(known)}")
        classes = list(HAIR_STYLES) if name == "hair_style" else ["no", "yes"]
        return classes, factors[name].long().numpy()


class FolderSource(Source):
    """All JPEG and PNG files under a folder; folders train, val and test in it are its splits.

    Arguments:
        storage: The folder.
        size: Height and width in pixels.

    Raises:
        DataError: If the folder holds no image.
    """

    CHUNK = 64  # files

    def __init__(self, storage: Storage, size: int) -> None:
        self.storage, self.size = storage, size
        files = storage.files.items()
        self.files = {k: state for k, state in files if k.lower().endswith(SUFFIXES)}
        if not self.files:
            raise DataError(
                f"data.source={storage.address} holds no image (.jpg, .jpeg or .png); "
                "point data.source at the folder that holds them"
            )
        self.names = list(self.files)
        self.own = [OWN.get(name.split("/")[0], "train") for name in self.names]
        self.groups = cut(len(self.names), self.CHUNK)

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

    def where(self, k: int) -> str:
        return self.storage.location(self.names[k])

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        """The folder that holds each file is its class."""
        if name != "folder":
            raise DataError(f"data.label={name}: a folder of images has the classes of folder")
        return classes_of([posixpath.dirname(file) for file in self.names])


class ParquetSource(Source):
    """Parquet files with a column of encoded images, as the hub stores image sets.

    Files whose name, or whose folder's name, begins with train, validation, val or test are the
    set's own splits. An image is named by its file and row.

    Arguments:
        storage: The files.
        size: Height and width in pixels.
        column: Name of the column of images.

    Raises:
        DataError: If pyarrow is missing, a file is unreadable or has no such column.
    """

    BATCH = 64  # rows handed on at once
    whole = True

    def __init__(self, storage: Storage, size: int, column: str = "image") -> None:
        self.storage, self.size, self.column = storage, size, column
        files = {k: v for k, v in storage.files.items() if k.endswith(".parquet")}
        if not files:
            raise DataError(f"data.source={storage.address} holds no parquet file")
        # Names without the folders that all files share, so that a set is named alike anywhere.
        base = posixpath.commonpath([posixpath.dirname(name) for name in files])
        self.files = {posixpath.relpath(name, base or "."): v for name, v in files.items()}
        self.base = base
        self.names, self.own, self.parts, self.bytes = [], [], [], []
        lengths = []
        for file in self.files:
            metadata = self._open(file).metadata
            schema = metadata.schema.to_arrow_schema().names
            if column not in schema:
                raise DataError(
                    f"{self._path(file)} has no column {column!r}; it has {', '.join(schema)}; "
                    "set data.column"
                )
            match = re.search(r"(?:^|/)(train|validation|val|test)(?![a-z])", file)
            self.own += [OWN[match[1]] if match else "train"] * metadata.num_rows
            self.names += [f"{file}:{row}" for row in range(metadata.num_rows)]
            for number in range(metadata.num_row_groups):
                row_group = metadata.row_group(number)
                self.parts.append((file, number))
                self.bytes.append(row_group.total_byte_size)
                lengths.append(row_group.num_rows)
        edges = list(accumulate(lengths, initial=0))
        self.groups = [range(first, last) for first, last in pairwise(edges)]

    def _path(self, file: str) -> str:
        return self.storage.location(posixpath.join(self.base, file))

    def _open(self, file: str) -> Any:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise DataError(f"reading parquet needs pyarrow; {EXTRA}") from error
        try:
            return parquet.ParquetFile(self.storage.open(posixpath.join(self.base, file)))
        except (ArrowException, OSError) as error:
            raise DataError(
                f"{self._path(file)}: not a readable parquet file ({error}); fetch it again"
            ) from error

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.storage.address,
            "size": self.size,
            "resample": "lanczos",
            "column": self.column,
            "files": self.files,
        }

    def read(self, group: int, places: Sequence[int] | None = None) -> Iterator[Item]:
        rows = self._rows(group)
        if places is not None:
            everything = list(rows)
            rows = (everything[place] for place in places)
        return rows

    def _rows(self, group: int) -> Iterator[Item]:
        from pyarrow import ArrowException

        file, number = self.parts[group]
        done = 0
        try:
            batches = self._open(file).iter_batches(
                self.BATCH, row_groups=[number], columns=[self.column]
            )
            for batch in batches:
                for row in batch.column(0).to_pylist():
                    yield (row["bytes"] if isinstance(row, dict) else row) or b""
                    done += 1
        except (ArrowException, OSError, DataError) as error:
            failure = DataError(
                f"{self._path(file)}: row group {number} cannot be read from row {done} on "
                f"({error}); fetch the file again"
            )
            if self.storage.remote:
                raise failure from error
            for _ in range(done, len(self.groups[group])):  # the rows that nobody can get at
                yield failure

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        """The values of a column."""
        values: list[Any] = []
        for file in self.files:
            parquet = self._open(file)
            columns = parquet.schema_arrow.names
            if name not in columns:
                raise DataError(
                    f"data.label={name}: {self._path(file)} has no such column; it has "
                    f"{', '.join(columns)}"
                )
            values += parquet.read(columns=[name]).column(0).to_pylist()
        if None in values or isinstance(values[0], float | dict | list):
            raise DataError(f"data.label={name}: the column holds no classes, or not for all rows")
        return classes_of(values)

    def where(self, k: int) -> str:
        file, row = self.names[k].rsplit(":", 1)
        return f"{self._path(file)} row {row}"


def open_source(
    source: str,
    size: int,
    counts: Mapping[str, float],
    seed: int = 0,
    column: str = "image",
    download: bool = True,
) -> Source:
    """Opens the source that a string names.

    Arguments:
        source: "faces"; a folder of images, or of parquet files, of this machine, S3
            (s3://<bucket>/<folder>) or Google Cloud (gs://...); a parquet file; or
            "hf://datasets/<owner>/<name>[@<revision>]" for a set of the Hugging Face hub.
        size: Height and width in pixels.
        counts: For faces the number of images of each split.
        seed: For faces the seed of the drawings.
        column: The column of images in parquet files.
        download: See `open_storage`.

    Raises:
        DataError: If there is nothing there, or it cannot be reached.
    """
    if source == "faces":
        return FacesSource(size, counts, seed)
    storage = open_storage(source, download)
    parquet = source.startswith("hf://") or any(k.endswith(".parquet") for k in storage.files)
    if parquet:
        return ParquetSource(storage, size, column)
    return FolderSource(storage, size)


def divide(
    names: Sequence[str],
    own: Sequence[str],
    shares: Mapping[str, float],
    seed: int,
    split: str | None = None,
) -> dict[str, np.ndarray]:
    """Divides images into train, val and test; returns their places, int64, in order.

    The set's own splits are kept. Without a test split the validation images are shared out among
    val and test, without a validation split the training images among train and val, and a set
    of one split among all three, in proportion to `shares`. Who goes where is decided by a hash
    of the image's name: adding or removing images moves no other image.

    Arguments:
        names: The images' names.
        own: The set's own split of each image.
        shares: The share of each split.
        seed: Another seed gives another division.
        split: Own splits, joined by "+", whose images are pooled and shared out among all three
            instead; None takes the set's own.

    Raises:
        DataError: If `split` names a split that the set does not have.
    """
    place, own = np.arange(len(names)), np.asarray(own, dtype="U5")
    kinds = set(own.tolist())
    if split is not None:
        chosen = [OWN.get(part, part) for part in split.split("+")]
        if missing := [part for part in chosen if part not in kinds]:
            raise DataError(
                f"data.split={split}: the set has no split {missing[0]}; "
                f"it has {', '.join(k for k in SPLITS if k in kinds)}"
            )
        pool = [(np.isin(own, chosen), SPLITS)]
    elif len(kinds) == 1:
        pool = [(np.ones(len(names), dtype=bool), SPLITS)]
    elif kinds == {"train", "val"}:
        pool = [(own == "train", ("train",)), (own == "val", ("val", "test"))]
    elif kinds == {"train", "test"}:
        pool = [(own == "train", ("train", "val")), (own == "test", ("test",))]
    else:
        pool = [(own == kind, (kind,)) for kind in SPLITS]
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
    number = torch.from_numpy(np.frombuffer(b"".join(digests), dtype="<i8").copy())
    u = (make_key(seed, "split", number) & (2**53 - 1)).numpy() / 2**53
    result = {kind: place[:0] for kind in SPLITS}
    for inside, kinds in pool:
        total, first = sum(shares[kind] for kind in kinds), 0.0
        for kind in kinds:
            last = first + shares[kind] / total if total and kind != kinds[-1] else 1.0
            result[kind] = place[inside & (first <= u) & (u < last)]
            first = last
    return result
