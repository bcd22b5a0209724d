r"""Storage backends of data sources: local disk, S3, Google Cloud Storage, the Hugging Face Hub.

S3 and Google Cloud are reached by pyarrow, which parquet needs anyway, and streamed hub datasets
by fsspec through pyarrow. Local files bypass both: fsspec reads small files a third more slowly,
and it rounds modification times, which name the packed caches.

Symbolic links are followed if they lead to a place inside the source, inside `link_root`, or, for
a snapshot of the Hugging Face Hub, inside its cache of the repository. Links to other folders are
skipped and counted; an image or parquet file behind another link is an error.
"""

__all__ = ["EXTRA", "LocalStorage", "RemoteStorage", "Storage", "open_storage"]

import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusion_lab.errors import DataError
from diffusion_lab.redact import refuse_secrets

EXTRA = "pip install 'diffusion-lab[parquet]'"

State = list[Any]  # [bytes, modification time in ns or version]


class Storage(ABC):
    """Files under one root.

    Attributes:
        address: The root, as the user wrote it.
        remote: Whether reads use a network; a failed read is then not the file's fault.
    """

    address: str
    remote: bool

    @cached_property
    def files(self) -> dict[str, State]:
        """The sorted names of all files, each with its size and its modification time or version.

        Hidden files are skipped: archives made on macOS hold a `._x.jpg` beside each `x.jpg`.
        """
        hidden = re.compile(r"(^|/)\.")
        found = sorted(self._list())
        files = {name: state for name, state in found if not hidden.search(name)}
        if len(files) < len(found):
            self.ignored["hidden"] += len(found) - len(files)
        return files

    @cached_property
    def ignored(self) -> Counter[str]:
        """The number of files or links that are not in `files`, by reason, after it is read."""
        return Counter()

    @abstractmethod
    def _list(self) -> Iterator[tuple[str, State]]:
        """Yields the files in any order."""

    @abstractmethod
    def open(self, name: str) -> Any:
        """Opens a file for random access by pyarrow."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Returns the content of a file.

        Raises:
            DataError: If the file cannot be read or is outside the root.
        """

    def location(self, name: str) -> str:
        """Returns the full address of a file, for error messages."""
        return f"{self.address.rstrip('/')}/{name}"


class LocalStorage(Storage):
    """A local folder or a single local file.

    Arguments:
        path: The folder or file.
        address: Its name in messages; None uses the path.
        version: Version of the files; None uses their modification times.
        link_root: A folder that symbolic links may lead to, besides the folder itself.
    """

    remote = False

    def __init__(
        self, path: Path, address: str | None = None, version: str | None = None,
        link_root: Path | None = None,
    ) -> None:  # fmt: skip
        self.path, self.version = path, version
        self.root = path.parent if path.is_file() else path
        self.address = address or str(self.root)
        roots = (self.root, link_root, _hub_repository(self.root))
        self.link_roots = [root.resolve() for root in roots if root is not None]

    def _list(self) -> Iterator[tuple[str, State]]:
        if self.path.is_file():
            yield self.path.name, self._state(self.path.stat())
        else:
            yield from self._walk(self.root, (self.root.resolve(),))

    def _state(self, stat: os.stat_result) -> State:
        return [stat.st_size, self.version or stat.st_mtime_ns]

    def _walk(self, folder: Path, places: tuple[Path, ...]) -> Iterator[tuple[str, State]]:
        """Yields the files of a folder; `places` are the real paths of it and those above."""
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DataError(
                f"{folder}: cannot be listed ({error.strerror}); change its permissions, or move "
                "it out of data.source"
            ) from error
        for entry in entries:
            path = folder / entry.name
            name = path.relative_to(self.root).as_posix()
            try:
                if entry.is_file():
                    yield name, self._state(entry.stat())
                elif not entry.is_dir():
                    self.ignored["broken link" if entry.is_symlink() else "special"] += 1
                elif not entry.is_symlink():
                    yield from self._walk(path, (*places, places[-1] / entry.name))
                elif not self._is_inside(target := path.resolve()):
                    self.ignored[f"link {name} to {target}, which needs data.link_root"] += 1
                elif any(place.is_relative_to(target) for place in places):
                    self.ignored[f"link {name} to a folder that contains it"] += 1
                else:
                    yield from self._walk(path, (*places, target))
            except OSError:  # a chain of links without an end
                self.ignored["broken link"] += 1

    def _is_inside(self, target: Path) -> bool:
        return any(target.is_relative_to(root) for root in self.link_roots)

    def _check_link(self, path: Path) -> None:
        if not self._is_inside(target := path.resolve()):
            raise DataError(
                f"{path}: a symbolic link to {target}, outside data.source={self.root}; set "
                "data.link_root to a folder that links may lead to, or put the file itself there"
            )

    def open(self, name: str) -> str:
        self._check_link(self.root / name)
        return str(self.root / name)

    def read(self, name: str) -> bytes:
        path = self.root / name
        try:
            self._check_link(path)
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _hub_repository(root: Path) -> Path | None:
    """The folder of a repository in the hub's cache, if the root is in one of its snapshots."""
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and (repository / "blobs").is_dir():
            return repository
    return None


class RemoteStorage(Storage):
    """A folder, or one file of it, on a `pyarrow.fs.FileSystem`.

    Arguments:
        filesystem: The file system.
        root: Path of the folder on it.
        address: The folder as the user wrote it; a query string is dropped.
        version: Version of the files; None uses their modification times.
        only: Name of the only file to use; None uses all.
    """

    remote = True

    def __init__(
        self, filesystem: Any, root: str, address: str, version: str | None = None,
        only: str | None = None,
    ) -> None:  # fmt: skip
        self.filesystem, self.root, self.version = filesystem, root.rstrip("/"), version
        self.address, self.only = address.split("?")[0].rstrip("/"), only

    def _list(self) -> Iterator[tuple[str, State]]:
        from pyarrow.fs import FileSelector, FileType

        info = self.filesystem.get_file_info
        try:
            selected = [f"{self.root}/{self.only}"] if self.only else None
            found = info(selected or FileSelector(self.root, recursive=True))
            if not found and info(self.root).type == FileType.NotFound:
                raise FileNotFoundError("no such folder")
        except OSError as error:
            problem = "does not exist" if isinstance(error, FileNotFoundError) else (
                "cannot be listed"
            )  # fmt: skip
            raise DataError(f"data.source={self.address} {problem} ({error})") from error
        for file in found:
            if file.type == FileType.File:
                name = file.path.removeprefix(self.root).lstrip("/")
                yield name, [file.size, self.version or file.mtime_ns]

    def open(self, name: str) -> Any:
        return self.filesystem.open_input_file(f"{self.root}/{name}")

    def read(self, name: str) -> bytes:
        try:
            with self.open(name) as file:
                return bytes(file.read())
        except OSError as error:
            raise DataError(f"{self.location(name)}: cannot be read ({error})") from error


def open_storage(
    source: str, download: bool = True, link_root: str | None = None
) -> Storage:  # fmt: skip
    """Opens the storage at a path, s3://..., gs://..., or hf://datasets/<owner>/<name>.

    Credentials, region and endpoint come from the environment, as pyarrow reads it
    (AWS_ACCESS_KEY_ID, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL, ...); region and endpoint also from
    the query string.

    Arguments:
        source: The address.
        download: Whether hub datasets are downloaded into the hub's cache, which resumes after an
            interruption and works offline later; otherwise they are read in parts.
        link_root: A folder that symbolic links of a local folder may lead to, besides it.

    Raises:
        ConfigError: If the address holds a secret.
        DataError: If it does not exist, cannot be reached, or needs a package that is missing.
    """
    refuse_secrets(source)
    if source.startswith("hf://"):
        return _open_hub(source, download)
    if source.startswith(("s3://", "gs://", "gcs://")):
        return _open_bucket(source)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"data.source={source} does not exist; give a folder of images, a parquet file, "
            "s3://<bucket>/<folder>, hf://datasets/<owner>/<name>, or faces"
        )
    root = Path(link_root).expanduser() if link_root else None
    return LocalStorage(path.resolve(), link_root=root)


def _open_bucket(source: str) -> Storage:
    try:
        from pyarrow.fs import FileSystem, FileType
    except ImportError as error:
        raise DataError(f"data.source={source} needs pyarrow; {EXTRA}") from error
    uri = source
    if not source.startswith("s3://") and "retry_limit_seconds" not in source:
        # Google's client retries for 15 minutes by default if there is no network.
        uri += f"{'&' if '?' in source else '?'}retry_limit_seconds=30"
    try:
        filesystem, root = FileSystem.from_uri(uri)
        if not root.strip("/"):
            raise ValueError("the bucket is missing")
        is_file = filesystem.get_file_info(root).type == FileType.File
    except (OSError, ValueError) as error:
        raise DataError(f"data.source={source} cannot be opened ({error})") from error
    if not is_file:
        return RemoteStorage(filesystem, root, source)
    folder, _, name = root.rpartition("/")
    return RemoteStorage(filesystem, folder, source.split("?")[0].rpartition("/")[0], only=name)


def _open_hub(source: str, download: bool) -> Storage:
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@(.+))?", source)
    if not match:
        raise DataError(
            f"data.source={source} is not allowed; it must be hf://datasets/<owner>/<name>, "
            "optionally followed by @<revision>"
        )
    name, revision = match.groups()
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise DataError(f"data.source={source} needs huggingface_hub; {EXTRA}") from error
    try:
        if download:
            folder = Path(hub.snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns="*.parquet"
            ))  # fmt: skip
            # The folder is named after the commit, which stays when files are downloaded again.
            return LocalStorage(folder, source, version=folder.name)
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        commit = hub.HfApi().dataset_info(name, revision=revision).sha
        filesystem = PyFileSystem(FSSpecHandler(hub.HfFileSystem()))
        return RemoteStorage(filesystem, f"datasets/{name}@{commit}", source, version=commit)
    except Exception as error:  # the hub's client raises its own, httpx's and requests' errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data.source={source} cannot be downloaded ({reason}); check the network, or give "
            "a local folder of images: data.source=<folder>"
        ) from error
