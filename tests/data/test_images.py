"""Random access to images: equal pixels from every storage, and bounded memory."""

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diffusion_lab.data import images as module
from diffusion_lab.data.faces_source import FacesSource
from diffusion_lab.data.folder_source import FolderSource
from diffusion_lab.data.images import EncodedImages, Images, MappedImages, SourceImages, Split
from diffusion_lab.data.loader import Loader
from diffusion_lab.data.parquet_source import ParquetSource
from diffusion_lab.data.shuffle import interleaved, open_groups
from diffusion_lab.data.source import Item, Source, chunk_ranges
from diffusion_lab.data.storage import LocalStorage
from diffusion_lab.errors import DataError

COUNT, SIZE = 53, 8
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
KINDS = ("mapped", "encoded", "parquet", "folder")
POSITIONS = {
    "one": [17],
    "none": [],
    "all": list(range(COUNT)),
    "unsorted": [52, 3, 41, 10, 9, 0, 30],
    "repeated": [5, 5, 44, 5, 12, 44, 0],
    "backwards": list(range(COUNT))[::-1],
}


def encoded(pixels: np.ndarray, level: int = 1) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=level)
    return buffer.getvalue()


def write_parquet(path: Path, data: Sequence[bytes], group: int = 10) -> None:
    """Writes a file as the hub stores image datasets, with `group` images per row group.

    Each row is a struct of bytes and path.
    """
    schema = pyarrow.schema({
        "image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    })  # fmt: skip
    with pyarrow.parquet.ParquetWriter(
        path, schema, compression="none", use_dictionary=False
    ) as writer:
        for first in range(0, len(data), group):
            rows = [{"bytes": each, "path": None} for each in data[first : first + group]]
            writer.write_table(pyarrow.table({"image": rows}, schema=schema))


def open_parquet(path: Path, size: int = SIZE) -> ParquetSource:
    return ParquetSource(LocalStorage(path), size)


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Images]:
    """The same pixels in each kind of storage."""
    root = tmp_path_factory.mktemp("images")
    data, names = [encoded(image) for image in PIXELS], [f"{k:02}" for k in range(COUNT)]
    np.save(root / "images.npy", PIXELS)
    (root / "images.bin").write_bytes(b"".join(data))
    offsets = np.cumsum([0, *map(len, data)], dtype=np.int64)
    write_parquet(root / "a.parquet", data)
    folder = root / "folder"
    folder.mkdir()
    for name, each in zip(names, data, strict=True):
        (folder / f"{name}.png").write_bytes(each)
    return {
        "mapped": MappedImages(root / "images.npy", names, block=10),
        "encoded": EncodedImages(root / "images.bin", offsets, names, SIZE, block=10),
        "parquet": SourceImages(open_parquet(root / "a.parquet"), 3000),
        "folder": SourceImages(FolderSource(LocalStorage(folder), SIZE), 0),
    }


# --- pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POSITIONS)
def test_every_storage_returns_the_requested_pixels(
    everywhere: dict[str, Images], kind: str, name: str
) -> None:
    positions = np.array(POSITIONS[name], dtype=np.int64)
    actual = everywhere[kind].gather(positions)
    assert actual.dtype == np.uint8 and np.array_equal(actual, PIXELS[positions])


@pytest.mark.parametrize("kind", KINDS)
def test_every_storage_has_its_size_names_and_groups(
    everywhere: dict[str, Images], kind: str
) -> None:
    images = everywhere[kind]
    assert images.size == SIZE and len(set(images.names)) == len(images.names) == COUNT
    assert [k for group in images.groups for k in group] == list(range(COUNT))
    if kind != "folder":
        assert [len(group) for group in images.groups] == [10] * 5 + [3]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_is_a_copy(everywhere: dict[str, Images], kind: str) -> None:
    loader = Loader(Split(everywhere[kind], np.arange(COUNT)), "val", COUNT, seed=0)
    next(iter(loader))["image"].fill_(7)
    (batch,) = loader
    assert np.array_equal(batch["image"].numpy(), PIXELS)


def test_drawn_images_are_read_at_any_position() -> None:
    source = FacesSource(16, {"train": 5, "val": 2, "test": 1}, seed=3)
    source.groups = chunk_ranges(8, 3)
    everything = np.stack([image for group in range(3) for image in source.read(group)])
    assert len(np.unique(everything.reshape(8, -1), axis=0)) == 8
    positions = np.array([7, 0, 3, 3, 2])
    assert np.array_equal(SourceImages(source, 0).gather(positions), everything[positions])


@pytest.mark.parametrize("kind", ["encoded", "parquet", "folder"])
def test_bad_image_is_an_error_that_names_it(tmp_path: Path, kind: str) -> None:
    data = [encoded(image) for image in PIXELS[:12]]
    data[7] = data[7][:60]
    names = [f"image {k}" for k in range(12)]
    images: Images
    if kind == "encoded":
        (tmp_path / "images.bin").write_bytes(b"".join(data))
        offsets = np.cumsum([0, *map(len, data)], dtype=np.int64)
        images, name = EncodedImages(tmp_path / "images.bin", offsets, names, SIZE), "image 7"
    elif kind == "parquet":
        write_parquet(tmp_path / "a.parquet", data, 5)
        images = SourceImages(open_parquet(tmp_path / "a.parquet"), 10**6)
        name = f"{tmp_path}/a.parquet row 7"
    else:
        for k, each in enumerate(data):
            (tmp_path / f"{k:02}.png").write_bytes(each)
        images = SourceImages(FolderSource(LocalStorage(tmp_path), SIZE), 0)
        name = f"{tmp_path}/07.png"
    with pytest.raises(DataError, match=f"^{name}: not a readable JPEG or PNG"):
        images.gather(np.array([3, 7]))
    assert np.array_equal(images.gather(np.array([6, 8])), PIXELS[[6, 8]])


# --- splits -------------------------------------------------------------------------------------


def test_split_indexes_its_own_images(everywhere: dict[str, Images]) -> None:
    positions = np.array([1, 4, 5, 9, 10, 31, 38, 39, 50, 52])
    for images in everywhere.values():
        split = Split(images, positions)
        assert len(split) == 10
        for index in (np.array([9, 0, 3, 3]), np.array([], dtype=np.int64)):
            assert np.array_equal(split[index], PIXELS[positions[index]])
        for part in (slice(2, 7), slice(None), slice(8, 100), slice(None, None, -3)):
            assert np.array_equal(split[part], PIXELS[positions[part]])
        assert split.names == [images.names[k] for k in (1, 4, 5, 9, 10, 31, 38, 39, 50, 52)]
    assert Split(everywhere["mapped"], positions).names[-1] == "52"


def test_split_has_the_number_of_its_images_per_group(everywhere: dict[str, Images]) -> None:
    """The split has images of groups 0, 1, 3 and 5, with ten images each, and of no others."""
    for kind in ("mapped", "encoded", "parquet"):
        images = everywhere[kind]
        assert Split(images, np.array([1, 4, 5, 9, 10, 31, 38, 39, 50, 52])).groups == [4, 1, 3, 2]
        assert Split(images, np.arange(COUNT)).groups == [10] * 5 + [3]
        assert Split(images, np.arange(9, 11)).groups == [1, 1]
        assert Split(images, np.arange(0)).groups == []


# --- groups that are read as a whole ------------------------------------------------------------


class Fake(Source):
    """Groups of given sizes; image k is PIXELS[k] as a PNG file. Records every read."""

    group_access_only = True

    def __init__(self, lengths: Sequence[int]) -> None:
        edges = np.cumsum([0, *lengths]).tolist()
        self.groups = [range(a, b) for a, b in pairwise(edges)]
        self.size, self.names = SIZE, [f"image {k}" for k in range(edges[-1])]
        # Levels 0 and 9, and fewer grey levels in some images, give 150 to 300 bytes.
        self.data = [
            encoded(PIXELS[k % COUNT] // (1 + k % 3 * 60), 9 * (k % 2)) for k in range(edges[-1])
        ]
        self.native_splits = ["train"] * edges[-1]
        self.group_bytes = [self.bytes_of(group) for group in range(len(lengths))]
        self.order: list[int] = []

    def describe(self) -> dict:
        return {}

    def read(self, group: int, places: Sequence[int] | None = None) -> Iterator[Item]:
        assert places is None
        self.order.append(group)
        yield from (self.data[k] for k in self.groups[group])

    def bytes_of(self, group: int) -> int:
        return sum(len(self.data[k]) for k in self.groups[group])


def kept(images: SourceImages) -> dict[int, int]:
    """The size of every group in memory."""
    return {group: sum(map(len, future.result(0))) for group, future in images._kept.items()}


def test_memory_of_kept_groups_stays_below_the_limit() -> None:
    source = Fake([3, 9, 1, 6, 6, 12, 2, 4])
    sizes = [source.bytes_of(group) for group in range(8)]
    bound = max(sizes) + 1500
    images, random, most = SourceImages(source, bound), np.random.default_rng(1), 0
    for _ in range(200):
        images.gather(random.integers(0, 43, 3))
        real = kept(images)
        assert sum(real.values()) <= bound
        most = max(most, sum(real.values()))
    assert most > 0.9 * bound  # the limit is nearly reached
    assert images.reads == len(source.order) < 600
    assert len(set(source.order)) == 8


def test_group_above_the_limit_is_kept_alone() -> None:
    """It stays in memory until the next group replaces it."""
    source = Fake([5, 5, 5])
    images = SourceImages(source, 10)
    for group in (0, 1, 1, 2, 0, 0):
        images.gather(np.array([5 * group + 2]))
        assert kept(images) == {group: source.bytes_of(group)}
    assert source.order == [0, 1, 2, 0]


def test_most_recently_used_groups_are_kept() -> None:
    source = Fake([4] * 4)
    bound = sum(sorted(map(source.bytes_of, range(4)))[-2:])  # any two groups fit
    images = SourceImages(source, bound)
    for group in (0, 1, 0, 2, 0, 1, 3, 1):
        images.gather(np.array([4 * group, 4 * group + 3]))
    assert source.order == [0, 1, 2, 1, 3]
    assert set(kept(images)) == {1, 3}


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """A semaphore that every thread releases when it starts to wait for a group."""
    semaphore = threading.Semaphore(0)

    class Counting(Future):
        def result(self, timeout: float | None = None) -> list[Item]:
            semaphore.release()
            return super().result(timeout)

    monkeypatch.setattr(module, "Future", Counting)
    return semaphore


class BlockedSource(Fake):
    """Completes its first read when `others` threads wait for it, or raises `error` then."""

    def __init__(self, waiting: threading.Semaphore, others: int, error: Exception | None) -> None:
        super().__init__([6, 6])
        self.waiting, self.others, self.error = waiting, others, error

    def read(self, group: int, places: Sequence[int] | None = None) -> Iterator[Item]:
        items = list(super().read(group, places))
        if len(self.order) == 1:
            yield items.pop(0)
            for _ in range(self.others):
                assert self.waiting.acquire(timeout=20)
            if self.error:
                raise self.error
        yield from items


def ask(images: SourceImages, count: int) -> list[np.ndarray | Exception]:
    """The results of `count` threads, each of which reads one image of the first group."""
    results: list[np.ndarray | Exception] = [ValueError("no answer")] * count

    def work(k: int) -> None:
        try:
            results[k] = images.gather(np.array([k]))[0]
        except Exception as error:
            results[k] = error

    threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_threads_that_need_the_same_group_read_it_once(waiting: threading.Semaphore) -> None:
    source = BlockedSource(waiting, 5, None)
    images = SourceImages(source, 10**6)
    expected = [module.decode(data, SIZE, "") for data in source.data]
    for actual, wanted in zip(ask(images, 6), expected, strict=False):
        assert np.array_equal(actual, wanted)
    assert source.order == [0] and images.reads == 1
    assert kept(images) == {0: source.bytes_of(0)}


@pytest.mark.parametrize("error", [DataError("the network is down"), RuntimeError("bug")])
def test_read_error_reaches_all_waiting_threads_and_is_not_cached(
    waiting: threading.Semaphore, error: Exception
) -> None:
    source = BlockedSource(waiting, 5, error)
    images = SourceImages(source, 10**6)
    assert ask(images, 6) == [error] * 6
    assert source.order == [0] and kept(images) == {}
    wanted = module.decode(source.data[2], SIZE, "")
    assert np.array_equal(images.gather(np.array([2]))[0], wanted)
    assert source.order == [0, 0] and kept(images) == {0: source.bytes_of(0)}
    images.gather(np.array([3]))
    assert source.order == [0, 0]


def test_read_error_of_one_group_keeps_the_other_groups(waiting: threading.Semaphore) -> None:
    source = BlockedSource(waiting, 0, DataError("the network is down"))
    images = SourceImages(source, 10**6)
    with pytest.raises(DataError, match="the network is down"):
        images.gather(np.array([7, 1]))
    images.gather(np.array([7]))
    images.gather(np.array([7, 1]))
    assert source.order == [1, 1, 0]


def test_threads_read_correct_images_within_the_memory_limit() -> None:
    """Four threads with little memory read correct pixels and keep consistent records."""
    source = Fake([7] * 9)
    expected = np.stack([module.decode(data, SIZE, "") for data in source.data])
    images, wrong = SourceImages(source, 2 * max(map(source.bytes_of, range(9)))), []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(60):
            positions = random.integers(0, 63, 5)
            if not np.array_equal(images.gather(positions), expected[positions]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert sum(kept(images).values()) <= images.memory
    assert len(source.order) == images.reads > 9


# --- an epoch from parquet ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """263 images in 26 row groups of 10 and one of 3."""
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    write_parquet(path, [encoded(PIXELS[k % COUNT]) for k in range(263)])
    return path


def epoch(path: Path, count: int, buffer: int, world: int, workers: int = 0) -> tuple[int, list]:
    """Reads an epoch on W devices with minimal memory; returns the reads and the images."""
    reads, seen = 0, []
    for rank in range(world):
        source = open_parquet(path)
        largest = max(source.group_bytes)
        images = SourceImages(source, open_groups(count, buffer, world) * largest)
        split = Split(images, np.arange(263))
        order = partial(interleaved, groups=split.groups, streams=count, buffer=buffer)
        loader = Loader(
            split, "train", 4, seed=0, rank=rank, world=world, order=order, drop_last=False,
            workers=workers,
        )  # fmt: skip
        for batch in loader:
            index = batch["index"].numpy()
            assert np.array_equal(batch["image"].numpy(), PIXELS[index % COUNT])
            seen += index.tolist()
            if not workers:
                assert sum(kept(images).values()) <= images.memory
        assert sum(kept(images).values()) <= images.memory
        reads += images.reads
    return reads, sorted(seen)


@pytest.mark.parametrize(
    "count, buffer, world", [(1, 1, 1), (1, 3, 1), (2, 2, 1), (4, 1, 2), (4, 3, 4), (3, 2, 3)]
)
def test_interleaved_epoch_reads_each_group_about_once(
    parquet: Path, count: int, buffer: int, world: int
) -> None:
    """Only buffers that two streams share are read twice: at most k (L - 1) additional groups."""
    reads, seen = epoch(parquet, count, buffer, world)
    assert seen == list(range(263))
    assert 27 <= reads <= 27 + buffer * (count - 1)


def test_prefetching_threads_read_few_additional_groups(parquet: Path) -> None:
    """With three threads, the order of use differs slightly from that of the epoch."""
    reads, seen = epoch(parquet, 2, 2, 1, workers=3)
    assert seen == list(range(263))
    assert 27 <= reads <= 2 * 27


@pytest.mark.slow
def test_streaming_a_large_dataset_stays_within_the_memory_limit(tmp_path: Path) -> None:
    """275 MB of images are read with 27 MB, which include batches and reads.

    Without a limit, the same measurement shows the whole dataset in memory.
    """
    noise = np.random.default_rng(0).integers(0, 256, (20, 256, 256, 3), dtype=np.uint8)
    data = [encoded(image, 0) for image in noise] * 70
    path, bound = tmp_path / "large.parquet", 27_000_000
    write_parquet(path, data)
    try:
        assert path.stat().st_size > 10 * bound
        result = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("streaming_source.py")),
             str(path), "256", str(bound)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    finally:
        path.unlink()
    assert result.returncode == 0, result.stderr
    actual = json.loads(result.stdout)
    assert actual["sum"] == 70 * int(noise[:, 0, 0, 0].sum())  # every image came once
    assert 140 <= actual["reads"] <= 140 + 3
    assert 0.4 * bound < actual["kept"] <= bound
    assert actual["bounded"] - actual["before"] < bound
    assert actual["unbounded"] - actual["before"] > 10 * bound
