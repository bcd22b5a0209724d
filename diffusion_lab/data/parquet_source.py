r"""Source of encoded images in parquet files."""

__all__ = ["ParquetSource"]

import posixpath
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from diffusion_lab.data.source import Item, Source, SourceOptions, classes_of, count_ignored
from diffusion_lab.data.splits import native_splits
from diffusion_lab.data.storage import EXTRA, Storage
from diffusion_lab.errors import DataError


def _is_data(name: str) -> bool:
    """Whether a file is a parquet file of rows; metadata.parquet describes a folder of files."""
    return name.endswith(".parquet") and posixpath.basename(name) != "metadata.parquet"


class ParquetSource(Source):
    """Parquet files with a column of encoded images, the format of image datasets on the Hub.

    The native split of a file is the one that a folder's name or its own name contains, see
    `native_splits`. An image is named by its file and row.

    Arguments:
        storage: The files.
        size: Height and width in pixels.
        image_column: Name of the column of images.

    Raises:
        DataError: If pyarrow is missing, a file is unreadable or has no such column.
    """

    BATCH = 64  # rows decoded at once
    group_access_only = True

    def __init__(self, storage: Storage, size: int, image_column: str = "image") -> None:
        self.storage, self.size, self.image_column = storage, size, image_column
        files = {k: v for k, v in storage.files.items() if _is_data(k)}
        if not files:
            raise DataError(f"data.source={storage.address} holds no parquet file")
        self.ignored = count_ignored(storage, files)
        # Names are relative to the common folder, so that they do not depend on where it is.
        base = posixpath.commonpath([posixpath.dirname(name) for name in files])
        self.files = {posixpath.relpath(name, base or "."): v for name, v in files.items()}
        self.base = base
        paths = [name.removesuffix(".parquet").split("/") for name in files]
        splits = dict(zip(self.files, native_splits(paths), strict=True))
        self.names, self.native_splits, self.group_bytes = [], [], []
        self.row_groups: list[tuple[str, int]] = []
        lengths = []
        for file in self.files:
            metadata = self._open(file).metadata
            self._check_column(file, metadata.schema.to_arrow_schema())
            self.native_splits += [splits[file]] * metadata.num_rows
            self.names += [f"{file}:{row}" for row in range(metadata.num_rows)]
            for number in range(metadata.num_row_groups):
                row_group = metadata.row_group(number)
                self.row_groups.append((file, number))
                self.group_bytes.append(row_group.total_byte_size)
                lengths.append(row_group.num_rows)
        edges = list(accumulate(lengths, initial=0))
        self.groups = [range(first, last) for first, last in pairwise(edges)]

    def _check_column(self, file: str, schema: Any) -> None:
        """Raises DataError if the column does not hold encoded images."""
        from pyarrow import types

        def is_image(kind: Any) -> bool:
            if types.is_struct(kind):
                index = kind.get_field_index("bytes")
                return index >= 0 and is_image(kind.field(index).type)
            return bool(types.is_binary(kind) or types.is_large_binary(kind))

        images = [field.name for field in schema if is_image(field.type)]
        if self.image_column in images:
            return
        if self.image_column in schema.names:
            kind = schema.field(self.image_column).type
            problem = f"column {self.image_column!r} of type {kind}, not of encoded images"
        else:
            problem = f"no column {self.image_column!r}"
        way_out = (
            f"set data.image_column to {' or '.join(images)}" if images else "none of them holds "
            "images; if the images are files beside it, move the parquet file out of data.source"
        )  # fmt: skip
        raise DataError(
            f"{self._address(file)} has {problem}; its columns are {', '.join(schema.names)}; "
            f"{way_out}"
        )

    @classmethod
    def open(cls, options: SourceOptions) -> Source | None:
        hub = options.address.startswith("hf://")  # only its parquet files are supported
        if not hub and not any(_is_data(name) for name in options.storage.files):
            return None
        return cls(options.storage, options.size, options.image_column)

    def _address(self, file: str) -> str:
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
                f"{self._address(file)}: not a readable parquet file ({error}); download it again"
            ) from error

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.storage.address,
            "size": self.size,
            "resample": "lanczos",
            "column": self.image_column,
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

        file, number = self.row_groups[group]
        done = 0
        try:
            batches = self._open(file).iter_batches(
                self.BATCH, row_groups=[number], columns=[self.image_column]
            )
            for batch in batches:
                for row in batch.column(0).to_pylist():
                    yield (row["bytes"] if isinstance(row, dict) else row) or b""
                    done += 1
        except (ArrowException, OSError, DataError) as error:
            failure = DataError(
                f"{self._address(file)}: row group {number} cannot be read from row {done} on "
                f"({error}); download the file again"
            )
            if self.storage.remote:
                raise failure from error
            for _ in range(done, len(self.groups[group])):  # the rows that are not readable
                yield failure

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        """The class of a row is its value in a column."""
        values: list[Any] = []
        for file in self.files:
            parquet = self._open(file)
            columns = parquet.schema_arrow.names
            if name not in columns:
                raise DataError(
                    f"data.label={name}: {self._address(file)} has no such column; it has "
                    f"{', '.join(columns)}"
                )
            values += parquet.read(columns=[name]).column(0).to_pylist()
        if None in values or isinstance(values[0], float | dict | list):
            raise DataError(
                f"data.label={name} is not allowed; the column has no classes, or not in all rows"
            )
        return classes_of(values)

    def location(self, k: int) -> str:
        file, row = self.names[k].rsplit(":", 1)
        return f"{self._address(file)} row {row}"
