r"""The packed cache: every image of a source, decoded once, as one uint8 array on disk.

A directory <fingerprint> holds `images.npy` (N, H, W, 3), train first, then val and test, and
`meta.json` with the splits and what the fingerprint is a hash of. It appears whole or not at all.
"""

__all__ = ["PackedCache", "pack"]

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffusion_lab.data.source import SPLITS, Source
from diffusion_lab.errors import DataError


@dataclass(frozen=True)
class PackedCache:
    """An opened cache.

    Attributes:
        fingerprint: The hash of what decides the pixels and the splits.
        images: The images of each split, uint8, (N, H, W, 3), mapped from disk.
        names: Their names.
    """

    fingerprint: str
    images: dict[str, np.ndarray]
    names: dict[str, list[str]]


def pack(source: Source, root: Path, progress: bool = True) -> PackedCache:
    """Opens the cache of a source under `root`, and makes it first if it is not there.

    Arguments:
        source: The images.
        root: The directory of all caches.
        progress: Whether to show a progress bar.

    Raises:
        DataError: If an image is corrupt (names it) or the disk is full. Nothing is left behind.
    """
    description = source.describe()
    text = json.dumps(description, sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    directory = root / fingerprint
    if not (directory / "meta.json").exists():
        _write(source, directory, description, progress)
    try:
        meta = json.loads((directory / "meta.json").read_text())
        names = {split: meta["names"][split] for split in SPLITS}
        images = np.load(directory / "images.npy", mmap_mode="r", allow_pickle=False)
        if len(images) != sum(map(len, names.values())):
            raise ValueError(f"{len(images)} images, {sum(map(len, names.values()))} names")
    except (EOFError, KeyError, OSError, ValueError) as error:
        raise DataError(
            f"the cache {directory} is damaged ({error}); remove that directory to make it again"
        ) from error
    slices, first = {}, 0
    for split in SPLITS:
        slices[split] = images[first : first + len(names[split])]
        first += len(names[split])
    return PackedCache(fingerprint, slices, names)


def _write(source: Source, directory: Path, description: dict, progress: bool) -> None:
    count = sum(len(source.items[split]) for split in SPLITS)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=directory.parent))
    except OSError as error:
        raise DataError(f"data.cache_dir={directory.parent} cannot be written: {error}") from error
    try:
        # Written through a plain file, not a memory map: a full disk is then an error (ENOSPC),
        # while a store to a map that cannot be backed kills the process.
        with open(partial / "images.npy", "wb") as file:
            shape = (count, source.size, source.size, 3)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            bar = tqdm(total=count, desc="packing images", disable=not progress, leave=False)
            for split in SPLITS:
                for image in source.read(split):
                    file.write(np.ascontiguousarray(image).tobytes())
                    bar.update()
            bar.close()
            file.flush()
            os.fsync(file.fileno())
        meta = {"format": 1, "names": source.items, "description": description}
        (partial / "meta.json").write_text(json.dumps(meta))
        if not directory.exists():  # another process may have been faster: its cache is the same
            os.replace(partial, directory)
    except OSError as error:
        raise DataError(
            f"cannot write the cache of images to {directory}: {error.strerror or error}; "
            "free space there, or set data.cache_dir to another disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
