"""Synthetic images, image files and sources for tests."""

import io
import multiprocessing
import os
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from diffusion_lab.data.cache import PackedCache, ingest
from diffusion_lab.data.source import Item, Source, chunk_ranges
from diffusion_lab.errors import DataError

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def pixels(seed: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def smooth(size: int) -> np.ndarray:
    """An image that compresses well, with distinct rows and columns and no symmetry."""
    i, j = np.mgrid[:size, :size] * 255 // (size - 1)
    return np.stack([i, j, (i + 2 * j) // 3], axis=-1).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def opened(data: bytes) -> np.ndarray:
    """The pixels, decoded by Pillow alone."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file of a kind that Pillow cannot write; `rows` include their filter bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def fill(folder: Path, names: Sequence[str], size: int = 8) -> dict[str, np.ndarray]:
    """Writes one image per name, PNG or JPEG by suffix; returns the pixels decoded by Pillow."""
    result = {}
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
        path.write_bytes(encoded(pixels(zlib.crc32(name.encode()), size), kind))
        result[name] = opened(path.read_bytes())
    return result


def write_parquet(
    path: Path, rows: Sequence[bytes | None], group: int = 1 << 20, plain: bool = False,
    column: str = "image",
) -> None:  # fmt: skip
    """Writes a file as the hub stores image datasets, with `group` rows in each row group.

    The file is uncompressed with small pages, so that damage affects only the rows at that place.
    """
    data = pyarrow.array(rows, pyarrow.binary())
    if not plain:
        text = pyarrow.array([f"{k}.png" for k in range(len(rows))])
        data = pyarrow.StructArray.from_arrays([data, text], ["bytes", "path"])
    table = pyarrow.table({column: data, "label": pyarrow.array(list(range(len(rows))))})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        table, path, row_group_size=group, compression="none", use_dictionary=False,
        data_page_size=1024,
    )  # fmt: skip


# --- bad files ----------------------------------------------------------------------------------

SIZE = 16  # of the images below
JPEG = encoded(pixels(1, 64), "JPEG")
PNG = encoded(pixels(2, 64))


def changed(data: bytes, place: int, by: int | bytes = 0x10) -> bytes:
    """Flips bits of one byte, or replaces several bytes."""
    if isinstance(by, int):
        by = bytes([data[place] ^ by])
    return data[:place] + by + data[place + len(by) :]


def claims(data: bytes, width: int, height: int) -> bytes:
    """The file with another width and height in its header."""
    if data[:4] == b"\x89PNG":
        header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    frame = data.index(b"\xff\xc0") + 5
    return changed(data, frame, struct.pack(">HH", height, width))


def _transparent(mode: str) -> Image.Image:
    """An image with one slightly transparent pixel."""
    image = Image.fromarray(smooth(SIZE)).convert(mode)
    alpha = Image.new("L", (SIZE, SIZE), 255)
    alpha.putpixel((3, 11), 254)
    image.putalpha(alpha)
    return image


def _frames() -> bytes:
    first, second = (Image.fromarray(pixels(k, SIZE)) for k in (3, 4))
    return encoded(first, save_all=True, append_images=[second])


WORDS = np.arange(SIZE * SIZE * 3, dtype=">u2").reshape(SIZE, SIZE * 3)
# Files that are rejected with data.size=16, and a regular expression for the reason.
BAD: dict[str, tuple[bytes, str]] = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "not a readable JPEG or PNG"),
    "truncated.png": (PNG[: len(PNG) // 2], "not a readable JPEG or PNG"),
    "no end.png": (PNG[:-12], "the end is missing"),
    "half of its end.png": (PNG[:-5], "the end is missing"),
    "head only.jpg": (JPEG[:20], "not a readable JPEG or PNG"),
    "changed.png": (changed(PNG, len(PNG) // 2), "a checksum is wrong"),
    "smooth changed.png": (changed(encoded(smooth(SIZE)), 110), "a checksum is wrong"),
    "zeros.png": (changed(PNG, 3000, bytes(100)), "a checksum is wrong"),
    "empty.png": (b"", "not a readable JPEG or PNG"),
    "empty.jpg": (b"", "not a readable JPEG or PNG"),
    "html.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not a readable JPEG or PNG"),
    "gif.png": (encoded(pixels(5, SIZE), "GIF"), "not a readable JPEG or PNG"),
    "bmp.jpg": (encoded(pixels(5, SIZE), "BMP"), "not a readable JPEG or PNG"),
    "small.png": (encoded(pixels(6, 15)), "15x15 pixels do not make 16x16"),
    "small.jpg": (encoded(pixels(6, 8), "JPEG"), "8x8 pixels do not make 16x16"),
    "wide.png": (encoded(pixels(7, 32)[:18]), "32x18 pixels do not make 16x16"),
    "tall.jpg": (encoded(pixels(7, 32)[:, :18], "JPEG"), "18x32 pixels do not make 16x16"),
    "transparent.png": (encoded(_transparent("RGB")), "has transparent pixels"),
    "transparent grey.png": (encoded(_transparent("L")), "has transparent pixels"),
    "transparent palette.png": (
        encoded(Image.fromarray(smooth(SIZE)).quantize(8), transparency=3),
        "has transparent pixels",
    ),
    "transparent colour.png": (
        encoded(smooth(SIZE), transparency=(0, 0, 0)),
        "has transparent pixels",
    ),
    "16-bit grey.png": (
        encoded(WORDS[:, :SIZE].astype(np.uint16)),
        "mode I;16 is not supported; convert it to 8-bit RGB",
    ),
    "16-bit colour.png": (
        png(SIZE, SIZE, 16, 2, b"".join(b"\0" + row.tobytes() for row in WORDS)),
        "mode RGB with 16 bits is not supported; convert it to 8-bit RGB",
    ),
    "animated.png": (_frames(), "2 frames; save one of them"),
    "bomb.png": (claims(encoded(smooth(SIZE)), 30000, 30000), "not a readable .*900000000 pixels"),
    "bomb.jpg": (claims(JPEG, 30000, 30000), "not a readable .*900000000 pixels"),
    "large.png": (claims(encoded(smooth(SIZE)), 8193, 8193), "8193x8193 pixels are too many"),
    "large.jpg": (claims(JPEG, 8193, 8193), "8193x8193 pixels are too many"),
}
# Damage that only simplejpeg detects.
SCAN = {
    "changed.jpg": (changed(JPEG, len(JPEG) // 2, bytes(20)), "Corrupt JPEG data"),
}
LINK = "link.png"
LINK_REASON = r"a symbolic link to \S*elsewhere\.png, outside data\.source="


def write_corpus(folder: Path, good: int = 5) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Writes good images and all bad ones into an empty folder.

    Returns:
        The names and pixels of the good images, and the names and reasons of the bad ones.
    """
    images = fill(folder, [f"good {k}.{kind}" for k in range(good) for kind in ("png", "jpg")], 16)
    for name, (data, _) in (BAD | SCAN).items():
        (folder / name).write_bytes(data)
    target = folder.parent / "elsewhere.png"
    target.write_bytes(encoded(pixels(8, SIZE)))
    (folder / LINK).symlink_to(target)
    reasons = {name: reason for name, (_, reason) in (BAD | SCAN).items()}
    return images, reasons | {LINK: LINK_REASON}


# --- an image source that can be interrupted ----------------------------------------------------


@cache
def _drawing(k: int, size: int) -> bytes:
    return encoded(pixels(k, size))


class Drawn(Source):
    """Image k is pixels(k) as a PNG file; some are no images. Records what it reads.

    Arguments:
        count: The number of images.
        bad: Positions of files that are no images.
        at: The position at which `fail` is called.
        fail: Called before the image `at` is returned.
        log: A file to which the position of each returned image is appended.
        name: The address of the source in its description.
        size: Size of the images in pixels.
    """

    CHUNK = 64

    def __init__(
        self, count: int, bad: Sequence[int] = (), at: int = -1,
        fail: Callable[[], None] | None = None, log: Path | None = None, name: str = "drawn",
        size: int = 4,
    ) -> None:  # fmt: skip
        self.size, self.name, self.bad, self.at, self.fail = size, name, set(bad), at, fail
        self.names = [f"image {k}" for k in range(count)]
        self.native_splits = ["train"] * (count - count // 3) + ["val"] * (count // 3)
        self.groups = chunk_ranges(count, self.CHUNK)
        self.log, self.given = log, []

    def describe(self) -> dict[str, Any]:
        return {"source": self.name, "size": self.size, "count": len(self.names)}

    def read(self, group: int, places: Sequence[int] | None = None) -> Iterator[Item]:
        assert places is None
        for k in self.groups[group]:
            if k == self.at and self.fail:
                self.fail()
            self.given.append(k)
            if self.log:
                with open(self.log, "a") as file:
                    file.write(f"{k}\n")
            yield b"no image" if k in self.bad else _drawing(k, self.size)


def interrupt() -> None:
    raise KeyboardInterrupt


def disconnect() -> None:
    raise DataError("the network is down")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pause() -> None:
    time.sleep(1.0)


def files(cache: PackedCache) -> dict[str, bytes]:
    """The contents of all files of a cache."""
    return {path.name: path.read_bytes() for path in cache.directory.iterdir()}


def start(root: Path, kind: str, **options: Any) -> multiprocessing.Process:
    """Packs a `Drawn` source in a separate process."""
    # The server is shared with other tests, so it preloads the same modules.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["diffusion_lab.command.cli", "diffusion_lab.callback", "crash_injection"]
    )
    process = context.Process(target=_pack, args=(root, kind, options))
    process.start()
    return process


def _pack(root: Path, kind: str, options: dict[str, Any]) -> None:
    ingest(Drawn(**options), root, kind, progress=False)
