"""Packed cache: created once, atomic, resumable, verified, independent of the source."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from image_fixtures import (
    SHARES,
    Drawn,
    disconnect,
    encoded,
    files,
    fill,
    interrupt,
    kill,
    opened,
    pause,
    pixels,
    start,
    write_parquet,
)
from moto.server import ThreadedMotoServer
from PIL import Image

from diffusion_lab.command.data import main
from diffusion_lab.data import packing
from diffusion_lab.data.cache import KEYS, PackedCache, fingerprint, ingest, verify
from diffusion_lab.data.faces_source import FacesSource
from diffusion_lab.data.folder_source import FolderSource
from diffusion_lab.data.images import SourceImages
from diffusion_lab.data.module import ImageDataModule
from diffusion_lab.data.parquet_source import ParquetSource
from diffusion_lab.data.registry import open_source
from diffusion_lab.data.storage import LocalStorage
from diffusion_lab.errors import DataError

KINDS = ("uint8", "bytes")
COUNT = 600  # two complete chunks of 256 and a partial one


def pack(source, root: Path, kind: str = "uint8", **options) -> PackedCache:
    return ingest(source, root, kind, progress=False, **options)


def everything(cache: PackedCache) -> np.ndarray:
    return cache.images.gather(np.arange(len(cache.names)))


def partials(root: Path) -> list[str]:
    return [path.name for path in root.glob("*.partial")]


def stopped(root: Path, kind: str, at: int) -> Path:
    """Interrupts packing at an image and returns the partial directory."""
    with pytest.raises(KeyboardInterrupt):
        pack(Drawn(COUNT, at=at, fail=interrupt), root, kind)
    (partial,) = root.glob("*.partial")
    return partial


def folder(path: Path, size: int = 8) -> FolderSource:
    return FolderSource(LocalStorage(path), size)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """All files of caches that were packed without an interruption, by kind."""
    root = tmp_path_factory.mktemp("whole")
    return {kind: files(pack(Drawn(COUNT), root, kind)) for kind in KINDS}


# --- contents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cache_contains_the_images_of_the_source(tmp_path: Path, kind: str) -> None:
    names = ["a.png", "b.jpg", "test/c.png", "val/d.png", "val/e.jpg"]
    expected = fill(tmp_path / "in", names)
    cache = pack(folder(tmp_path / "in"), tmp_path / "cache", kind)
    assert cache.names == names and cache.native_splits == ["none", "none", "test", "val", "val"]
    for name, image, digest in zip(names, everything(cache), cache.sha256, strict=True):
        assert np.array_equal(image, expected[name]), name
        assert digest.tobytes() == hashlib.sha256(expected[name].tobytes()).digest()
    manifest = cache.manifest
    digests = b"".join(digest.tobytes() for digest in cache.sha256)
    assert manifest["content"] == hashlib.sha256(digests).hexdigest()
    assert manifest["count"] == 5 and manifest["kind"] == kind and manifest["skipped"] == []
    assert manifest["description"]["source"] == str(tmp_path / "in")
    assert Image.__version__ in manifest["decoder"]
    data = {"uint8": {"images.npy"}, "bytes": {"images.bin", "offsets.npy"}}[kind]
    assert set(files(cache)) == {"manifest.json", "sha256.npy"} | data
    assert cache.directory == tmp_path / "cache" / fingerprint(folder(tmp_path / "in"), kind)
    assert partials(tmp_path / "cache") == []


def test_manifest_is_json(whole: dict) -> None:
    manifest = json.loads(whole["uint8"]["manifest.json"])
    assert manifest["names"] == [f"image {k}" for k in range(COUNT)]
    assert manifest["own"] == [["train", 400], ["val", 200]]
    assert manifest["sizes"] == {"images.npy": 128 + COUNT * 48, "sha256.npy": 128 + COUNT * 32}


def test_both_kinds_contain_the_same_pixels(tmp_path: Path) -> None:
    """Images that must be resized, rotated or converted are stored as PNG, others unchanged."""
    fill(tmp_path / "in", ["a.png", "b.jpg"], 16)
    fill(tmp_path / "in", ["c.png", "d.jpg"], 37)
    tags = Image.Exif()
    tags[0x0112] = 6
    (tmp_path / "in" / "e.jpg").write_bytes(encoded(pixels(1, 16), "JPEG", exif=tags))
    (tmp_path / "in" / "f.jpg").write_bytes(encoded(pixels(1, 37), "JPEG", exif=tags))
    (tmp_path / "in" / "g.png").write_bytes(encoded(pixels(1, 16)[..., 0]))
    one, two = (pack(folder(tmp_path / "in", 16), tmp_path / "cache", kind) for kind in KINDS)
    assert np.array_equal(everything(one), everything(two)) and len(one.names) == 7
    assert one.manifest["content"] == two.manifest["content"]
    data, offsets = files(two)["images.bin"], np.load(two.directory / "offsets.npy")
    parts = [data[a:b] for a, b in pairwise(offsets)]
    for part, name in zip(parts, two.names, strict=True):
        as_it_was = (tmp_path / "in" / name).read_bytes() == part
        assert as_it_was == (name[0] not in "cdf"), name
        assert opened(part).shape == (16, 16, 3)


def test_packed_faces_equal_the_drawn_faces(tmp_path: Path) -> None:
    source = FacesSource(16, {"train": 5, "val": 2, "test": 3}, seed=4)
    expected = np.stack(list(source.read(0)))
    for kind in KINDS:
        cache = pack(source, tmp_path, kind)
        assert np.array_equal(everything(cache), expected)
        assert cache.native_splits == ["train"] * 5 + ["val"] * 2 + ["test"] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_reopened_cache_reads_no_image(tmp_path: Path, kind: str) -> None:
    first, source = pack(Drawn(COUNT), tmp_path, kind), Drawn(COUNT)
    before = files(first)
    second = pack(source, tmp_path, kind)
    assert source.given == [] and files(second) == before
    assert np.array_equal(everything(second), np.stack([pixels(k, 4) for k in range(COUNT)]))


@pytest.mark.parametrize("kind", KINDS)
def test_only_bad_images_give_an_empty_cache(tmp_path: Path, kind: str) -> None:
    cache = pack(Drawn(3, bad=range(3)), tmp_path, kind, on_error="skip")
    assert cache.names == [] and cache.native_splits == [] and verify(cache, progress=False) == []
    assert everything(cache).shape == (0, 4, 4, 3)
    assert [item["name"] for item in cache.manifest["skipped"]] == [f"image {k}" for k in range(3)]


# --- interruptions ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fail", [interrupt, disconnect])
@pytest.mark.parametrize("at", [0, 1, 255, 256, 257, COUNT - 1])
def test_interrupted_packing_resumes_at_the_last_chunk(
    tmp_path: Path, at: int, fail: Callable, kind: str, whole: dict
) -> None:
    error = KeyboardInterrupt if fail is interrupt else DataError
    with pytest.raises(error):
        pack(Drawn(COUNT, at=at, fail=fail), tmp_path, kind)
    assert len(partials(tmp_path)) == 1 and not list(tmp_path.glob("*/manifest.json"))
    again = Drawn(COUNT)
    cache = pack(again, tmp_path, kind)
    assert again.given == list(range(at // 256 * 256, COUNT))  # at most one chunk is read again
    assert files(cache) == whole[kind] and partials(tmp_path) == []


def test_packing_completes_after_many_interruptions(tmp_path: Path, whole: dict) -> None:
    for at in (100, 256, 300, 511, 513, 599):
        stopped(tmp_path, "uint8", at)
    assert files(pack(Drawn(COUNT), tmp_path)) == whole["uint8"]


def test_resumed_packing_reads_only_the_missing_files(tmp_path: Path, monkeypatch) -> None:
    names = [f"{k:03}.png" for k in range(300)]
    fill(tmp_path / "in", names, 4)
    read, asked = LocalStorage.read, []

    def noted(storage: LocalStorage, name: str) -> bytes:
        if name == "290.png" and "290.png" not in asked:
            asked.append(name)
            raise KeyboardInterrupt
        asked.append(name)
        return read(storage, name)

    monkeypatch.setattr(LocalStorage, "read", noted)
    with pytest.raises(KeyboardInterrupt):
        pack(folder(tmp_path / "in", 4), tmp_path / "cache")
    del asked[:-1]
    pack(folder(tmp_path / "in", 4), tmp_path / "cache")
    assert asked[1:] == names[256:]


@pytest.mark.parametrize(
    ("step", "kind"),
    [("_header", "uint8")] + [(step, k) for step in ("_save", "dump", "replace") for k in KINDS],
)
def test_failure_after_the_last_image_reads_no_image_again(
    tmp_path: Path, step: str, kind: str, whole: dict, monkeypatch
) -> None:
    """The process is interrupted in one of the final steps, after all images were packed."""
    owner = {"replace": packing.os, "dump": packing.json}.get(step, packing)
    original = getattr(owner, step)

    def stop(*args, **kwargs) -> None:
        if step == "dump":
            args[1].write('{"format": 2, "ki')
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, step, stop)
    with pytest.raises(KeyboardInterrupt):
        pack(Drawn(COUNT), tmp_path, kind)
    monkeypatch.setattr(owner, step, original)
    again = Drawn(COUNT)
    assert files(pack(again, tmp_path, kind)) == whole[kind]
    assert again.given == []


# Changes to the data and the journal, both of 512 images; the image at which packing resumes.
TORN = {
    "the journal's last line is half": (lambda d, j: (d, j[:-100]), 256),
    "the journal's last line has no end": (lambda d, j: (d, j[:-1]), 256),
    "the journal ends with zeros": (lambda d, j: (d, j + bytes(3000)), 512),
    "the journal ends with a part": (lambda d, j: (d, j + b'{"items": 256, "sha2'), 512),
    "the journal ends with noise": (lambda d, j: (d, j + bytes(range(127, 256))), 512),
    "the journal ends with a number": (lambda d, j: (d, j + b"17\n"), 512),
    "the journal is empty": (lambda d, j: (d, b""), 0),
    "the journal's first line is spoilt": (lambda d, j: (d, b"x" + j[1:]), 0),
    "the data go on": (lambda d, j: (d + bytes(range(256)) * 9, j), 512),
    "the data lack a byte": (lambda d, j: (d[:-1], j), 256),
    "the data end early": (lambda d, j: (d[:9000], j), 0),
    "the data are empty": (lambda d, j: (b"", j), 0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", TORN)
def test_packing_resumes_from_the_valid_part_after_a_crash(
    tmp_path: Path, what: str, kind: str, whole: dict
) -> None:
    partial = stopped(tmp_path, kind, at=550)
    data, journal = partial / packing.DATA[kind], partial / "journal.jsonl"
    assert journal.read_bytes().count(b"\n") == 2
    tear, first = TORN[what]
    torn = tear(data.read_bytes(), journal.read_bytes())
    data.write_bytes(torn[0])
    journal.write_bytes(torn[1])
    again = Drawn(COUNT)
    cache = pack(again, tmp_path, kind)
    assert again.given == list(range(first, COUNT))
    assert files(cache) == whole[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_discarded_journal_lines_do_not_affect_later_runs(
    tmp_path: Path, kind: str, whole: dict
) -> None:
    for at in (300, 550):
        partial = stopped(tmp_path, kind, at)
        with open(partial / "journal.jsonl", "a") as journal:
            journal.write('{"items": 256, "sha2')
    again = Drawn(COUNT)
    assert files(pack(again, tmp_path, kind)) == whole[kind]
    assert again.given == list(range(512, COUNT))


@pytest.mark.parametrize("kind", KINDS)
def test_groups_need_not_align_with_the_journal(
    tmp_path: Path, kind: str, whole: dict, monkeypatch
) -> None:
    """The group at which packing resumes is read from its start."""
    monkeypatch.setattr(Drawn, "CHUNK", 100)
    stopped(tmp_path, kind, at=270)
    again = Drawn(COUNT)
    assert files(pack(again, tmp_path, kind)) == whole[kind]
    assert again.given == list(range(200, COUNT))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", ["data", "journal", "both"])
def test_partial_cache_with_a_missing_file_is_packed_again(
    tmp_path: Path, missing: str, kind: str, whole: dict
) -> None:
    partial = stopped(tmp_path, kind, at=550)
    for name, path in (("data", packing.DATA[kind]), ("journal", "journal.jsonl")):
        if missing in (name, "both"):
            (partial / path).unlink()
    again = Drawn(COUNT)
    assert files(pack(again, tmp_path, kind)) == whole[kind] and again.given == list(range(COUNT))


@pytest.mark.parametrize("kind", KINDS)
def test_packing_resumes_after_the_process_was_killed(
    tmp_path: Path, kind: str, whole: dict
) -> None:
    process = start(tmp_path, kind, count=COUNT, at=300, fail=kill)
    process.join(120)
    assert process.exitcode == -9
    assert len(partials(tmp_path)) == 1
    again = Drawn(COUNT)
    assert files(pack(again, tmp_path, kind)) == whole[kind]
    assert again.given == list(range(256, COUNT))


def test_only_one_of_two_processes_packs_and_both_succeed(tmp_path: Path, whole: dict) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    options = {"count": COUNT, "at": 300, "fail": pause, "log": log}
    both = [start(root, "uint8", **options) for _ in range(2)]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text().split() == [str(k) for k in range(COUNT)]
    assert files(pack(Drawn(COUNT), root)) == whole["uint8"] and partials(root) == []


# --- partial caches of other sources ------------------------------------------------------------


def interrupted(root: Path, path: Path, kind: str = "uint8", size: int = 4) -> str:
    """Interrupts packing a folder after the first image; returns the name of the partial cache."""
    source = folder(path, size)
    read, before = source.read, set(partials(root))

    def stop(group: int, places: list[int] | None = None) -> Iterator:
        yield next(iter(read(group, places)))
        raise KeyboardInterrupt

    source.read = stop
    with pytest.raises(KeyboardInterrupt):
        pack(source, root, kind)
    (name,) = set(partials(root)) - before
    return name


def test_partial_cache_that_can_never_be_resumed_is_removed(tmp_path: Path) -> None:
    one, two, root = tmp_path / "one", tmp_path / "two", tmp_path / "cache"
    for path in (one, two):
        fill(path, ["a.png", "b.png"], 4)
    old = interrupted(root, one)
    others = {
        interrupted(root, one, "bytes"),
        interrupted(root, one, size=2),
        interrupted(root, two),
    }
    (root / "unreadable.partial").mkdir()
    others.add("unreadable.partial")
    fill(one, ["c.png"], 4)
    assert set(partials(root)) == others | {old}
    cache = pack(folder(one, 4), root)
    assert cache.names == ["a.png", "b.png", "c.png"]
    assert set(partials(root)) == others  # of another kind, size or source


def test_locked_partial_cache_is_not_removed(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    fill(tmp_path / "in", ["a.png", "b.png"], 4)
    old = interrupted(root, tmp_path / "in")
    fill(tmp_path / "in", ["c.png"], 4)
    with FileLock(root / old.replace(".partial", ".lock")):
        pack(folder(tmp_path / "in", 4), root)
        assert partials(root) == [old]


def test_directory_without_a_manifest_is_packed_again(tmp_path: Path, whole: dict) -> None:
    cache = pack(Drawn(COUNT), tmp_path)
    (cache.directory / "manifest.json").unlink()
    (cache.directory / "old.txt").write_text("left")
    again = Drawn(COUNT)
    assert files(pack(again, tmp_path)) == whole["uint8"] and len(again.given) == COUNT


# --- bad images ---------------------------------------------------------------------------------

BAD = (3, 255, 256, 400, 599)
GOOD = [k for k in range(COUNT) if k not in BAD]


@pytest.mark.parametrize("kind", KINDS)
def test_up_to_max_bad_images_are_skipped(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError) as caught:
        pack(Drawn(COUNT, BAD), tmp_path, kind, on_error="skip", max_bad=4)
    text = "more than data.max_bad=4 images are bad; the last is image 599: not a readable JPEG"
    assert text in str(caught.value)
    again = Drawn(COUNT, BAD)
    cache = pack(again, tmp_path, kind, on_error="skip", max_bad=5)
    assert again.given == list(range(512, COUNT))  # earlier bad images are remembered
    assert cache.names == [f"image {k}" for k in GOOD] and cache.manifest["count"] == 595
    assert np.array_equal(everything(cache), np.stack([pixels(k, 4) for k in GOOD]))
    assert cache.native_splits == ["train"] * 397 + ["val"] * 198
    skipped = cache.manifest["skipped"]
    assert [item["name"] for item in skipped] == [f"image {k}" for k in BAD]
    assert all(item["reason"].startswith(f"{item['name']}: not a readable") for item in skipped)
    assert verify(cache, progress=False) == []


def test_max_bad_zero_skips_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"more than data.max_bad=0 .* image 3: not a readable"):
        pack(Drawn(COUNT, BAD), tmp_path, on_error="skip", max_bad=0)
    assert len(pack(Drawn(COUNT), tmp_path / "fine", on_error="skip", max_bad=0).names) == COUNT


def test_packing_resumes_after_a_bad_image_with_on_error_skip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^image 400: not a .*Set data.on_error=skip to skip"):
        pack(Drawn(COUNT, [400]), tmp_path)
    again = Drawn(COUNT, [400])
    cache = pack(again, tmp_path, on_error="skip")
    assert again.given == list(range(256, COUNT))
    assert cache.names == [f"image {k}" for k in range(COUNT) if k != 400]


def test_repaired_image_is_packed(tmp_path: Path) -> None:
    fill(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "in" / "b.png").write_bytes(b"")
    skipped = pack(folder(tmp_path / "in"), tmp_path / "cache", on_error="skip")
    assert skipped.names == ["a.png"]
    # The cache with a skipped image is not used without on_error=skip.
    with pytest.raises(DataError, match=r"was packed without 1 bad image\(s\): .*b.png: not a"):
        pack(folder(tmp_path / "in"), tmp_path / "cache")
    expected = fill(tmp_path / "in", ["b.png"])
    cache = pack(folder(tmp_path / "in"), tmp_path / "cache")
    assert cache.names == ["a.png", "b.png"]
    assert np.array_equal(everything(cache)[1], expected["b.png"])


def test_unreadable_rows_of_a_damaged_row_group_are_skipped(tmp_path: Path) -> None:
    path, data = tmp_path / "train-0.parquet", [encoded(pixels(k)) for k in range(300)]
    write_parquet(path, data, group=100)
    content = bytearray(path.read_bytes())
    place = content.index(data[190])
    content[place - 4 : place] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    source = ParquetSource(LocalStorage(path), 8)
    with pytest.raises(DataError, match=f"^{path}: row group 1 cannot be read from row 64 on"):
        pack(source, tmp_path / "cache")
    cache = pack(source, tmp_path / "cache", on_error="skip")
    kept = [*range(164), *range(200, 300)]
    assert cache.names == [f"train-0.parquet:{k}" for k in kept]
    assert np.array_equal(everything(cache), np.stack([pixels(k) for k in kept]))
    assert {item["reason"][: len(str(path)) + 13] for item in cache.manifest["skipped"]} == {
        f"{path}: row group 1"
    }


# --- damage to a cache --------------------------------------------------------------------------

DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "garbage": lambda path: path.write_bytes(b"garbage" * 100),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}
FILES = [
    ("uint8", "images.npy"), ("uint8", "sha256.npy"), ("uint8", "manifest.json"),
    ("bytes", "images.bin"), ("bytes", "offsets.npy"), ("bytes", "sha256.npy"),
    ("bytes", "manifest.json"),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_damaged_cache_is_an_error_that_names_the_directory(
    tmp_path: Path, kind: str, name: str, damage: str
) -> None:
    cache = pack(Drawn(20), tmp_path, kind)
    sizes = cache.manifest["sizes"]
    DAMAGE[damage](cache.directory / name)
    # The size is right, and the contents are read only by verify.
    if (name, damage) == ("images.bin", "zeros"):
        assert verify(PackedCache(cache.directory), progress=False) == cache.names
        return
    with pytest.raises(DataError, match=r"is damaged .*; remove that directory") as caught:
        again = PackedCache(cache.directory)
        assert again.names and again.images and len(again.sha256)
    assert str(caught.value).startswith(f"the cache {cache.directory} is damaged (")
    if name != "manifest.json" and damage in ("cut", "longer", "garbage", "empty"):
        assert re.search(rf"{name} has \d+ bytes, not {sizes[name]}\)",
                         str(caught.value))  # fmt: skip
    if (name, damage) != ("manifest.json", "missing"):  # that cache is packed again
        with pytest.raises(DataError, match="remove that directory"):
            opened = pack(Drawn(20), tmp_path, kind)
            assert opened.names and opened.images and len(opened.sha256)
    shutil.rmtree(cache.directory)
    expected = np.stack([pixels(k, 4) for k in range(20)])
    assert np.array_equal(everything(pack(Drawn(20), tmp_path, kind)), expected)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"format": 1}', "format 1, not 2"),
        ("{}", "'format'"),
        ("[]", "list indices"),
        ('{"format": 2}', "lacks names"),
    ],
)
def test_manifest_of_another_format_is_an_error(tmp_path: Path, content: str, reason: str) -> None:
    cache = pack(Drawn(20), tmp_path)
    (cache.directory / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=f"is damaged \\(.*{reason}.*remove that directory"):
        assert PackedCache(cache.directory).names


@pytest.mark.parametrize(("kind", "name"), [("uint8", "images.npy"), ("bytes", "offsets.npy")])
def test_array_of_another_shape_is_an_error(tmp_path: Path, kind: str, name: str) -> None:
    cache = pack(Drawn(20), tmp_path, kind)
    array = np.load(cache.directory / name)
    np.save(cache.directory / name, array.reshape(-1, 3 if kind == "uint8" else 1))
    with pytest.raises(DataError, match=rf"{name} has shape .*remove that directory"):
        assert PackedCache(cache.directory).images


@pytest.mark.parametrize("kind", KINDS)
def test_verify_names_the_images_with_a_changed_byte(tmp_path: Path, kind: str) -> None:
    cache = pack(Drawn(20), tmp_path, kind)
    assert verify(cache, progress=False) == []
    path = cache.directory / packing.DATA[kind]
    if kind == "uint8":
        edges = 128 + 48 * np.arange(21)  # a header, then 4x4 pixels per image
    else:
        edges = np.load(cache.directory / "offsets.npy")
    whole = path.read_bytes()
    assert edges[-1] == len(whole)
    for bad in ([0], [7], [19], [3, 4, 11]):
        spoilt = bytearray(whole)
        for k in bad:
            spoilt[(edges[k] + edges[k + 1]) // 2] ^= 1
        path.write_bytes(spoilt)
        names = [f"image {k}" for k in bad]
        assert verify(PackedCache(cache.directory), progress=False) == names
    for place in (edges[5], edges[6] - 1):  # the first and the last byte of an image
        spoilt = bytearray(whole)
        spoilt[place] ^= 0x80
        path.write_bytes(spoilt)
        assert verify(PackedCache(cache.directory), progress=False) == ["image 5"]


def test_changed_pixel_is_an_error_at_the_first_access(tmp_path: Path) -> None:
    cache = pack(Drawn(20), tmp_path)
    path = cache.directory / "images.npy"
    data = bytearray(path.read_bytes())
    data[-48 - 1] ^= 1  # the last byte of image 18 of 4x4 pixels
    path.write_bytes(data)
    images = PackedCache(cache.directory).images
    assert images.gather(np.array([19, 0])).shape == (2, 4, 4, 3)
    for positions in ([18], [3, 18, 1]):
        with pytest.raises(DataError, match=f"image 18 has changed in {path}"):
            images.gather(np.array(positions))
    assert images.compared.nonzero()[0].tolist() == [0, 3, 19]


@pytest.mark.parametrize("kind", ["uint8", "bytes"])
def test_file_truncated_while_in_use_is_an_error(tmp_path: Path, kind: str) -> None:
    """Otherwise the process is killed by SIGBUS without a message."""
    images = pack(Drawn(20), tmp_path, kind).images
    images.gather(np.array([0]))
    os.truncate(images.file.path, 200)
    with pytest.raises(DataError, match="was truncated while it was in use: it has 200 bytes"):
        images.gather(np.array([19]))


def test_removed_file_is_still_readable(tmp_path: Path) -> None:
    cache = pack(Drawn(3), tmp_path)
    before = cache.images.gather(np.arange(3)).copy()
    (cache.directory / "images.npy").unlink()
    assert np.array_equal(cache.images.gather(np.arange(3)), before)


@pytest.mark.parametrize("key", KEYS)
def test_manifest_without_a_key_is_an_error(tmp_path: Path, key: str) -> None:
    cache = pack(Drawn(3), tmp_path)
    path = cache.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"lacks {key}"):
        assert PackedCache(cache.directory).names


def test_changed_hashes_are_an_error(tmp_path: Path) -> None:
    cache = pack(Drawn(20), tmp_path)
    path = cache.directory / "sha256.npy"
    spoilt = bytearray(path.read_bytes())
    spoilt[-32 * 3 + 5] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(DataError, match=r"is damaged \(sha256.npy was changed\)"):
        verify(PackedCache(cache.directory), progress=False)


# --- fingerprints -------------------------------------------------------------------------------


def test_fingerprint_depends_on_everything_that_determines_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "in"
    fill(path, [f"{k}.png" for k in range(6)], 16)
    prints = []

    def note(kind: str = "uint8", size: int = 8) -> None:
        prints.append(fingerprint(folder(path, size), kind))
        assert fingerprint(folder(path, size), kind) == prints[-1]

    note()
    note("bytes")
    note(size=16)
    stat = (path / "2.png").stat()
    os.utime(path / "2.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000))
    note()
    (path / "3.png").write_bytes((path / "3.png").read_bytes() + b"x")
    os.utime(path / "3.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    note()
    fill(path, ["6.png"], 16)
    note()
    (path / "6.png").rename(path / "7.png")
    note()
    path = path.rename(tmp_path / "elsewhere")
    note()
    assert len(set(prints)) == 8
    before = fingerprint(folder(path), "uint8")
    (path / "notes.txt").write_text("no image")
    assert fingerprint(folder(path), "uint8") == before


def test_fingerprint_does_not_depend_on_the_splits(tmp_path: Path) -> None:
    """All splits of a dataset, and all orders of reading it, use one cache."""
    fill(tmp_path / "in", [f"{k}.png" for k in range(6)])

    def opened(**options) -> str:
        data = ImageDataModule(
            **{"source": str(tmp_path / "in"), "size": 8, "batch_size": 1, "splits": SHARES,
               **options}
        )  # fmt: skip
        return fingerprint(data.open_source(), "uint8")

    first = opened()
    assert opened(splits={"train": 8, "val": 1, "test": 1}) == first
    assert opened(split="train", split_seed=3, seed=2, flip=False, batch_size=3) == first
    assert opened(order="interleave", drop_last=False, on_error="skip") == first
    assert opened(size=4) != first
    faces = {"source": "faces", "splits": {"train": 5, "val": 1, "test": 1}}
    assert opened(**faces) == opened(**faces, seed=5)
    other = {"source": "faces", "splits": {"train": 5, "val": 2, "test": 1}}
    assert len({opened(**faces), opened(**faces, split_seed=1), opened(**other)}) == 3


def test_fingerprint_depends_on_the_image_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [encoded(pixels(0))], plain=True)
    write_parquet(tmp_path / "b.parquet", [encoded(pixels(0))], plain=True, column="b")
    one = ParquetSource(LocalStorage(tmp_path / "a.parquet"), 8)
    two = ParquetSource(LocalStorage(tmp_path / "b.parquet"), 8, "b")
    two.files = one.files
    assert fingerprint(one, "uint8") != fingerprint(two, "uint8")


# --- disk errors --------------------------------------------------------------------------------


def test_unwritable_cache_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as caught:
        pack(Drawn(4), tmp_path / "file" / "cache")
    text = f"data.cache_dir={tmp_path}/file/cache cannot be written: Not a directory. "
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("kind", KINDS)
def test_full_disk_is_an_error_and_packing_resumes(
    tmp_path: Path, disk: Callable[[str], Path], kind: str
) -> None:
    """1500 images of 768 bytes, or slightly more as PNG, are packed to a disk of 1 MiB."""
    expected = files(pack(Drawn(1500, size=16), tmp_path / "large", kind))
    root = disk("1m") / "cache"
    with pytest.raises(DataError) as caught:
        pack(Drawn(1500, size=16), root, kind)
    assert str(caught.value) == (
        f"data.cache_dir={root} cannot be written: No space left on device. The images "
        "packed so far are kept; free space there and run the command again, or set "
        "data.cache_dir to another disk"
    )
    assert len(partials(root)) == 1
    disk("64m")
    again = Drawn(1500, size=16)
    assert files(pack(again, root, kind)) == expected
    first = again.given[0]
    assert first % 256 == 0 and 512 <= first < 1500 and again.given == list(range(first, 1500))


# --- S3 -----------------------------------------------------------------------------------------


class Bucket:
    """A bucket of a local S3 server."""

    def __init__(self, endpoint: str) -> None:
        import boto3

        self.endpoint = endpoint
        self.client = boto3.client("s3", endpoint_url=f"http://{endpoint}")
        self.client.create_bucket(Bucket="bucket")

    def put(self, folder: Path, prefix: str) -> str:
        """Uploads all files of a folder and returns their address."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            self.client.put_object(Bucket="bucket", Key=key, Body=path.read_bytes())
        return f"s3://bucket/{prefix}"


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"),
                            ("DEFAULT_REGION", "us-east-1")):  # fmt: skip
            patch.setenv(f"AWS_{name}", value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield Bucket(f"{host}:{port}")
        server.stop()


@pytest.fixture
def bucket(server: Bucket, monkeypatch) -> Bucket:
    """The server, with its address in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.endpoint}")
    return server


NAMES = [f"{k:02}.{kind}" for k in range(10) for kind in ("jpg", "png")]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in the same order as files and in a parquet file."""
    root = tmp_path_factory.mktemp("local")
    fill(root / "folder", NAMES)
    rows = [(root / "folder" / name).read_bytes() for name in NAMES]
    write_parquet(root / "set" / "data" / "train-0.parquet", rows, group=6)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_dataset_is_the_same_from_local_files_and_s3(
    bucket: Bucket, local: Path, tmp_path: Path, kind: str
) -> None:
    expected = np.stack([opened((local / "folder" / name).read_bytes()) for name in NAMES])
    places = {str(local / "folder"), str(local / "set"), str(local / "set/data/train-0.parquet")}
    places |= {bucket.put(local / "folder", "images"), bucket.put(local / "set", "set")}
    places |= {
        "s3://bucket/set/data/train-0.parquet",
        "s3://bucket/images/",
        "s3://bucket/set/data",
    }
    contents, directories = set(), set()
    for place in places:
        cache = pack(open_source(place, 8, SHARES), tmp_path, kind)
        assert np.array_equal(everything(cache), expected), place
        contents.add(cache.manifest["content"])
        directories.add(cache.directory)
        names = NAMES if "parquet" not in cache.names[0] else range(20)
        assert [str(n) for n in names] == [name.split(":")[-1] for name in cache.names]
    # A trailing slash has no effect, and a folder with one file is equivalent to the file.
    assert len(contents) == 1 and len(places) == 8 and len(directories) == 6


def test_address_may_contain_the_endpoint(
    server: Bucket, local: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    place = server.put(local / "folder", "images")
    address = f"{place}?endpoint_override={server.endpoint}&scheme=http"
    source = open_source(address, 8, SHARES)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.endpoint}")
    same = open_source(place, 8, SHARES)
    assert source.describe() == same.describe() and source.location(3) == f"{place}/01.png"
    cache = pack(source, tmp_path)
    assert cache.names == NAMES and cache.directory == pack(same, tmp_path).directory


def test_single_object_is_a_source(bucket: Bucket, local: Path, tmp_path: Path) -> None:
    bucket.put(local / "folder", "images")
    source = open_source("s3://bucket/images/03.png", 8, SHARES)
    assert source.names == ["03.png"] and source.location(0) == "s3://bucket/images/03.png"
    assert list(source.read(0)) == [(local / "folder" / "03.png").read_bytes()]


def test_parquet_on_s3_can_be_streamed(bucket: Bucket, local: Path, tmp_path: Path) -> None:
    place = bucket.put(local / "set", "set")
    images = SourceImages(open_source(place, 8, SHARES), 1 << 20)
    expected = np.stack([opened((local / "folder" / name).read_bytes()) for name in NAMES])
    for positions in ([19, 0, 7, 7], list(range(20))):
        assert np.array_equal(images.gather(np.array(positions)), expected[positions])
    assert images.reads == 4
    options = {"splits": SHARES, "size": 8, "batch_size": 3, "cache_dir": str(tmp_path)}
    packed = ImageDataModule(str(local / "set"), **options)
    stream = ImageDataModule(
        place, **options, cache="none", order="interleave", interleave=2, num_workers=2
    )
    for data in (packed, stream):
        data.setup("fit")
    assert stream.state_dict()["splits"]["train"]["content"] is None
    assert [k.stat().st_size for k in tmp_path.glob("*/images.npy")] == [128 + 20 * 192]
    order = {}
    for data in (packed, stream):
        order[data] = []
        for batch in data.train_dataloader():
            for k, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                place = int(data.images["train"].names[k].split(":")[1])
                order[data].append(place)
                assert np.array_equal(image, expected[place])
    count = len(packed.images["train"]) // 3 * 3
    assert len(set(order[packed])) == len(set(order[stream])) == count >= 6


def test_missing_bucket_or_object_is_an_error(
    bucket: Bucket, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    bucket.client.create_bucket(Bucket="void")
    for place, reason in (
        ("s3://no-such-bucket/images", r"cannot be listed \(.*NO_SUCH_BUCKET"),
        ("s3://no-such-bucket", r"cannot be listed \(.*NO_SUCH_BUCKET"),
        ("s3://bucket/nothing/here", r"does not exist \("),
        ("s3://bucket/nothing.parquet", r"does not exist \("),
        ("s3://void", r"holds no image"),
    ):
        with pytest.raises(DataError, match=f"^data.source={place} {reason}"):
            open_source(place, 8, SHARES)
        arguments = [f"data.source={place}", f"data.cache_dir={tmp_path}"]
        assert main(["ingest", *arguments]) == 1
        assert re.match(f"data.source={place} {reason}", capsys.readouterr().err)


def test_network_error_is_not_a_bad_image(bucket: Bucket, local: Path, tmp_path: Path) -> None:
    """It is never skipped, for any max_bad, and the packed images are kept."""
    place = bucket.put(local / "folder", "fragile")
    source = open_source(place, 8, SHARES)
    bucket.client.delete_object(Bucket="bucket", Key="fragile/05.png")
    with pytest.raises(DataError, match=f"^{place}/05.png: cannot be read"):
        pack(source, tmp_path, on_error="skip")
    place = bucket.put(local / "set", "fragile-set")
    source = open_source(place, 8, SHARES)
    bucket.client.delete_object(Bucket="bucket", Key="fragile-set/data/train-0.parquet")
    with pytest.raises(DataError, match=f"^{place}/data/train-0.parquet: row group 0 cannot be"):
        pack(source, tmp_path, on_error="skip")
    assert not list(tmp_path.glob("*/manifest.json")) and len(partials(tmp_path)) == 2


def test_unreadable_object_is_a_bad_image(bucket: Bucket, local: Path, tmp_path: Path) -> None:
    place = bucket.put(local / "folder", "spoilt")
    bucket.client.put_object(Bucket="bucket", Key="spoilt/05.png", Body=b"<html>")
    source = open_source(place, 8, SHARES)
    with pytest.raises(DataError, match=f"^{place}/05.png: not a readable JPEG or PNG"):
        pack(source, tmp_path)
    cache = pack(source, tmp_path, on_error="skip")
    assert cache.names == [name for name in NAMES if name != "05.png"]
    (skipped,) = cache.manifest["skipped"]
    assert skipped["name"] == "05.png" and skipped["reason"].startswith(f"{place}/05.png: ")


def test_changed_object_changes_the_fingerprint(bucket: Bucket, local: Path) -> None:
    place = bucket.put(local / "folder", "changing")
    before = fingerprint(open_source(place, 8, SHARES), "uint8")
    assert fingerprint(open_source(place, 8, SHARES), "uint8") == before
    bucket.client.put_object(
        Bucket="bucket", Key="changing/05.png", Body=encoded(pixels(1)) + b"x"
    )
    assert fingerprint(open_source(place, 8, SHARES), "uint8") != before
