r"""Packed image cache: every image of a source, decoded and checked once, in one file.

A directory named by a fingerprint of the source holds

    images.npy      uint8 (N, size, size, 3), or images.bin and offsets.npy: encoded images
    sha256.npy      uint8 (N, 32), the hash of the pixels of each image
    manifest.json   names and native splits of the images, source, files, size, filter, decoder,
                    and every skipped image with the reason

It is created atomically. Until then `<fingerprint>.partial` holds the images packed so far and a
journal, from which ingest resumes after any interruption. Nothing in it is pickled.
"""

__all__ = ["FORMAT", "MANIFEST", "PackedCache", "fingerprint", "ingest", "verify"]

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from diffusion_lab.data.decode import DECODER, decode
from diffusion_lab.data.images import EncodedImages, Images, MappedImages
from diffusion_lab.data.source import Item, Source
from diffusion_lab.errors import DataError

log = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
DATA = {"uint8": "images.npy", "bytes": "images.bin"}
HEADER = 128  # bytes of an .npy header, whose shape is known only at the end
CHUNK = 256  # images between two entries of the journal


def fingerprint(source: Source, encoding: str) -> str:
    """Returns the name of a source's cache: a hash of everything that determines the pixels."""
    text = json.dumps({**source.describe(), "format": FORMAT, "kind": encoding}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PackedCache:
    """A packed cache on disk.

    Attributes:
        directory: Its directory.
    """

    directory: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Description of the images and of their source.

        Raises:
            DataError: If it is unreadable, or another file has not the size stated in it.
        """
        try:
            manifest: dict[str, Any] = json.loads((self.directory / MANIFEST).read_text())
            if manifest["format"] != FORMAT:
                raise ValueError(f"format {manifest['format']}, not {FORMAT}")
            for name, size in manifest["sizes"].items():
                actual = (self.directory / name).stat().st_size
                if actual != size:
                    raise ValueError(f"{name} has {actual} bytes, not {size}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error
        return manifest

    @cached_property
    def names(self) -> list[str]:
        """The names of the images."""
        return list(self.manifest["names"])

    @cached_property
    def native_splits(self) -> list[str]:
        """The split of each image in the dataset itself."""
        return [split for split, count in self.manifest["own"] for _ in range(count)]

    @cached_property
    def sha256(self) -> np.ndarray:
        """The hash of the pixels of each image, uint8, of shape (N, 32).

        Raises:
            DataError: If they do not agree with the manifest.
        """
        digests = self._load("sha256.npy", (len(self.names), 32))
        content = hashlib.sha256(digests.tobytes()).hexdigest()
        if content != self.manifest["content"]:
            raise self._damaged(ValueError("sha256.npy was changed"))
        return digests

    @cached_property
    def images(self) -> Images:
        """The images."""
        size = self.manifest["description"]["size"]
        count = len(self.names)
        if self.manifest["kind"] == "bytes":
            offsets = self._load("offsets.npy", (count + 1,))
            return EncodedImages(self.directory / DATA["bytes"], offsets, self.names, size)
        try:
            images = MappedImages(self.directory / DATA["uint8"], self.names)
            if images.array.shape != (count, size, size, 3):
                raise ValueError(f"{DATA['uint8']} has shape {images.array.shape}")
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(error) from error
        return images

    def _load(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        try:
            array: np.ndarray = np.load(self.directory / name, allow_pickle=False)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, not {shape}")
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(error) from error
        return array

    def _damaged(self, error: Exception) -> DataError:
        return DataError(
            f"the cache {self.directory} is damaged ({error}); remove that directory to create "
            "it again"
        )


def verify(cache: PackedCache, progress: bool = True) -> list[str]:
    """Returns the names of the images whose pixels have changed since they were packed."""
    bad, sha256 = list[str](), cache.sha256
    places = range(len(cache.names))
    for k in tqdm(places, desc="verifying", disable=not progress, leave=False):
        try:
            (image,) = cache.images.gather(np.array([k]))
            if hashlib.sha256(image.tobytes()).digest() != sha256[k].tobytes():
                bad.append(cache.names[k])
        except DataError:
            bad.append(cache.names[k])
    return bad


def ingest(
    source: Source,
    root: Path,
    encoding: str = "uint8",
    *,
    on_error: str = "raise",
    max_bad: int = 100,
    progress: bool = True,
) -> PackedCache:
    """Opens the cache of a source under `root`; creates or completes it first if necessary.

    If several processes call it, one packs the images and the others wait.

    Arguments:
        source: The images.
        root: The directory of all caches.
        encoding: "uint8" keeps pixels, "bytes" the encoded files (as lossless PNG if resized).
        on_error: "raise" stops at the first bad image; "skip" skips bad images.
        max_bad: The largest number of skipped images.
        progress: Whether to show a progress bar.

    Raises:
        DataError: If an image is bad (names it), too many are, or the disk is full.
    """
    cache = PackedCache(root / fingerprint(source, encoding))
    if (cache.directory / MANIFEST).exists():
        return _check_skipped(cache, on_error)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{cache.directory.name}.lock"):
            if not (cache.directory / MANIFEST).exists():
                _Packer(source, cache.directory, encoding, on_error, max_bad).run(progress)
    except OSError as error:
        raise DataError(
            f"data.cache_dir={root} cannot be written: {error.strerror or error}. The images "
            "packed so far are kept; free space there and run the command again, or set "
            "data.cache_dir to another disk"
        ) from error
    return _check_skipped(cache, on_error)


def _check_skipped(cache: PackedCache, on_error: str) -> PackedCache:
    """Checks whether the images skipped by an earlier ingest may be skipped now."""
    skipped = cache.manifest["skipped"]
    if skipped and on_error == "raise":
        raise DataError(
            f"the cache {cache.directory} was packed without {len(skipped)} bad image(s): "
            f"{skipped[0]['reason']}. Set data.on_error=skip to continue without them, or repair "
            "the images"
        )
    return cache


class _Packer:
    """An ingest: reads, decodes in threads, writes, and keeps a journal."""

    def __init__(
        self, source: Source, directory: Path, encoding: str, on_error: str, max_bad: int
    ) -> None:
        self.source, self.directory, self.encoding = source, directory, encoding
        self.on_error, self.max_bad = on_error, max_bad
        self.description = source.describe()
        # Identifies the ingests of a source, also after its files have changed.
        self.identity = [self.description["source"], self.description["size"], encoding]
        self.partial = directory.with_name(directory.name + ".partial")
        self.done = 0  # images of the source that are packed or skipped
        self.sha256: list[str] = []
        self.lengths: list[int] = []  # bytes of each packed image
        self.skipped: list[list[Any]] = []  # name, reason

    def run(self, progress: bool) -> None:
        self._remove_outdated()
        self.partial.mkdir(exist_ok=True)
        path = self.partial / DATA[self.encoding]
        with (
            open(path, "r+b" if path.exists() else "w+b") as file,
            open(self.partial / "journal.jsonl", "a+", encoding="latin-1") as journal,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            tqdm(
                total=len(self.source.names), desc="packing images", unit="img",
                disable=not progress, leave=False,
            ) as bar,
        ):  # fmt: skip
            self._recover(file, journal)
            bar.update(self.done)
            items = self._items()
            while chunk := list(islice(items, CHUNK)):
                places = range(self.done, self.done + len(chunk))
                self._write(file, journal, list(pool.map(self._pack, places, chunk)))
                bar.update(len(chunk))
            self._finish(file)
        shutil.rmtree(self.directory, ignore_errors=True)  # without a manifest
        os.replace(self.partial, self.directory)
        (self.directory / "journal.jsonl").unlink()

    def _remove_outdated(self) -> None:
        """Removes the remains of ingests of this source before it changed."""
        for other in self.partial.parent.glob("*.partial"):
            try:
                left = json.loads((other / "source.json").read_text())
            except (OSError, ValueError):
                left = {}
            if other != self.partial and left.get("what") == self.identity:
                try:
                    with FileLock(other.with_suffix(".lock"), timeout=0):
                        shutil.rmtree(other, ignore_errors=True)
                except Timeout:  # another process is packing it
                    continue

    def _recover(self, file: BinaryIO, journal: Any) -> None:
        """Restores the state of the journal, and drops what was written after its last entry."""
        (self.partial / "source.json").write_text(json.dumps({"what": self.identity}))
        size = file.seek(0, os.SEEK_END)
        end = HEADER if self.encoding == "uint8" else 0
        good = 0
        journal.seek(0)
        for line in journal:
            try:
                entry = json.loads(line)
                length = sum(entry["lengths"])
            except (ValueError, TypeError, KeyError):
                break  # incomplete
            if not line.endswith("\n") or end + length > size:
                break
            end += length
            good += len(line)
            self.done += entry["items"]
            self.sha256 += entry["sha256"]
            self.lengths += entry["lengths"]
            self.skipped += entry["skipped"]
        journal.truncate(good)
        journal.seek(0, os.SEEK_END)
        file.truncate(end)  # also makes room for the header
        file.seek(0, os.SEEK_END)
        if self.done:
            log.info("packing resumes at image %d of %d", self.done, len(self.source.names))

    def _items(self) -> Iterator[Item]:
        """The images of the source from the first that is neither packed nor skipped."""
        for number, group in enumerate(self.source.groups):
            if group.stop > self.done:
                yield from islice(self.source.read(number), max(0, self.done - group.start), None)

    def _pack(self, place: int, item: Item) -> tuple[bytes, str] | DataError:
        """The bytes to write for an image, and the hash of its pixels."""
        if isinstance(item, DataError):
            return item
        try:
            size, name = self.source.size, self.source.location(place)
            image = decode(item, size, name) if isinstance(item, bytes) else item
        except DataError as error:
            return error
        pixels = np.ascontiguousarray(image).tobytes()
        sha256 = hashlib.sha256(pixels).hexdigest()
        if self.encoding == "uint8":
            return pixels, sha256
        if isinstance(item, bytes) and _width(item) == size:
            return item, sha256  # a larger one would be resized in every epoch
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", compress_level=3)
        return buffer.getvalue(), sha256

    def _write(
        self, file: BinaryIO, journal: Any, packed: list[tuple[bytes, str] | DataError]
    ) -> None:
        entry: dict[str, Any] = {"items": len(packed), "sha256": [], "lengths": [], "skipped": []}
        for k, result in enumerate(packed):
            if isinstance(result, DataError):
                if self.on_error == "raise":
                    raise DataError(f"{result}. Set data.on_error=skip to skip bad images")
                entry["skipped"].append([self.source.names[self.done + k], str(result)])
                log.warning("skipped: %s", result)
                if len(self.skipped) + len(entry["skipped"]) > self.max_bad:
                    raise DataError(
                        f"more than data.max_bad={self.max_bad} images are bad; the last is "
                        f"{result}"
                    )
            else:
                file.write(result[0])
                entry["lengths"].append(len(result[0]))
                entry["sha256"].append(result[1])
        _sync(file)
        journal.write(json.dumps(entry) + "\n")
        journal.flush()
        self.done += entry["items"]
        for name in ("sha256", "lengths", "skipped"):
            getattr(self, name).extend(entry[name])

    def _finish(self, file: BinaryIO) -> None:
        size, count = self.source.size, len(self.sha256)
        if self.encoding == "uint8":
            file.seek(0)
            file.write(_header((count, size, size, 3)))
            _sync(file)
        else:
            _save(self.partial / "offsets.npy", np.cumsum([0, *self.lengths], dtype=np.int64))
        digests = np.frombuffer(bytes.fromhex("".join(self.sha256)), dtype=np.uint8)
        _save(self.partial / "sha256.npy", digests.reshape(count, 32))
        skipped = {name for name, _ in self.skipped}
        kept = [k for k, name in enumerate(self.source.names) if name not in skipped]
        splits: list[list[Any]] = []  # runs of one split: name, length
        for k in kept:
            if not splits or splits[-1][0] != self.source.native_splits[k]:
                splits.append([self.source.native_splits[k], 0])
            splits[-1][1] += 1
        files = [p for p in sorted(self.partial.iterdir()) if p.suffix in (".npy", ".bin")]
        manifest = {
            "format": FORMAT,
            "kind": self.encoding,
            "count": count,
            "content": hashlib.sha256(digests.tobytes()).hexdigest(),
            "decoder": DECODER,
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "sizes": {path.name: path.stat().st_size for path in files},
            "description": self.description,
            "own": splits,
            "names": [self.source.names[k] for k in kept],
        }
        (self.partial / "source.json").unlink()
        with open(self.partial / MANIFEST, "w") as out:
            json.dump(manifest, out)
            _sync(out)


def _width(data: bytes) -> int:
    with Image.open(io.BytesIO(data)) as image:
        return image.width


def _header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    header = buffer.getvalue()
    assert len(header) == HEADER, len(header)
    return header


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        _sync(file)


def _sync(file: IO[Any]) -> None:
    """Writes all buffers to the disk."""
    file.flush()
    os.fsync(file.fileno())
