"""Atomic file writes."""

__all__ = ["atomic_file", "write_atomic", "write_csv"]

import contextlib
import csv
import io
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Opens a file for writing that replaces `path` at the end of the block, if there is no error.

    The data go to a temporary file in the same folder, are flushed to the disk, and the file is
    renamed. Readers see the old file or the new one, never a part of it.

    Arguments:
        path: The file. Its folder is created if it is missing.
        temporary: The temporary file. By default it has a random name, so that several processes
            can write the same file; a fixed name does not leave files behind if processes are
            killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # `tempfile` is not used: its files are readable by their owner alone.
    temporary = temporary or path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_atomic(path: Path, data: bytes) -> Path:
    """Writes a file atomically and returns its path.

    Arguments:
        path: The file. Its folder is created if it is missing; an old file is replaced.
        data: The content.
    """
    with atomic_file(path) as file:
        file.write(data)
    return Path(path)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Writes a CSV file atomically and returns its path.

    Arguments:
        path: The file; an old one is replaced.
        columns: The header.
        rows: The rows. None is written as an empty cell.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    return write_atomic(path, text.getvalue().encode())
