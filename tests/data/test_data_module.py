"""Data module: batches do not depend on the storage; checks of resumed runs."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_fixtures import SHARES, Drawn, encoded, fill, opened, pixels, write_parquet

from diffusion_lab.data.faces import draw_faces
from diffusion_lab.data.images import EncodedImages, MappedImages, SourceImages
from diffusion_lab.data.module import ImageDataModule
from diffusion_lab.data.splits import SPLITS
from diffusion_lab.errors import ConfigError, DataError
from diffusion_lab.pixels import to_model, to_uint8
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.runs.instantiate import instantiate


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


def of_files(tmp_path: Path, source: Path, **kwargs) -> ImageDataModule:
    options = {"batch_size": 4, "splits": SHARES, **kwargs}
    return make_data(tmp_path, source=str(source), **options)


def ready(data: ImageDataModule) -> ImageDataModule:
    data.setup("fit")
    return data


# --- scaling and flipping -----------------------------------------------------------------------


def test_to_model_is_exact_and_invertible() -> None:
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


def test_to_model_moves_the_channels_to_the_front() -> None:
    images = torch.from_numpy(np.stack([pixels(1), pixels(2)]))
    x_0 = to_model(images)
    for b, c, i, j in ((0, 0, 1, 5), (1, 2, 7, 0), (1, 1, 3, 4)):
        assert int(to_uint8(x_0[b, c])[i, j]) == int(images[b, i, j, c])


def test_horizontal_flips_are_determined_by_the_key(tmp_path: Path) -> None:
    data = ready(make_data(tmp_path))
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


def test_only_training_images_are_flipped_and_only_with_flip(tmp_path: Path) -> None:
    data, still = ready(make_data(tmp_path)), ready(make_data(tmp_path, flip=False))
    loaders = [data.val_dataloader(), data.test_dataloader(), still.train_dataloader()]
    for module, loader in zip((data, data, still), loaders, strict=True):
        for batch in loader:
            expected = batch["image"].permute(0, 3, 1, 2)
            assert torch.equal(to_uint8(module.on_after_batch_transfer(batch, 0)["x_0"]), expected)


# --- batches ------------------------------------------------------------------------------------


def test_loaders_return_the_images_of_their_splits(tmp_path: Path) -> None:
    data = ready(make_data(tmp_path, split_seed=5))
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


def same_batches(one: ImageDataModule, two: ImageDataModule) -> int:
    """Compares all batches of an epoch and returns the number of images."""
    count = 0
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for a, b in zip(getattr(one, name)(), getattr(two, name)(), strict=True):
            assert a.keys() == b.keys() and a["split"] == b["split"]
            assert all(torch.equal(a[key], b[key]) for key in ("image", "index", "key"))
            a, b = (data.on_after_batch_transfer(batch, 0) for data, batch in ((one, a), (two, b)))
            assert torch.equal(a["x_0"], b["x_0"])
            count += len(a["x_0"])
    return count


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_gives_the_same_batches_with_every_cache_kind(tmp_path: Path, workers: int) -> None:
    names = [f"{k:02}.{'jpg' if k % 2 else 'png'}" for k in range(40)]
    expected = fill(tmp_path / "in", names, 11)
    kinds = {"uint8": MappedImages, "bytes": EncodedImages, "none": SourceImages}
    modules = {
        kind: ready(of_files(tmp_path, tmp_path / "in", cache=kind, num_workers=workers, size=11))
        for kind in kinds
    }
    for kind, data in modules.items():
        assert isinstance(data.images["train"].images, kinds[kind])
        assert sorted(n for split in SPLITS for n in data.images[split].names) == names
        for batch in data.val_dataloader():
            for k, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                assert np.array_equal(image, expected[data.images["val"].names[k]])
        assert same_batches(modules["uint8"], data) > 30
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 2


def test_faces_are_the_same_cached_or_drawn_on_the_fly(tmp_path: Path) -> None:
    packed, drawn = (ready(make_data(tmp_path, cache=kind)) for kind in ("uint8", "none"))
    assert same_batches(packed, drawn) == 96
    assert isinstance(drawn.images["train"].images, SourceImages)


def test_interleaved_parquet_gives_the_same_batches_cached_or_streamed(tmp_path: Path) -> None:
    """Row groups of 64 rows, the group size of the packed cache, give the same order."""
    write_parquet(tmp_path / "a.parquet", [encoded(pixels(k)) for k in range(200)], group=64)
    options = {"order": "interleave", "interleave": 2, "shuffle_buffer": 1, "drop_last": False}
    packed, plain = (
        ready(of_files(tmp_path, tmp_path / "a.parquet", cache=kind, **options))
        for kind in ("uint8", "none")
    )
    assert same_batches(packed, plain) == 200
    shuffled = ready(of_files(tmp_path, tmp_path / "a.parquet"))
    one, two = (
        [k for batch in data.train_dataloader() for k in batch["index"].tolist()]
        for data in (packed, shuffled)
    )
    assert one[: len(two)] != two and set(two) <= set(one)


def test_cache_is_reused(tmp_path: Path, monkeypatch) -> None:
    fill(tmp_path / "in", [f"{k}.png" for k in range(20)])
    first = ready(of_files(tmp_path, tmp_path / "in"))
    monkeypatch.setattr("diffusion_lab.data.storage.LocalStorage.read", None)
    again = ready(of_files(tmp_path, tmp_path / "in", split_seed=1, flip=False))
    assert again.images["train"].names != first.images["train"].names


def test_native_splits_can_be_pooled(tmp_path: Path) -> None:
    names = [f"{split}/{k}.png" for split in SPLITS for k in range(12)]
    fill(tmp_path / "in", names)
    kept = ready(of_files(tmp_path, tmp_path / "in"))
    for split in SPLITS:
        assert sorted(kept.images[split].names) == sorted(n for n in names if n.startswith(split))
    pooled = ready(of_files(tmp_path, tmp_path / "in", split="train+validation"))
    everything = [name for split in SPLITS for name in pooled.images[split].names]
    assert sorted(everything) == sorted(n for n in names if not n.startswith("test"))
    assert any(name.startswith("val") for name in pooled.images["train"].names)
    with pytest.raises(DataError, match=r"data.split=extra: the dataset has no split extra;"):
        of_files(tmp_path, tmp_path / "in", split="extra").setup("fit")


# --- packed cache as source ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uint8", "bytes"])
@pytest.mark.parametrize("cache", ["uint8", "bytes", "none"])
def test_packed_cache_is_a_source(tmp_path: Path, kind: str, cache: str) -> None:
    """It can be copied to a machine without its source, and nothing is packed again."""
    fill(tmp_path / "in", [f"{k:02}.png" for k in range(40)])
    first = ready(of_files(tmp_path, tmp_path / "in", cache=kind))
    (manifest,) = (tmp_path / "cache").glob("*/manifest.json")
    shutil.copytree(manifest.parent, tmp_path / "copy")
    shutil.rmtree(tmp_path / "in")
    shutil.rmtree(tmp_path / "cache")
    second = ready(of_files(tmp_path, tmp_path / "copy", cache=cache))
    assert second.state_dict() == first.state_dict()
    assert same_batches(first, second) > 30  # the files of the first cache are still mapped
    assert not (tmp_path / "cache").exists()


def test_packed_cache_of_another_size_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path / "in", [f"{k}.png" for k in range(20)])
    of_files(tmp_path, tmp_path / "in")
    (manifest,) = (tmp_path / "cache").glob("*/manifest.json")
    with pytest.raises(DataError) as caught:
        of_files(tmp_path, manifest.parent, size=16)
    assert str(caught.value) == (
        f"data.source={manifest.parent} holds images of size 8; set data.size=8 (now 16)"
    )
    (manifest.parent / "images.npy").write_bytes(b"")
    with pytest.raises(DataError, match=f"the cache {manifest.parent} is damaged"):
        of_files(tmp_path, manifest.parent)


def test_folder_of_images_may_contain_an_unrelated_manifest(tmp_path: Path) -> None:
    expected = fill(tmp_path / "in", [f"{k}.png" for k in range(20)])
    (tmp_path / "in" / "manifest.json").write_text('{"made by": "somebody else"}')
    data = ready(of_files(tmp_path, tmp_path / "in"))
    names = [name for split in SPLITS for name in data.images[split].names]
    assert sorted(names) == sorted(expected)


# --- resuming: images of the checkpoint and of the data module ----------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with native splits."""
    fill(tmp_path / "in", [f"{split}/{k}.png" for split in SPLITS for k in range(8)])
    return tmp_path / "in"


def test_state_accepts_the_same_images_from_another_source(tmp_path: Path, images: Path) -> None:
    state = ready(of_files(tmp_path, images)).state_dict()
    shutil.copytree(images, tmp_path / "copy")
    for split in SPLITS:  # renamed, in the same order
        data = [(images / split / f"{k}.png").read_bytes() for k in range(8)]
        write_parquet(tmp_path / "set" / f"{split}.parquet", data)
        for k, content in enumerate(data):  # other files with the same pixels
            path = tmp_path / "png" / split / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(opened(content), compress_level=0))
    for place in ("copy", "set", "png"):
        for kind in ("uint8", "bytes"):
            data = ready(of_files(tmp_path, tmp_path / place, cache=kind))
            data.load_state_dict(state)
            for split in SPLITS:
                assert (
                    data.state_dict()["splits"][split]["content"]
                    == (state["splits"][split]["content"])
                )
    streamed = ready(of_files(tmp_path, tmp_path / "copy", cache="none"))
    streamed.load_state_dict(state)  # compared by names
    ready(of_files(tmp_path, images)).load_state_dict(streamed.state_dict())


def test_state_contains_hashes_of_names_and_pixels(tmp_path: Path, images: Path) -> None:
    from hashlib import sha256

    state = ready(of_files(tmp_path, images)).state_dict()["splits"]
    for split in SPLITS:
        names = [f"{split}/{k}.png" for k in range(8)]
        parts = [opened((images / name).read_bytes()).tobytes() for name in names]
        content = sha256(b"".join(sha256(part).digest() for part in parts)).hexdigest()[:16]
        assert state[split] == {
            "names": sha256("\n".join(names).encode()).hexdigest()[:16],
            "content": content,
        }


CHANGES = {
    "another image": lambda path: path.write_bytes(encoded(pixels(99))),
    "one image less": lambda path: path.unlink(),
    "another order": lambda path: path.rename(path.with_name("9.png")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_state_of_other_pixels_is_an_error(tmp_path: Path, images: Path, change: str) -> None:
    old = ready(of_files(tmp_path, images)).state_dict()
    CHANGES[change](images / "val" / "3.png")
    data = ready(of_files(tmp_path, images))
    new = data.state_dict()
    assert new["splits"]["train"] == old["splits"]["train"]
    with pytest.raises(DataError) as caught:
        data.load_state_dict(old)
    assert str(caught.value) == (
        f"the val split of data.source={images} has content hash "
        f"{new['splits']['val']['content']}, that of the run {old['splits']['val']['content']}: "
        "images were added, removed, renamed or changed. Resume with the images of the run, or "
        "start a new run"
    )
    assert new["splits"]["val"]["content"] != old["splits"]["val"]["content"]


@pytest.mark.parametrize("kinds", [("none", "none"), ("uint8", "none"), ("none", "uint8")])
def test_state_of_other_names_is_an_error_if_pixel_hashes_are_unknown(
    tmp_path: Path, images: Path, kinds: tuple[str, str]
) -> None:
    old = ready(of_files(tmp_path, images, cache=kinds[0])).state_dict()
    (images / "test" / "3.png").rename(images / "test" / "03.png")
    data = ready(of_files(tmp_path, images, cache=kinds[1]))
    new = data.state_dict()
    with pytest.raises(DataError, match=r"^the test split .* has names hash") as caught:
        data.load_state_dict(old)
    for state in (old, new):
        assert state["splits"]["test"]["names"] in str(caught.value)
    assert old["splits"]["test"]["names"] != new["splits"]["test"]["names"]


def test_state_of_other_splits_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path / "in", [f"{k}.png" for k in range(40)])
    state = ready(of_files(tmp_path, tmp_path / "in")).state_dict()
    with pytest.raises(DataError, match=r"^the train split .* has content hash"):
        ready(of_files(tmp_path, tmp_path / "in", split_seed=1)).load_state_dict(state)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("cache", "uint8, bytes, none"),
        ("order", "shuffle, interleave"),
        ("on_error", "raise, skip"),
    ],
)
def test_unknown_choice_is_an_error(tmp_path: Path, key: str, allowed: str) -> None:
    with pytest.raises(ValueError) as caught:
        make_data(tmp_path, **{key: "other"})
    assert str(caught.value) == f"{key}=other is not allowed; it must be one of {allowed}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is not allowed; it must be an integer >= 1"),
        ({"memory": 0}, "memory=0 is not allowed; it must be a number > 0"),
        ({"drop_last": "drop"}, "drop_last=drop is not allowed; it must be true or false"),
        ({"source": ""}, "source= is not allowed; it must be a non-empty string or an"),
        ({"size": 17}, "size=17 is not allowed; it must be a power of two from 8 to 1024"),
        ({"size": 4}, "size=4 is not allowed; it must be a power of two from 8 to 1024"),
        ({"splits": {"train": 0.9, "val": 8, "test": 8}},
         "splits.train=0.9 is not allowed; it must be a number of images, an integer >= 0"),
        ({"splits": {"train": 9, "val": -8, "test": 8}},
         "splits={'train': 9, 'val': -8, 'test': 8} is not allowed; it must be a mapping, each"),
        ({"cache": "none", "on_error": "skip"}, "on_error=skip omits bad images when they are"),
        ({"splits": {"train": 9, "test": 8}}, "splits has the keys train, test; they must be"),
    ],
)  # fmt: skip
def test_invalid_argument_is_an_error(options: dict, message: str) -> None:
    defaults = {"source": "faces", "size": 8, "batch_size": 4}
    splits = {"train": 64, "val": 16, "test": 16}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ImageDataModule(**{**defaults, "splits": splits, **options})


@pytest.mark.parametrize("cache", ["uint8", "bytes", "none"])
@pytest.mark.parametrize(
    "item", [3, np.float32(0.5), np.uint8([7]), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3))]
)
def test_items_that_are_no_pixels_are_an_error(tmp_path: Path, cache: str, item: object) -> None:
    """A number would be an image of one colour."""

    class Wrong(Drawn):
        def read(self, group: int, places=None):
            return iter([item] * len(self.groups[group] if places is None else places))

    data = ImageDataModule(
        Wrong(60, size=8), 8, 4, SHARES, cache=cache, cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(DataError, match=r"image \d+: the source yields .*not a file or pixels"):
        ready(data).images["train"][np.array([0])]


def test_ignored_files_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "in", [f"{k}.png" for k in range(20)])
    (tmp_path / "in" / "a.webp").touch()
    for _ in range(2):  # also if the cache exists
        caplog.clear()
        ready(of_files(tmp_path, tmp_path / "in"))
        assert f"data.source={tmp_path}/in: 20 images are used; ignored: 1 .webp" in caplog.text


def test_configuration_error_names_the_full_key() -> None:
    node = {
        "_target_": "diffusion_lab.data.ImageDataModule", "source": "faces", "size": 24,
        "batch_size": 4, "splits": {"train": 64, "val": 16, "test": 16},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"^data.size=24 is not allowed; it must be a power of"):
        instantiate(node, "data")
    with pytest.raises(ConfigError, match=r"^data.max_bad=-1 is not allowed; it must be an integ"):
        instantiate({**node, "max_bad": -1}, "data")


def test_a_custom_source_class_can_be_configured(tmp_path: Path) -> None:
    """The class is given only in the configuration."""
    node = {
        "_target_": "diffusion_lab.data.ImageDataModule",
        "source": {"_target_": "image_fixtures.Drawn", "count": 60, "size": 8},
        "size": 8, "batch_size": 4, "splits": SHARES, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    data = ready(instantiate(node, "data"))
    split = data.images["train"]
    assert split.names == [f"image {k}" for k in range(40)]
    assert np.array_equal(split[np.array([7])][0], pixels(7))
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 1
    with pytest.raises(ConfigError, match=r"size=16 is not that of the source, 8"):
        instantiate({**node, "size": 16}, "data")


def test_too_few_images_are_an_error(tmp_path: Path) -> None:
    data = make_data(tmp_path, batch_size=65)
    with pytest.raises(ConfigError, match=r"data.batch_size=65 .*64 training images .*faces"):
        data.setup("fit")
    data = make_data(tmp_path, splits={"train": 64, "val": 0, "test": 16})
    data.setup("test")
    with pytest.raises(DataError, match=r"data.source=faces has no image for the val split"):
        data.setup("fit")


def test_held_out_images_are_not_used_for_training(tmp_path: Path) -> None:
    fill(tmp_path / "in", [f"{f}/{k}.png" for f in ("Train", "valid", "Test") for k in range(6)])
    data = ready(of_files(tmp_path, tmp_path / "in"))
    folders = {"train": "Train", "val": "valid", "test": "Test"}
    for split, folder in folders.items():
        assert data.images[split].names == [f"{folder}/{k}.png" for k in range(6)]


def test_splits_of_an_earlier_cache_are_those_of_the_source(tmp_path: Path) -> None:
    fill(tmp_path / "in", [f"{folder}/{k}.png" for folder in ("train", "valid") for k in range(6)])
    cache = of_files(tmp_path, tmp_path / "in").open_cache()
    manifest = cache.directory / "manifest.json"
    old = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**old, "own": [["train", 12]]}))
    data = ready(of_files(tmp_path, tmp_path / "in"))
    assert data.images["train"].names == [f"train/{k}.png" for k in range(6)]


def test_images_of_a_test_split_alone_are_not_trained_on(tmp_path: Path) -> None:
    fill(tmp_path / "in", [f"test/{k}.png" for k in range(20)])
    data = of_files(tmp_path, tmp_path / "in")
    data.setup("test")
    assert len(data.images["test"]) == 20
    with pytest.raises(DataError, match=r"no image for the train split; .*data.split=all"):
        data.setup("fit")


def parquet(tmp_path: Path, group: int = 8) -> Path:
    write_parquet(tmp_path / "a.parquet", [encoded(pixels(k)) for k in range(80)], group=group)
    return tmp_path / "a.parquet"


def test_shuffled_order_of_streamed_row_groups_is_an_error(tmp_path: Path) -> None:
    data = of_files(tmp_path, parquet(tmp_path), cache="none")
    with pytest.raises(ConfigError) as caught:
        data.setup("fit")
    assert str(caught.value) == (
        "data.order=shuffle with data.cache=none would read a complete row group of "
        f"data.source={tmp_path}/a.parquet for almost every image; set data.order=interleave, or "
        "data.cache=uint8"
    )
    data.setup("validate")  # the sequential order reads each row group once
    ready(of_files(tmp_path, tmp_path / "a.parquet", cache="none", order="interleave"))
    ready(of_files(tmp_path, tmp_path / "a.parquet", cache="bytes"))


def test_row_groups_that_exceed_the_memory_are_an_error(tmp_path: Path) -> None:
    """2 streams with buffers of 3 groups, and the next group of each, hold 8 groups at once.

    Reading a group takes three times its size in addition, and there are two batches.
    """
    path = parquet(tmp_path)
    options = {"cache": "none", "order": "interleave", "interleave": 2, "shuffle_buffer": 3}
    largest = max(of_files(tmp_path, path, **options).open_source().group_bytes)
    other = (3 * largest + 2 * 4 * 8 * 8 * 3) / 2**30
    kept = 8 * largest / 2**30
    needed = (kept + other) / 0.85 * (1 + 1e-4)
    ready(of_files(tmp_path, path, memory=needed, **options))
    data = of_files(tmp_path, path, memory=0.99 * needed, **options)
    with pytest.raises(ConfigError) as caught:
        data.setup("fit")
    assert str(caught.value) == (
        "data.interleave=2 and data.shuffle_buffer=3 on 1 device(s) hold 8 row groups at once, "
        f"{kept:.3g} GiB, and reads and batches take {other:.3g} GiB, which is above 85% of "
        f"data.memory={0.99 * needed}; lower data.shuffle_buffer, data.interleave or "
        "data.num_workers, raise data.memory, or set data.cache=bytes"
    )
    # The number of groups in memory is at most the number of all groups, 10.
    many = {**options, "interleave": 8}
    ready(of_files(tmp_path, path, memory=(10.01 * largest / 2**30 + other) / 0.85, **many))
    with pytest.raises(ConfigError, match="hold 32 row groups"):
        ready(of_files(tmp_path, path, memory=(9 * largest / 2**30 + other) / 0.85, **many))


@pytest.mark.parametrize("world, times, better", [(2, None, None), (3, 3, 6), (8, 2, 8)])
def test_interleave_that_is_not_a_multiple_of_the_devices_warns(
    tmp_path: Path, caplog, world: int, times: int | None, better: int | None
) -> None:
    data = of_files(
        tmp_path, parquet(tmp_path), cache="none", order="interleave", interleave=4, batch_size=1
    )
    device = SimpleNamespace(type="cpu")
    data.trainer = SimpleNamespace(
        world_size=world, global_rank=0, strategy=SimpleNamespace(root_device=device)
    )
    data.setup("fit")
    assert [record.getMessage() for record in caplog.records] == (
        [] if times is None else [
            f"data.interleave=4 is not a multiple of the {world} devices: {times} of them read "
            f"each row group; set data.interleave={better}"
        ]
    )  # fmt: skip
