"""Files that are there as a whole or not at all."""

__all__ = ["write_atomic"]

import contextlib
import os
import uuid
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> Path:
    """Writes a file by way of a temporary one beside it, so that no reader sees half of it.

    Arguments:
        path: The file, whose folder is made if it is missing; an old one is replaced.
        data: What it shall hold.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named by hand and not by `tempfile`, whose files nobody but their owner may read.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    return path
