"""Sources, the packed cache and the data module, on files made here."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from diffusion_lab.data.cache import pack
from diffusion_lab.data.faces import draw_faces
from diffusion_lab.data.module import ImageDataModule, to_model
from diffusion_lab.data.source import (
    SPLITS,
    FacesSource,
    FolderSource,
    ParquetSource,
    Source,
    open_source,
    split_by_name,
)
from diffusion_lab.errors import ConfigError, DataError
from diffusion_lab.noise import KeyedGenerator, make_key
from diffusion_lab.tracking.grid import to_uint8

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
ALL_TRAIN = {"train": 1.0, "val": 0.0, "test": 0.0}


def pixels(seed: int, size: int = 8, channels: int = 3) -> np.ndarray:
    shape = (size, size, channels) if channels > 1 else (size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind)
    return buffer.getvalue()


def fill(folder: Path, names: list[str], size: int = 8) -> dict[str, np.ndarray]:
    """Writes one image a name, PNG or JPEG by its suffix; returns what Pillow reads from each."""
    result = {}
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
        path.write_bytes(encoded(pixels(sum(name.encode()), size), kind))
        result[name] = np.asarray(Image.open(path).convert("RGB"))
    return result


def read(source: Source) -> dict[str, np.ndarray]:
    """Every image by its name."""
    return {
        name: image
        for split in SPLITS
        for name, image in zip(source.items[split], source.read(split), strict=True)
    }


def only(tmp_path: Path, data: bytes, name: str = "a.png", size: int = 8) -> np.ndarray:
    """What a folder with one file gives."""
    folder = tmp_path / "one"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    (image,) = FolderSource(folder, size, ALL_TRAIN, 0).read("train")
    return image


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_gives_the_files_pixels(tmp_path: Path) -> None:
    names = ["a.png", "b.jpg", "c.JPEG", "deep/er/d.png", "deep/a.png"]
    expected = fill(tmp_path, names)
    (tmp_path / "notes.txt").write_text("no image")
    actual = read(open_source(str(tmp_path), 8, SHARES, 0))
    assert set(actual) == set(names)
    for name in names:
        assert actual[name].dtype == np.uint8 and np.array_equal(actual[name], expected[name])


def test_more_files_move_no_other_file(tmp_path: Path) -> None:
    fill(tmp_path, [f"{k}.png" for k in range(30)])
    before = FolderSource(tmp_path, 8, SHARES, 0).items
    fill(tmp_path, [f"new/{k}.png" for k in range(30)] + ["00.png"])
    after = FolderSource(tmp_path, 8, SHARES, 0).items
    assert all(len(before[split]) > 0 for split in SPLITS)
    for split in SPLITS:
        assert set(before[split]) <= set(after[split])
    assert sum(len(after[split]) for split in SPLITS) == 61
    (tmp_path / "3.png").unlink()
    fewer = FolderSource(tmp_path, 8, SHARES, 0).items
    for split in SPLITS:
        assert fewer[split] == [name for name in after[split] if name != "3.png"]


def test_shares_are_kept_and_another_seed_divides_otherwise() -> None:
    names = [str(k) for k in range(2000)]
    one = split_by_name(names, {"train": 6, "val": 2, "test": 2}, 0)
    assert one == split_by_name(names, SHARES, 0)  # normalised
    assert sorted((name for split in SPLITS for name in one[split]), key=int) == names
    for split in SPLITS:
        deviation = (2000 * SHARES[split] * (1 - SHARES[split])) ** 0.5
        assert abs(len(one[split]) - 2000 * SHARES[split]) < 4 * deviation
    both = set(one["test"]) & set(split_by_name(names, SHARES, 1)["test"])
    assert 45 < len(both) < 115  # 80 by chance
    assert split_by_name(names, ALL_TRAIN, 0)["train"] == names


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_are_converted(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(pixels(1)).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(pixels(2, channels=1)))
    buffer, kind = io.BytesIO(), "JPEG" if mode == "CMYK" else "PNG"
    image.save(buffer, format=kind)
    expected = np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
    actual = only(tmp_path, buffer.getvalue(), "a.jpg" if kind == "JPEG" else "a.png")
    assert np.array_equal(actual, expected)
    if mode == "L":
        assert np.array_equal(actual, np.repeat(np.asarray(image)[..., None], 3, axis=2))
    if mode == "RGBA":  # the colours are as they are written, whatever the transparency
        assert np.array_equal(actual, pixels(1))


def test_a_larger_square_is_resized_with_lanczos(tmp_path: Path) -> None:
    large = pixels(5, 21)
    actual = only(tmp_path, encoded(large))
    image = Image.fromarray(large)
    assert np.array_equal(actual, np.asarray(image.resize((8, 8), Image.Resampling.LANCZOS)))
    other = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert not np.array_equal(actual, other)


GOOD = encoded(pixels(0, 64))
BAD = {
    "corrupt": (b"\x89PNG\r\n\x1a\n" + bytes(range(200)), "not a readable"),
    "changed": (GOOD[:3000] + bytes(100) + GOOD[3100:], "not a readable"),
    "empty": (b"", "not a readable"),
    "truncated": (GOOD[: len(GOOD) // 2], "not a readable"),
    "truncated_jpeg": (encoded(pixels(0, 64), "JPEG")[:1500], "not a readable"),
    "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not a readable"),
    "gif": (encoded(pixels(0), "GIF"), "not a readable"),
    "small": (encoded(pixels(0, 7)), r"7x7 pixels do not make 8x8"),
    "wide": (encoded(pixels(0, 16)[:9]), r"16x9 pixels do not make 8x8"),
    "16-bit": (encoded(np.full((8, 8), 40000, dtype=np.uint16)), r"mode I;16 is not supported"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named(tmp_path: Path, kind: str) -> None:
    data, text = BAD[kind]
    with pytest.raises(DataError, match=text) as caught:
        only(tmp_path, data, f"bad-{kind}.png")
    assert str(tmp_path / "one" / f"bad-{kind}.png") in str(caught.value)


# --- parquet ------------------------------------------------------------------------------------


def write_parquet(path: Path, seeds: range, column: str = "image") -> None:
    rows = [{"bytes": encoded(pixels(k)), "path": f"{k}.png"} for k in seeds]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({column: pyarrow.array(rows, kind), "label": pyarrow.array(list(seeds))})
    pyarrow.parquet.write_table(table, path)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A set as the hub stores it; row k of all files in order shows pixels(k)."""
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    write_parquet(folder / "train-00000-of-00002.parquet", range(70))  # more than one batch
    write_parquet(folder / "train-00001-of-00002.parquet", range(70, 75))
    write_parquet(folder / "validation-00000-of-00001.parquet", range(75, 95))
    return folder.parent


def test_parquet_splits_are_the_sets_own(parquet: Path) -> None:
    source = open_source(str(parquet), 8, SHARES, 0)
    train = [f"train-00000-of-00002.parquet:{k}" for k in range(70)]
    train += [f"train-00001-of-00002.parquet:{k}" for k in range(5)]
    assert source.items["train"] == train
    validation = {f"validation-00000-of-00001.parquet:{k}" for k in range(20)}
    val, test = set(source.items["val"]), set(source.items["test"])
    assert val | test == validation and not val & test
    assert len(val) > 3 and len(test) > 3


def test_parquet_pixels_are_those_of_the_rows(parquet: Path) -> None:
    actual = read(open_source(str(parquet), 8, SHARES, 0))
    first = {"train-00000": 0, "train-00001": 70, "validation-00000": 75}
    assert len(actual) == 95
    for name, image in actual.items():
        file, row = name.split(":")
        seed = first[file.split("-of-")[0]] + int(row)
        assert np.array_equal(image, pixels(seed)), name


def test_one_parquet_file_is_divided_by_shares(parquet: Path) -> None:
    path = parquet / "data" / "train-00000-of-00002.parquet"
    source = open_source(str(path), 8, SHARES, 0)
    names = [name for split in SPLITS for name in source.items[split]]
    assert len(names) == len(set(names)) == 70
    assert all(len(source.items[split]) > 4 for split in SPLITS)
    for name, image in read(source).items():
        assert np.array_equal(image, pixels(int(name.split(":")[1])))


def test_a_test_split_of_the_sets_own_is_kept(parquet: Path) -> None:
    write_parquet(parquet / "data" / "test-00000-of-00001.parquet", range(95, 98))
    items = open_source(str(parquet), 8, SHARES, 0).items
    assert {split: len(items[split]) for split in SPLITS} == {"train": 75, "val": 20, "test": 3}


def test_plain_bytes_and_another_column(tmp_path: Path) -> None:
    data = pyarrow.array([encoded(pixels(k)) for k in range(3)], pyarrow.binary())
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"picture": data}), path)
    source = open_source(str(path), 8, ALL_TRAIN, 0, column="picture")
    for k, image in enumerate(source.read("train")):
        assert np.array_equal(image, pixels(k))
    with pytest.raises(DataError, match=r"x.parquet has no column 'image'; it has picture"):
        open_source(str(path), 8, ALL_TRAIN, 0)


def test_a_bad_row_or_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train-0.parquet"
    rows = [encoded(pixels(0)), b"<html>", None]
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(rows)}), path)
    images = ParquetSource([path], 8, ALL_TRAIN, 0).read("train")
    assert np.array_equal(next(images), pixels(0))
    with pytest.raises(DataError, match=r"train-0.parquet row 1: not a readable"):
        next(images)
    path.write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match=r"train-0.parquet: not a readable parquet file"):
        open_source(str(path), 8, ALL_TRAIN, 0)


def test_parquet_without_pyarrow_names_the_extra(parquet: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # its import then raises ImportError
    with pytest.raises(DataError, match=r"needs pyarrow; pip install 'diffusion-lab\[parquet\]'"):
        open_source(str(parquet), 8, SHARES, 0)


def test_files_of_one_name_in_two_folders_are_both_read(tmp_path: Path) -> None:
    for k, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        write_parquet(tmp_path / folder / "train-0.parquet", range(4 * k, 4 * k + 4))
    images = open_source(str(tmp_path), 8, ALL_TRAIN, 0).read("train")
    assert [int(i.astype(int).sum()) for i in images] == [
        int(pixels(k).astype(int).sum()) for k in range(8)
    ]


# --- what is not there --------------------------------------------------------------------------


def test_sources_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.source=\S*nowhere does not exist; .*faces"):
        open_source(str(tmp_path / "nowhere"), 8, SHARES, 0)
    (tmp_path / "text.txt").write_text("no image")
    with pytest.raises(DataError, match=r"holds no image \(.jpg, .jpeg or .png\)") as caught:
        open_source(str(tmp_path), 8, SHARES, 0)
    assert f"data.source={tmp_path}" in str(caught.value)


@pytest.mark.parametrize("text", ["hf://owner/name", "hf://datasets/name", "hf://datasets/a/b/c"])
def test_a_misspelt_hub_address_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"write hf://datasets/<owner>/<name>") as caught:
        open_source(text, 8, SHARES, 0)
    assert f"data.source={text} is not understood" in str(caught.value)


def test_an_unreachable_hub_names_the_way_around() -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE  # no test goes to the network
    address = "hf://datasets/diffusion-lab-tests/no-such-set@main"
    with pytest.raises(DataError, match=r"cannot be downloaded .*data.source=<folder>") as caught:
        open_source(address, 8, SHARES, 0)
    assert f"data.source={address}" in str(caught.value)


def test_hub_files_are_read_like_others(parquet: Path, monkeypatch) -> None:
    asked = {}

    def snapshot_download(name: str, **kwargs) -> str:
        asked.update(kwargs, name=name)
        return str(parquet)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    source = open_source("hf://datasets/owner/name@v1.2", 8, SHARES, 0)
    assert asked["name"] == "owner/name" and asked["revision"] == "v1.2"
    assert asked["repo_type"] == "dataset"
    assert source.items == open_source(str(parquet), 8, SHARES, 0).items
    assert source.describe()["source"] == "hf://datasets/owner/name@v1.2"


# --- faces --------------------------------------------------------------------------------------


def test_the_splits_of_the_faces_are_disjoint() -> None:
    source = open_source("faces", 8, {"train": 20, "val": 6, "test": 4}, 3)
    assert {split: len(source.items[split]) for split in SPLITS} == {
        "train": 20,
        "val": 6,
        "test": 4,
    }
    images = read(source)
    assert len(images) == 30  # 30 different names
    everything = np.stack(list(images.values()))
    assert np.array_equal(everything, draw_faces(torch.arange(30), seed=3, size=8).numpy())
    assert len({image.tobytes() for image in everything}) == 30


def test_faces_are_drawn_in_chunks(monkeypatch) -> None:
    monkeypatch.setattr(FacesSource, "CHUNK", 7)
    source = FacesSource(8, {"train": 20, "val": 0, "test": 1}, 0)
    images = np.stack(list(source.read("train")))
    assert np.array_equal(images, draw_faces(torch.arange(20), size=8).numpy())
    assert list(source.read("val")) == []


# --- the packed cache ---------------------------------------------------------------------------


def test_the_cache_holds_the_sources_images(tmp_path: Path) -> None:
    expected = fill(tmp_path / "in", [f"{k}.png" for k in range(12)])
    source = FolderSource(tmp_path / "in", 8, SHARES, 0)
    first = pack(source, tmp_path / "cache", progress=False)
    assert first.names == source.items
    for split in SPLITS:
        assert len(first.images[split]) == len(first.names[split])
        for name, image in zip(first.names[split], first.images[split], strict=True):
            assert np.array_equal(image, expected[name])
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.fingerprint]


def test_a_reopened_cache_is_the_first_and_reads_no_image(tmp_path: Path, monkeypatch) -> None:
    fill(tmp_path / "in", [f"{k}.png" for k in range(12)])
    first = pack(FolderSource(tmp_path / "in", 8, SHARES, 0), tmp_path / "cache", progress=False)
    monkeypatch.setattr(FolderSource, "read", None)
    second = pack(FolderSource(tmp_path / "in", 8, SHARES, 0), tmp_path / "cache", progress=False)
    assert second.fingerprint == first.fingerprint and second.names == first.names
    for split in SPLITS:
        assert np.array_equal(first.images[split], second.images[split])


@pytest.mark.parametrize("kind", ["truncated", "html", "small"])
def test_nothing_is_left_of_a_cache_that_failed(tmp_path: Path, kind: str) -> None:
    fill(tmp_path / "in", [f"{k}.png" for k in range(6)])
    bad = tmp_path / "in" / "4.png"
    bad.write_bytes(BAD[kind][0])
    source = FolderSource(tmp_path / "in", 8, ALL_TRAIN, 0)
    with pytest.raises(DataError, match=r"in/4\.png"):
        pack(source, tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []
    fill(tmp_path / "in", ["4.png"])  # mended, it works
    source = FolderSource(tmp_path / "in", 8, ALL_TRAIN, 0)
    assert len(pack(source, tmp_path / "cache", progress=False).images["train"]) == 6


def test_a_file_that_vanished_is_not_called_a_full_disk(tmp_path: Path) -> None:
    fill(tmp_path / "in", [f"{k}.png" for k in range(6)])
    source = FolderSource(tmp_path / "in", 8, ALL_TRAIN, 0)
    description = source.describe()
    source.describe = lambda: description
    (tmp_path / "in" / "4.png").unlink()
    with pytest.raises(DataError, match=r"in/4\.png"):
        pack(source, tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "garbage": lambda path: path.write_bytes(b"garbage" * 100),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["images.npy", "meta.json"])
def test_a_damaged_cache_is_named(tmp_path: Path, kind: str, name: str) -> None:
    source = FacesSource(8, {"train": 4, "val": 2, "test": 2}, 0)
    cache = pack(source, tmp_path, progress=False)
    del cache.images["train"]
    DAMAGE[kind](tmp_path / cache.fingerprint / name)
    with pytest.raises(DataError, match=r"is damaged .*remove that directory") as caught:
        pack(source, tmp_path, progress=False)
    assert str(tmp_path / cache.fingerprint) in str(caught.value)


def test_what_decides_the_pixels_decides_the_fingerprint(tmp_path: Path) -> None:
    fill(tmp_path / "in", [f"{k}.png" for k in range(6)], size=16)

    def fingerprint(size: int = 8, seed: int = 0) -> str:
        source = FolderSource(tmp_path / "in", size, SHARES, seed)
        return pack(source, tmp_path / "cache", progress=False).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    prints = {first, fingerprint(size=16), fingerprint(seed=1)}
    path = tmp_path / "in" / "2.png"
    path.write_bytes(encoded(pixels(99, 16)))
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    prints.add(fingerprint())
    fill(tmp_path / "in", ["7.png"], size=16)
    prints.add(fingerprint())
    assert len(prints) == 5
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_a_cache_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = FacesSource(8, {"train": 4, "val": 2, "test": 2}, 0)
    with pytest.raises(DataError, match=r"data.cache_dir=\S*file/cache cannot be written"):
        pack(source, tmp_path / "file" / "cache", progress=False)


# --- the data module ----------------------------------------------------------------------------


def test_to_model_is_exact_and_comes_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    images = levels.reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    x_0 = to_model(images)
    assert x_0.dtype == torch.float32 and x_0.shape == (1, 3, 16, 16)
    exact = np.arange(256, dtype=np.float64) / 127.5 - 1
    for channel in x_0[0]:
        assert np.abs(channel.flatten().double().numpy() - exact).max() < 1.2e-7
        assert torch.equal(to_uint8(channel).flatten(), levels)
    assert float(x_0.min()) == -1 and float(x_0.max()) == 1
    assert float(x_0[0, 0, 0, 0]) == -1 and float(x_0[0, 2, 15, 15]) == 1


def test_to_model_puts_height_width_and_channels_in_their_places() -> None:
    images = torch.from_numpy(np.stack([pixels(1), pixels(2)]))
    x_0 = to_model(images)
    for b, c, i, j in ((0, 0, 1, 5), (1, 2, 7, 0), (1, 1, 3, 4)):
        assert int(to_uint8(x_0[b, c])[i, j]) == int(images[b, i, j, c])


def make_data(tmp_path: Path, **kwargs) -> ImageDataModule:
    kwargs = {
        "source": "faces",
        "size": 8,
        "batch_size": 16,
        "splits": {"train": 64, "val": 16, "test": 16},
        "cache_dir": str(tmp_path / "cache"),
        **kwargs,
    }
    data = ImageDataModule(**kwargs)
    data.prepare_data()
    return data


def test_flips_are_decided_by_the_key_and_mirror_left_to_right(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    data.setup("fit")
    decisions = []
    for batch in data.train_dataloader():
        mirrored = KeyedGenerator(make_key(batch["key"], "flip")).uniform() < 0.5
        plain = batch["image"].clone()
        assert not torch.equal(plain, plain.flip(2))
        x_0 = data.on_after_batch_transfer(batch, 0)["x_0"]
        assert "image" not in batch
        for k in range(len(x_0)):
            expected = plain[k].permute(2, 0, 1)
            expected = expected.flip(-1) if mirrored[k] else expected
            assert torch.equal(to_uint8(x_0[k]), expected)
        decisions += mirrored.tolist()
    assert len(decisions) == 64 and 16 < sum(decisions) < 48


def test_nothing_is_flipped_in_validation_and_test_or_when_told(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    data.setup("fit")
    still = make_data(tmp_path, flip=False)
    still.setup("fit")
    loaders = [data.val_dataloader(), data.test_dataloader(), still.train_dataloader()]
    for module, loader in zip((data, data, still), loaders, strict=True):
        for batch in loader:
            expected = batch["image"].permute(0, 3, 1, 2)
            assert torch.equal(to_uint8(module.on_after_batch_transfer(batch, 0)["x_0"]), expected)


def test_the_loaders_are_of_their_splits(tmp_path: Path) -> None:
    data = make_data(tmp_path, split_seed=5)
    data.setup("fit")
    faces = draw_faces(torch.arange(96), seed=5, size=8)
    for loader, split, first in (
        (data.train_dataloader(), "train", 0),
        (data.val_dataloader(), "val", 64),
        (data.test_dataloader(), "test", 80),
    ):
        batches = list(loader)
        index = torch.cat([batch["index"] for batch in batches])
        images = torch.cat([batch["image"] for batch in batches])
        assert all(batch["split"] == split for batch in batches)
        assert torch.equal(images, faces[first + index])
        assert sorted(index.tolist()) == list(range(64 if split == "train" else 16))
        assert (index.tolist() != sorted(index.tolist())) == (split == "train")


def test_too_few_images_are_named(tmp_path: Path) -> None:
    data = make_data(tmp_path, batch_size=65)
    with pytest.raises(ConfigError, match=r"data.batch_size=65 .*64 training images .*faces"):
        data.setup("fit")
    data = make_data(tmp_path, splits={"train": 64, "val": 0, "test": 16})
    data.setup("test")
    with pytest.raises(DataError, match=r"data.source=faces leaves no image for the val split"):
        data.setup("fit")
