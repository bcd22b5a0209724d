r"""Packing of a source into a cache: decoding in threads, one data file, and a journal."""

__all__ = ["DATA", "FORMAT", "MANIFEST", "Packer"]

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from diffusion_lab.data.decode import DECODER, decode
from diffusion_lab.data.images import checked_pixels
from diffusion_lab.data.source import Item, Source
from diffusion_lab.errors import DataError

log = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
DATA = {"uint8": "images.npy", "bytes": "images.bin"}
HEADER = 128  # bytes of an .npy header, whose shape is known only at the end
CHUNK = 256  # images between two entries of the journal


class Packer:
    """Packs the images of a source; resumes from the journal of an interrupted run.

    Arguments:
        source: The images.
        directory: The directory of the finished cache.
        encoding: "uint8" keeps pixels, "bytes" the encoded files (as lossless PNG if resized).
        on_error: "raise" stops at the first bad image; "skip" skips bad images.
        max_bad: The largest number of skipped images.
    """

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
        """Packs all images that are not packed yet, and puts the cache in its place."""
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
            if isinstance(item, bytes):
                image = decode(item, size, name)
            else:
                image = checked_pixels(item, size, name)
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
