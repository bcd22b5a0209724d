r"""Where files lie: a folder of this machine, S3, Google Cloud, or the Hugging Face hub."""

__all__ = ["ArrowStorage", "LocalStorage", "Storage", "open_storage"]

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusion_lab.errors import DataError

REMOTE = ("s3://", "gs://", "gcs://", "hf://")
EXTRA = "pip install 'diffusion-lab[parquet]'"


class Storage(ABC):
    """Files under one root.

    Attributes:
        address: The root as the user wrote it.
        remote: Whether a network lies between: then a failure says nothing about the file.
    """

    address: str
    remote: bool

    @cached_property
    def files(self) -> dict[str, list[Any]]:
        """The name of every file under the root, and what changes when the file does.

        Listed once. Hidden ones are left out: archives made on a Mac hold a `._x.jpg` beside each
        `x.jpg`.
        """
        hidden = re.compile(r"(^|/)\.")
        return {name: state for name, state in sorted(self._list()) if not hidden.search(name)}

    @abstractmethod
    def _list(self) -> Iterator[tuple[str, list[Any]]]:
        """Yields the files, in any order."""

    @abstractmethod
    def open(self, name: str) -> Any:
        """Opens a file for random access, as pyarrow reads it."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Returns a file's bytes.

        Raises:
            DataError: If it cannot be read, or lies outside the root.
        """

    def where(self, name: str) -> str:
        """Returns the full address of a file, for messages."""
        return f"{self.address.rstrip('/')}/{name}" if name else self.address


class LocalStorage(Storage):
    """A folder, or a single file, of this machine.

    Arguments:
        path: The folder or file.
        address: What the user calls it, if not by its path.
        version: What identifies the files' state, if something better than size and time does.
    """

    remote = False

    def __init__(self, path: Path, address: str | None = None, version: str | None = None) -> None:
        self.root = path.parent if path.is_file() else path
        self.inside = self.root.resolve()  # where the files must really lie
        self.only = path.name if path.is_file() else None
        self.address, self.version = address or str(self.root), version

    def _list(self) -> Iterator[tuple[str, list[Any]]]:
        for path in [self.root / self.only] if self.only else self.root.rglob("*"):
            if path.is_file():
                stat = path.stat()
                state = [stat.st_size, self.version or stat.st_mtime_ns]
                yield path.relative_to(self.root).as_posix(), state

    def open(self, name: str) -> Any:
        return str(self.root / name)

    def read(self, name: str) -> bytes:
        path = self.root / name
        try:
            if not path.resolve().is_relative_to(self.inside):
                raise DataError(
                    f"{path}: a symbolic link to {path.resolve()}, outside data.source="
                    f"{self.root}; put the file itself there, or point data.source at its folder"
                )
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


class ArrowStorage(Storage):
    """A folder of one of pyarrow's file systems.

    Arguments:
        filesystem: The `pyarrow.fs.FileSystem`.
        root: The folder's path in it.
        address: The folder as the user wrote it.
        version: As in `LocalStorage`.
        only: The name of the file in the folder that is meant, if not all are.
    """

    remote = True

    def __init__(
        self, filesystem: Any, root: str, address: str, version: str | None = None,
        only: str | None = None,
    ) -> None:  # fmt: skip
        self.filesystem, self.root, self.version = filesystem, root.rstrip("/"), version
        self.address, self.only = address.split("?")[0].rstrip("/"), only

    def _list(self) -> Iterator[tuple[str, list[Any]]]:
        from pyarrow.fs import FileSelector, FileType

        try:
            what = FileSelector(self.root, recursive=True)
            infos = self.filesystem.get_file_info(
                [f"{self.root}/{self.only}"] if self.only else what
            )
            if not infos and self.filesystem.get_file_info(self.root).type == FileType.NotFound:
                raise FileNotFoundError("there is nothing")
        except FileNotFoundError as error:
            raise DataError(f"data.source={self.address} does not exist ({error})") from error
        except OSError as error:
            raise DataError(f"data.source={self.address} cannot be listed ({error})") from error
        for info in infos:
            if info.type == FileType.File:
                name = info.path.removeprefix(self.root).lstrip("/")
                yield name, [info.size, self.version or info.mtime_ns]

    def open(self, name: str) -> Any:
        return self.filesystem.open_input_file(f"{self.root}/{name}")

    def read(self, name: str) -> bytes:
        try:
            with self.open(name) as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{self.where(name)}: cannot be read ({error})") from error


def open_storage(source: str, download: bool = True) -> Storage:
    """Opens what a string names: a path, s3://..., gs://..., or hf://datasets/<owner>/<name>.

    Credentials, region and endpoint of S3 and Google Cloud are those of the environment, as
    pyarrow reads them (AWS_ACCESS_KEY_ID, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL, ...).

    Arguments:
        source: What to open.
        download: Whether files of the hub are fetched whole into its own cache, which goes on
            after an interruption and serves without a network later, or read in parts.

    Raises:
        DataError: If it does not exist, cannot be reached, or needs a package that is missing.
    """
    if source.startswith("hf://"):
        return _open_hub(source, download)
    if source.startswith(REMOTE):
        try:
            from pyarrow.fs import FileSystem, FileType
        except ImportError as error:
            raise DataError(f"data.source={source} needs pyarrow; {EXTRA}") from error
        try:
            filesystem, root = FileSystem.from_uri(_impatient(source))
            if not root.strip("/"):
                raise ValueError("it names no bucket")
            file = filesystem.get_file_info(root).type == FileType.File
        except (OSError, ValueError) as error:
            raise DataError(f"data.source={source} cannot be opened ({error})") from error
        if not file:
            return ArrowStorage(filesystem, root, source)
        folder, _, name = root.rpartition("/")
        return ArrowStorage(filesystem, folder, source.split("?")[0].rpartition("/")[0], only=name)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"data.source={source} does not exist; give a folder of images, a parquet file, "
            "s3://<bucket>/<folder>, hf://datasets/<owner>/<name>, or faces"
        )
    return LocalStorage(path.resolve())


def _impatient(source: str) -> str:
    """Without a network Google's client would try for a quarter of an hour, and say nothing."""
    if not source.startswith(("gs://", "gcs://")) or "retry_limit_seconds" in source:
        return source
    return f"{source}{'&' if '?' in source else '?'}retry_limit_seconds=30"


def _open_hub(source: str, download: bool) -> Storage:
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@(.+))?", source)
    if not match:
        raise DataError(
            f"data.source={source} is not understood; write hf://datasets/<owner>/<name>, "
            "with @<revision> after it if you like"
        )
    name, revision = match.groups()
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise DataError(f"reading from the hub needs huggingface_hub; {EXTRA}") from error
    try:
        if download:
            folder = hub.snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns="*.parquet"
            )
            # The folder is named after the commit, which says more than its files' times.
            return LocalStorage(Path(folder), source, version=Path(folder).name)
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        commit = hub.HfApi().dataset_info(name, revision=revision).sha
        filesystem = PyFileSystem(FSSpecHandler(hub.HfFileSystem()))
        return ArrowStorage(filesystem, f"datasets/{name}@{commit}", source, version=commit)
    except Exception as error:  # the hub's client raises its own, httpx's and requests' errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data.source={source} cannot be downloaded ({reason}); check the network, or give "
            "a folder of images on this machine: data.source=<folder>"
        ) from error
