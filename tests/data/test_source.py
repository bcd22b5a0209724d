"""Image sources: listed images, splits, classes and pixels."""

import hashlib
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from image_fixtures import SHARES, encoded, fill, pixels, write_parquet

from diffusion_lab.data.decode import decode
from diffusion_lab.data.faces import draw_faces
from diffusion_lab.data.faces_source import FacesSource
from diffusion_lab.data.folder_source import FolderSource
from diffusion_lab.data.parquet_source import ParquetSource
from diffusion_lab.data.registry import open_source
from diffusion_lab.data.source import Source
from diffusion_lab.data.splits import SPLITS, split_images
from diffusion_lab.data.storage import LocalStorage
from diffusion_lab.errors import DataError
from diffusion_lab.rng import make_key


def read(source: Source) -> dict[str, np.ndarray | DataError]:
    """Every image by its name."""
    items = [item for number in range(len(source.groups)) for item in source.read(number)]
    assert len(items) == len(source.names) == len(set(source.names)) == len(source.native_splits)
    return {
        name: decode(item, source.size, name) if isinstance(item, bytes) else item
        for name, item in zip(source.names, items, strict=True)
    }


def check_groups(source: Source, length: int | None = None) -> None:
    """Checks that the groups cover the images in order, and that places of a group can be read."""
    edges = [0] + [group.stop for group in source.groups]
    assert source.groups == [range(a, b) for a, b in pairwise(edges)]
    assert edges[-1] == len(source.names)
    if length:
        assert {len(group) for group in source.groups[:-1]} <= {length}
    for number in range(len(source.groups)):
        whole = list(source.read(number))
        places = [len(whole) - 1, 0, len(whole) // 2]
        for place, item in zip(places, source.read(number, places), strict=True):
            assert np.array_equal(item, whole[place])
        assert list(source.read(number, [])) == []


def opened(path: Path | str, size: int = 8, **options) -> Source:
    return open_source(str(path), size, SHARES, **options)


# --- folders ------------------------------------------------------------------------------------


def test_folder_returns_the_pixels_of_its_files(tmp_path: Path) -> None:
    names = ["a.png", "b.jpg", "c.JPEG", "deep/er/d.PNG", "deep/a.png", "ä b.png"]
    expected = fill(tmp_path, names)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    source = opened(tmp_path)
    assert source.names == sorted(names)
    for name, image in read(source).items():
        assert np.array_equal(image, expected[name]), name
        assert source.location(source.names.index(name)) == f"{tmp_path}/{name}"


def test_folder_is_read_in_groups(tmp_path: Path, monkeypatch) -> None:
    fill(tmp_path, [f"{k}.png" for k in range(10)])
    monkeypatch.setattr(FolderSource, "CHUNK", 4)
    source = opened(tmp_path)
    assert [len(group) for group in source.groups] == [4, 4, 2] and not source.group_access_only
    check_groups(source, 4)


SPLIT_FOLDERS = {
    "train": ("train", "Train", "TRAINING", "train2017", "trainA", "DIV2K_train_HR", "x/train"),
    "val": ("val", "valid", "Validation", "dev", "val_256", "DIV2K_valid_HR", "images/val"),
    "test": ("test", "Testing", "test-images", "eval", "evaluation", "bottle/test/broken"),
}


def test_folders_named_after_splits_are_splits(tmp_path: Path) -> None:
    splits = {
        f"{folder}/{split}.png": split for split in SPLITS for folder in SPLIT_FOLDERS[split]
    }
    splits |= {"train/val/b.png": "train", "val/x train/c.png": "val"}  # the outermost decides
    fill(tmp_path, list(splits))
    source = opened(tmp_path)
    assert dict(zip(source.names, source.native_splits, strict=True)) == splits


@pytest.mark.parametrize(
    "folder",
    ["", "trainer", "tests", "contest", "value", "devices", "trainval", "train_val", "latest"],
)
def test_other_folders_are_no_splits(tmp_path: Path, folder: str) -> None:
    fill(tmp_path, [f"{folder}/a.png".lstrip("/"), f"{folder}/test.png".lstrip("/")])
    assert opened(tmp_path).native_splits == ["train", "train"]


def test_images_in_no_split_beside_splits_are_an_error(tmp_path: Path) -> None:
    fill(tmp_path, ["train/cat/1.png", "train/dog/2.png", "valid/cat/3.png", "extra/4.png"])
    fill(tmp_path, ["5.png", "extra/deep/test.png"])
    source = opened(tmp_path)
    with pytest.raises(DataError) as caught:
        split_images(source.names, source.native_splits, SHARES, 0)
    assert str(caught.value) == (
        "data.source has images in splits: train (2), valid (1); and others in no split: . (1), "
        "extra (1), extra/deep (1). Name each folder or parquet file train, val or test, move "
        "the others out of data.source, or set data.split=all to divide all images by data.splits"
    )
    everything = split_images(source.names, source.native_splits, SHARES, 0, "all")
    for split, each in split_images(source.names, ["train"] * 6, SHARES, 0).items():
        assert np.array_equal(everything[split], each)


def test_class_of_a_file_is_its_folder_without_the_split(tmp_path: Path) -> None:
    files = {
        "train/cat/1.png": "cat", "val/cat/2.png": "cat", "val/dog/3.png": "dog",
        "cat/test/4.png": "cat", "test/cat/big/5.png": "cat/big", "train/6.png": "",
    }  # fmt: skip
    fill(tmp_path, list(files))
    source = opened(tmp_path)
    names, index = source.labels("folder")
    assert names == ["", "cat", "cat/big", "dog"]
    assert [names[k] for k in index] == [files[name] for name in source.names]


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg", "b/c.png", "._a.jpg", "b/._c.png", ".cache/d.png", ".e/f/g.png"])
    assert opened(tmp_path).names == ["a.jpg", "b/c.png"]
    fill(tmp_path / ".hidden", ["x.png"])
    assert opened(tmp_path / ".hidden").names == ["x.png"]  # the user named this folder


def test_deleted_file_is_an_error_for_that_image_only(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png", "b.png", "c.png"])
    source = opened(tmp_path)
    (tmp_path / "b.png").unlink()
    first, second, third = source.read(0)
    assert (first, third) == tuple((tmp_path / f"{k}.png").read_bytes() for k in "ac")
    assert isinstance(second, DataError)
    assert str(second) == f"{tmp_path}/b.png: cannot be read (No such file or directory)"


def test_single_file_is_a_source(tmp_path: Path) -> None:
    expected = fill(tmp_path, ["a.png", "b.png"])
    source = opened(tmp_path / "b.png")
    assert source.names == ["b.png"]
    assert np.array_equal(read(source)["b.png"], expected["b.png"])


def test_description_of_a_folder_has_sizes_and_times_of_its_files(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png", "b.png"])
    stat = (tmp_path / "a.png").stat()
    description = opened(tmp_path).describe()
    assert description["source"] == str(tmp_path) and description["size"] == 8
    assert description["files"]["a.png"] == [stat.st_size, stat.st_mtime_ns]
    assert list(description["files"]) == ["a.png", "b.png"]


# --- links and files that are not used ----------------------------------------------------------


def test_links_inside_the_source_are_followed(tmp_path: Path) -> None:
    images = fill(tmp_path / "in", ["all/a.png", "all/deep/b.png"])
    (tmp_path / "in" / "train").symlink_to("all")
    (tmp_path / "in" / "all" / "c.png").symlink_to("a.png")
    source = opened(tmp_path / "in")
    assert source.names == [
        f"{folder}/{name}"
        for folder in ("all", "train")
        for name in ("a.png", "c.png", "deep/b.png")
    ]
    assert np.array_equal(read(source)["train/deep/b.png"], images["all/deep/b.png"])
    assert not source.ignored


def test_links_to_other_folders_need_a_declared_root(tmp_path: Path) -> None:
    fill(tmp_path, ["elsewhere/a.png", "in/val/b.png"])
    (tmp_path / "in" / "train").symlink_to(tmp_path / "elsewhere")
    source = opened(tmp_path / "in")
    assert source.names == ["val/b.png"] and source.native_splits == ["val"]
    elsewhere = tmp_path / "elsewhere"
    assert source.ignored == {f"link train to {elsewhere}, which needs data.link_root": 1}
    for root in (elsewhere, tmp_path):
        source = opened(tmp_path / "in", link_root=str(root))
        assert source.names == ["train/a.png", "val/b.png"] and not source.ignored
        assert source.native_splits == ["train", "val"] and len(read(source)) == 2
    (tmp_path / "in" / "val" / "b.png").unlink()
    with pytest.raises(DataError, match=r"holds no image .*, only: 1 link train to .*link_root"):
        opened(tmp_path / "in")


def test_links_in_a_circle_and_broken_links_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, ["a/1.png", "b/2.png"])
    for name, target in (
        ("a/up", ".."), ("a/self", "."), ("a/b", "../b"), ("b/a", "../a"), ("gone", "nowhere"),
        ("x", "y"), ("y", "x"),
    ):  # fmt: skip
        (tmp_path / name).symlink_to(target)
    source = opened(tmp_path)
    assert source.names == ["a/1.png", "a/b/2.png", "b/2.png", "b/a/1.png"]
    assert source.ignored["broken link"] == 3
    assert source.ignored["link a/up to a folder that contains it"] == 1


def test_snapshot_of_the_hub_may_link_to_its_blobs(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc" / "x"
    images = fill(blobs, ["a.png"])
    write_parquet(blobs / "rows", rows(range(2)))
    snapshot.mkdir(parents=True)
    (snapshot / "1.png").symlink_to("../../../blobs/a.png")
    assert np.array_equal(read(opened(snapshot))["1.png"], images["a.png"])
    assert opened(snapshot.parent).names == ["x/1.png"]
    (snapshot / "train.parquet").symlink_to("../../../blobs/rows")
    assert len(read(opened(snapshot))) == 2
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "train.parquet").symlink_to(blobs / "rows")
    with pytest.raises(DataError, match=r"a symbolic link to .*rows, outside data.source="):
        opened(outside)


def test_ignored_files_are_counted_by_suffix(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png", "._a.png", ".git/b.png"])
    for name in ("1.webp", "2.WEBP", "3.webp", "notes.txt", "README"):
        (tmp_path / name).touch()
    expected = {".webp": 3, "hidden": 2, ".txt": 1, "without suffix": 1}
    assert opened(tmp_path).ignored == expected
    write_parquet(tmp_path / "train.parquet", rows(range(2)))
    assert opened(tmp_path).ignored == {**expected, ".png": 1}
    (tmp_path / "a.png").unlink()
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"holds no image .*, only: 3 .webp, 2 hidden, 1 .txt, 1"):
        opened(tmp_path)


# --- parquet ------------------------------------------------------------------------------------


def test_metadata_beside_images_is_no_source_of_images(tmp_path: Path) -> None:
    """As in folders of images on the hub."""
    fill(tmp_path, ["a.png"])
    table = pyarrow.table({"file_name": ["a.png"], "text": ["a cat"]})
    pyarrow.parquet.write_table(table, tmp_path / "metadata.parquet")
    source = opened(tmp_path)
    assert source.names == ["a.png"] and source.ignored == {".parquet": 1}
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    text = "its columns are file_name, text; none of them holds images; if the images are files"
    with pytest.raises(DataError, match=text):
        opened(tmp_path)


@pytest.mark.parametrize("column", ["label", "text", "struct"])
def test_column_without_images_is_an_error(tmp_path: Path, column: str) -> None:
    table = {
        "image": rows(range(2)), "label": [1, 2], "text": ["a", "b"],
        "struct": [{"path": "a"}] * 2,
        "large": pyarrow.array(rows(range(2)), pyarrow.large_binary()),
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    with pytest.raises(DataError) as caught:
        opened(tmp_path, image_column=column)
    text = f"x.parquet has column {column!r} of type "
    assert text in str(caught.value) and "set data.image_column to image or large" in str(
        caught.value
    )
    assert len(read(opened(tmp_path, image_column="large"))) == 2


def rows(seeds: range) -> list[bytes]:
    return [encoded(pixels(k)) for k in seeds]


FIRST = {"train-00000-of-00002": 0, "train-00001-of-00002": 70, "validation-00000-of-00001": 75}


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A dataset as the hub stores it; row k over all files shows pixels(k)."""
    folder = tmp_path / "set" / "data"
    write_parquet(folder / "train-00000-of-00002.parquet", rows(range(70)), group=66)
    write_parquet(folder / "train-00001-of-00002.parquet", rows(range(70, 75)))
    write_parquet(folder / "validation-00000-of-00001.parquet", rows(range(75, 95)), group=8)
    return folder.parent


def test_parquet_rows_are_images_named_by_file_and_row(parquet: Path) -> None:
    source = opened(parquet)
    images = read(source)
    for k, name in enumerate(source.names):
        file, row = name.split(":")
        assert k == FIRST[file.removesuffix(".parquet")] + int(row)
        assert np.array_equal(images[name], pixels(k)), name
        assert source.location(k) == f"{parquet}/data/{file} row {row}"
    assert len(images) == 95
    assert source.native_splits == ["train"] * 75 + ["val"] * 20


def test_parquet_groups_are_row_groups(parquet: Path) -> None:
    source = opened(parquet)
    assert [len(group) for group in source.groups] == [
        66,
        4,
        5,
        8,
        8,
        4,
    ] and source.group_access_only
    check_groups(source)
    sizes = [sum(map(len, source.read(number))) for number in range(6)]
    for known, images in zip(source.group_bytes, sizes, strict=True):
        assert images < known < 1.5 * images + 1000  # plus the paths and labels


def test_image_names_do_not_depend_on_the_location(parquet: Path) -> None:
    assert opened(parquet).names == opened(parquet / "data").names
    single = opened(parquet / "data" / "train-00001-of-00002.parquet")
    assert single.names == [f"train-00001-of-00002.parquet:{row}" for row in range(5)]
    assert np.array_equal(read(single)[single.names[3]], pixels(73))


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("data/test-00000-of-00001.parquet", "test"),
        ("val.parquet", "val"),
        ("validation_1.parquet", "val"),
        ("test/0000.parquet", "test"),
        ("default/validation/0000.parquet", "val"),
        ("Valid/0.parquet", "val"),
        ("celeba-dev-0.parquet", "val"),
        ("my-test.parquet", "test"),
        ("test/train-0.parquet", "test"),
        ("trainer.parquet", "none"),
        ("tests/0.parquet", "none"),
        ("latest/0.parquet", "none"),
    ],
)
def test_parquet_file_names_determine_the_split(tmp_path: Path, file: str, own: str) -> None:
    write_parquet(tmp_path / "x" / file, rows(range(2)))
    write_parquet(tmp_path / "x" / "train.parquet", rows(range(1)))
    source = opened(tmp_path / "x")
    assert dict(zip(source.names, source.native_splits, strict=True)) == {
        "train.parquet:0": "train",
        f"{file}:0": own,
        f"{file}:1": own,
    }
    if own == "none":
        with pytest.raises(DataError, match=rf"train.parquet \(1\).* no split: {file} \(2\)\."):
            split_images(source.names, source.native_splits, SHARES, 0)


def test_split_of_a_common_folder_is_kept(tmp_path: Path) -> None:
    """Names are relative to the common folder; splits are not."""
    write_parquet(tmp_path / "test" / "0.parquet", rows(range(2)))
    source = opened(tmp_path)
    assert source.names == ["0.parquet:0", "0.parquet:1"]
    assert source.native_splits == ["test", "test"]


def test_files_with_equal_names_in_two_folders_are_both_read(tmp_path: Path) -> None:
    for k, folder in enumerate("ab"):
        write_parquet(tmp_path / folder / "train-0.parquet", rows(range(4 * k, 4 * k + 4)))
    images = read(opened(tmp_path))
    assert list(images) == [
        f"{folder}/train-0.parquet:{row}" for folder in "ab" for row in range(4)
    ]
    for k, image in enumerate(images.values()):
        assert np.array_equal(image, pixels(k))


def test_parquet_with_plain_bytes_and_another_column(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, rows(range(3)), plain=True, column="picture")
    source = opened(path, image_column="picture")
    assert list(source.read(0)) == rows(range(3))
    with pytest.raises(DataError) as caught:
        opened(path)
    text = (
        f"{path} has no column 'image'; its columns are picture, label; set data.image_column to "
        "picture"
    )
    assert str(caught.value) == text


def test_bad_row_is_returned_like_others(tmp_path: Path) -> None:
    path = tmp_path / "train-0.parquet"
    write_parquet(path, [rows(range(1))[0], b"<html>", None], plain=True)
    source = opened(path)
    assert list(source.read(0)) == [rows(range(1))[0], b"<html>", b""]
    assert source.location(2) == f"{path} row 2"
    write_parquet(path, [None, b"<html>"])
    assert list(opened(path).read(0)) == [b"", b"<html>"]


def test_damaged_row_group_loses_only_the_unreadable_rows(tmp_path: Path) -> None:
    """Row groups have 100 rows, read in batches of 64. The last batch of group 1 is damaged."""
    path, data = tmp_path / "train-0.parquet", rows(range(300))
    write_parquet(path, data, group=100)
    content = bytearray(path.read_bytes())
    place = content.index(data[190])  # a value begins with its length
    content[place - 4 : place] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    source = opened(path)
    assert list(source.read(0)) == data[:100] and list(source.read(2)) == data[200:]
    items = list(source.read(1))
    assert items[:64] == data[100:164] and len(items) == 100
    for error in items[64:]:
        assert isinstance(error, DataError)
        start = f"{path}: row group 1 cannot be read from row 64 on ("
        assert str(error).startswith(start) and str(error).endswith("); download the file again")
    (good, bad) = source.read(1, [63, 64])
    assert good == data[163] and isinstance(bad, DataError)


def test_truncated_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train-0.parquet"
    write_parquet(path, rows(range(5)))
    whole = path.read_bytes()
    for content in (whole[:-10], b"PAR1 cut off", b""):
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=f"^{path}: not a readable parquet file .*download it ag"
        ):
            opened(path)
    path.write_bytes(whole)
    source = opened(path)
    path.unlink()
    errors = list(source.read(0))
    assert len(errors) == 5
    assert all(str(e).startswith(f"{path}: row group 0 cannot be read from row 0") for e in errors)


def test_missing_pyarrow_is_an_error_that_names_the_extra(parquet: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # the import raises ImportError
    with pytest.raises(DataError, match=r"needs pyarrow; pip install 'diffusion-lab\[parquet\]'"):
        opened(parquet)
    monkeypatch.setitem(sys.modules, "pyarrow.fs", None)
    with pytest.raises(DataError, match=r"data.source=s3://a/b needs pyarrow; pip install 'diff"):
        opened("s3://a/b")


# --- missing sources ----------------------------------------------------------------------------


def test_missing_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.source=\S*nowhere does not exist; .*faces"):
        opened(tmp_path / "nowhere")
    (tmp_path / "text.txt").write_text("no image")
    with pytest.raises(DataError, match=r"holds no image \(.jpg, .jpeg or .png\)") as caught:
        opened(tmp_path)
    assert str(caught.value).startswith(f"data.source={tmp_path} ")
    with pytest.raises(DataError, match=r"holds no parquet file") as caught:
        ParquetSource(LocalStorage(tmp_path), 8)
    assert str(caught.value).startswith(f"data.source={tmp_path} ")


@pytest.mark.parametrize(
    "text",
    [
        "hf://owner/name",
        "hf://datasets/name",
        "hf://datasets/a/b/c",
        "hf://datasets/a/b@",
        "hf://",
    ],
)
def test_misspelt_hub_address_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match=r"it must be hf://datasets/<owner>/<name>") as caught:
        opened(text)
    assert str(caught.value).startswith(f"data.source={text} is not allowed; ")


@pytest.mark.parametrize("text", ["s3://", "s3:///a", "s3://bucket/a?colour=red"])
def test_misspelt_bucket_is_an_error(text: str) -> None:
    with pytest.raises(DataError) as caught:
        opened(text)
    assert str(caught.value).startswith(f"data.source={text} cannot be opened (")


@pytest.mark.parametrize("download", [True, False])
def test_unreachable_hub_is_an_error_with_a_workaround(download: bool) -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE  # tests do not use the network
    address = "hf://datasets/diffusion-lab-tests/no-such-set@main"
    with pytest.raises(DataError, match=r"cannot be downloaded \(.+\).*=<folder>") as caught:
        opened(address, download=download)
    assert str(caught.value).startswith(f"data.source={address} ")
    assert "\n" not in str(caught.value)


def test_missing_huggingface_hub_is_an_error_that_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"needs huggingface_hub; pip install 'diffusion-lab\[par"):
        opened("hf://datasets/owner/name")


# --- hub ----------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(parquet: Path, tmp_path: Path, monkeypatch) -> list[tuple]:
    """A fake hub with the dataset; returns the list of requests."""
    asked = []
    remote = tmp_path / "hub"
    root = remote / "datasets" / f"owner/name@{COMMIT}"
    root.parent.mkdir(parents=True)
    parquet.rename(root)
    snapshot = tmp_path / "snapshots" / COMMIT
    snapshot.parent.mkdir()
    snapshot.symlink_to(root)

    def snapshot_download(name: str, *, repo_type: str, revision: str, allow_patterns: str) -> str:
        asked.append((repo_type, name, revision, allow_patterns))
        return str(snapshot)

    class Api:
        def dataset_info(self, name: str, revision: str) -> SimpleNamespace:
            asked.append((name, revision))
            return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    files = DirFileSystem(path=str(remote), fs=LocalFileSystem())
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: files)
    return asked


def test_hub_dataset_is_the_same_downloaded_or_streamed(hub: list[tuple]) -> None:
    address = "hf://datasets/owner/name@v1.2"
    downloaded, streamed = (opened(address, download=download) for download in (True, False))
    assert hub == [("dataset", "owner/name", "v1.2", "*.parquet"), ("owner/name", "v1.2")]
    for source in (downloaded, streamed):
        images = list(read(source).values())
        assert len(images) == 95
        assert all(np.array_equal(image, pixels(k)) for k, image in enumerate(images))
        assert source.native_splits == ["train"] * 75 + ["val"] * 20
    assert downloaded.names == streamed.names and downloaded.groups == streamed.groups
    file = "data/validation-00000-of-00001.parquet row 2"
    assert streamed.location(77) == downloaded.location(77) == f"{address}/{file}"


def test_hub_files_are_described_by_their_commit(hub: list[tuple], tmp_path: Path) -> None:
    """A new download changes modification times, but not the description."""
    before = opened("hf://datasets/owner/name").describe()
    assert hub == [("dataset", "owner/name", None, "*.parquet")]
    assert before["source"] == "hf://datasets/owner/name" and len(before["files"]) == 3
    assert {version for _, version in before["files"].values()} == {COMMIT}
    for path in (tmp_path / "hub").rglob("*.parquet"):
        path.touch()
    assert opened("hf://datasets/owner/name").describe() == before
    assert opened("hf://datasets/owner/name", download=False).describe() == before


# --- faces --------------------------------------------------------------------------------------


def test_splits_of_the_faces_are_disjoint() -> None:
    source = open_source("faces", 8, {"train": 20, "val": 6, "test": 4}, 3)
    assert source.native_splits == ["train"] * 20 + ["val"] * 6 + ["test"] * 4
    assert source.names == [f"face {k}" for k in range(30)]
    everything = np.stack(list(read(source).values()))
    assert np.array_equal(everything, draw_faces(torch.arange(30), seed=3, size=8).numpy())
    assert len({image.tobytes() for image in everything}) == 30


def test_faces_are_drawn_in_chunks(monkeypatch) -> None:
    monkeypatch.setattr(FacesSource, "CHUNK", 7)
    source = FacesSource(8, {"train": 20, "val": 0, "test": 1}, 0)
    assert [len(group) for group in source.groups] == [7, 7, 7]
    check_groups(source, 7)
    everything = np.stack(list(read(source).values()))
    assert np.array_equal(everything, draw_faces(torch.arange(21), size=8).numpy())


# --- splits -------------------------------------------------------------------------------------

ALL_TRAIN = {"train": 1.0, "val": 0.0, "test": 0.0}
NAMES = [f"{k}.png" for k in range(300)]


def fractions(names: list[str], seed: int) -> list[float]:
    """A number in [0, 1) for each name, computed one key at a time."""
    return [int(make_key(seed, "split", name)) % 2**53 / 2**53 for name in names]


def by_hand(names: list[str], splits: tuple[str, ...], shares: dict, seed: int) -> dict:
    """The names in each split."""
    total = sum(shares[split] for split in splits)
    edges = np.cumsum([0.0] + [shares[split] / total for split in splits])
    edges[-1] = 1
    return {
        split: [n for n, u in zip(names, fractions(names, seed), strict=True) if a <= u < b]
        for split, a, b in zip(splits, edges, edges[1:], strict=False)
    }


def named(own: list[str], split: str | None = None, shares: dict = SHARES, seed: int = 0) -> dict:
    """The names in each split by `split_images`; every position occurs at most once, in order."""
    names = NAMES[: len(own)]
    places = split_images(names, own, shares, seed, split)
    assert tuple(places) == SPLITS
    for each in places.values():
        assert each.dtype == np.int64 and each.tolist() == sorted(set(each.tolist()))
    return {k: [names[place] for place in each] for k, each in places.items()}


def test_single_training_split_is_divided_by_a_hash_of_the_names() -> None:
    for seed in (0, 7):
        for shares in (SHARES, {"train": 90, "val": 5, "test": 5}):
            expected = by_hand(NAMES, SPLITS, shares, seed)
            assert named(["train"] * 300, None, shares, seed) == expected
    lengths = [len(names) for names in named(["train"] * 300).values()]
    # These numbers must not change, because runs refer to their splits.
    assert lengths == [174, 63, 63]
    assert named(["train"] * 300)["test"][:5] == ["1.png", "13.png", "15.png", "16.png", "20.png"]


OWN = ["train"] * 200 + ["val"] * 60 + ["test"] * 40


def test_three_native_splits_are_kept() -> None:
    assert named(OWN) == {"train": NAMES[:200], "val": NAMES[200:260], "test": NAMES[260:]}
    mixed = [SPLITS[k % 3] for k in range(300)]
    assert named(mixed) == {"train": NAMES[::3], "val": NAMES[1::3], "test": NAMES[2::3]}


def test_without_a_test_split_validation_is_divided() -> None:
    own = ["train"] * 200 + ["val"] * 100
    expected = by_hand(NAMES[200:], ("val", "test"), SHARES, 0)
    assert named(own) == {"train": NAMES[:200], **expected}
    assert 30 < len(expected["val"]) < 70


def test_without_a_validation_split_training_is_divided() -> None:
    own = ["train"] * 200 + ["test"] * 100
    expected = by_hand(NAMES[:200], ("train", "val"), SHARES, 0)
    assert named(own) == {**expected, "test": NAMES[200:]}
    assert 30 < len(expected["val"]) < 70  # expected: 50, from 0.2 / 0.8


def test_without_a_training_split_train_is_empty() -> None:
    own = ["val"] * 200 + ["test"] * 100
    assert named(own) == {"train": [], "val": NAMES[:200], "test": NAMES[200:]}
    assert named(["test"] * 300) == {"train": [], "val": [], "test": NAMES}
    assert named(["val"] * 300) == {"train": [], **by_hand(NAMES, ("val", "test"), SHARES, 0)}
    assert named([]) == {"train": [], "val": [], "test": []}


def test_native_splits_are_pooled_on_request() -> None:
    pool = by_hand(NAMES[:260], SPLITS, SHARES, 0)
    assert named(OWN, "train+validation") == named(OWN, "train+val") == pool
    assert named(OWN, "test") == by_hand(NAMES[260:], SPLITS, SHARES, 0)
    assert named(OWN, "Valid+train") == pool
    assert named(OWN, "train+val+test") == named(OWN, "all") == named(["train"] * 300)


def test_missing_split_is_an_error() -> None:
    own = ["train"] * 200 + ["test"] * 100
    with pytest.raises(DataError) as caught:
        named(own, "train+validation")
    assert str(caught.value) == (
        "data.split=train+validation: the dataset has no split val; it has train, test"
    )
    with pytest.raises(DataError, match=r"data.split=Extra: .* no split Extra; it has train, v"):
        named(OWN, "Extra")


def test_splits_have_their_shares_and_depend_on_the_seed() -> None:
    names = [str(k) for k in range(2000)]
    one = split_images(names, ["train"] * 2000, {"train": 6, "val": 2, "test": 2}, 0)
    assert sorted(np.concatenate(list(one.values())).tolist()) == list(range(2000))
    for split in SPLITS:
        deviation = (2000 * SHARES[split] * (1 - SHARES[split])) ** 0.5
        assert abs(len(one[split]) - 2000 * SHARES[split]) < 4 * deviation
    other = split_images(names, ["train"] * 2000, SHARES, 1)
    # 80 expected by chance.
    assert 45 < len(set(one["test"].tolist()) & set(other["test"].tolist())) < 115
    everything = split_images(names, ["train"] * 2000, ALL_TRAIN, 0)
    assert everything["train"].tolist() == list(range(2000))


@pytest.mark.parametrize("kinds", [("train",), ("train", "val"), ("train", "test"), SPLITS])
def test_adding_or_removing_images_does_not_move_others(kinds: tuple[str, ...]) -> None:
    def where(names: list[str]) -> dict[str, str]:
        own = [kinds[int(re.sub(r"\D", "", name)) % len(kinds)] for name in names]
        places = split_images(names, own, SHARES, 0)
        return {names[k]: split for split, each in places.items() for k in each}

    before, more = where(NAMES), where(sorted(NAMES + [f"new/{k}.png" for k in range(200)]))
    assert set(before.values()) == set(SPLITS) and len(more) == 500
    assert {name: more[name] for name in NAMES} == before
    fewer = where(NAMES[::-7])
    assert len(fewer) == 43 and all(before[name] == split for name, split in fewer.items())


def test_split_hash_matches_make_key() -> None:
    """The reference is BLAKE2b of the name, followed by the rounds of SplitMix64 modulo 2⁶⁴."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def number(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    for name, u in zip(NAMES[:20], fractions(NAMES[:20], 5), strict=True):
        key = 0
        for part in (5, number("split"), number(name)):
            key = mix(mix((key + 0x9E3779B97F4A7C15) % 2**64) ^ part)
        assert u == key % 2**53 / 2**53
