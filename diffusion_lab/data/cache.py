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
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from diffusion_lab.data.images import EncodedImages, Images, MappedImages
from diffusion_lab.data.packing import DATA, FORMAT, MANIFEST, Packer
from diffusion_lab.data.source import Source
from diffusion_lab.errors import DataError

KEYS = ("names", "own", "description", "kind", "content", "count", "decoder", "skipped", "sizes")


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
            if missing := [key for key in KEYS if key not in manifest]:
                raise ValueError(f"{MANIFEST} lacks {', '.join(missing)}")
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
            images = MappedImages(self.directory / DATA["uint8"], self.names, sha256=self.sha256)
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
                Packer(source, cache.directory, encoding, on_error, max_bad).run(progress)
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
