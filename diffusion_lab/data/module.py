r"""The data module: source -> packed cache -> loader -> transform on the device.

Images travel as uint8, height x width x channels. On the device they are flipped (training only)
and scaled, x_0 = x / 127.5 - 1 in [-1, 1], float32; the permutation to (B, 3, H, W) costs nothing
and leaves the memory layout that convolutions like.
"""

__all__ = ["ImageDataModule"]

import hashlib
import logging
from collections.abc import Mapping
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from lightning import LightningDataModule

from diffusion_lab.data.cache import MANIFEST, PackedCache, ingest
from diffusion_lab.data.images import Images, SourceImages, Split
from diffusion_lab.data.loader import TAILS, Loader
from diffusion_lab.data.shuffle import lanes, live_groups, shuffled
from diffusion_lab.data.source import Source, divide, open_source
from diffusion_lab.errors import ConfigError, DataError
from diffusion_lab.pixels import to_model
from diffusion_lab.rng import KeyedGenerator, make_key

log = logging.getLogger(__name__)

CACHES = ("uint8", "bytes", "none")
ORDERS = ("shuffle", "lanes")
ROOM = 0.85  # of data.memory may be planned with; see `_room`


class ImageDataModule(LightningDataModule):
    """Streams images of one size from any source.

    Arguments:
        source: See `open_source`; or the directory of a packed cache.
        size: Height and width in pixels.
        batch_size: Images of a batch on one device.
        splits: For faces the number of images of each of train, val and test; otherwise shares.
        split: Own splits of the set, joined by "+", to be pooled and divided; see `divide`.
        split_seed: Seed of the drawings or of the division into splits.
        seed: Seed of the training order and of every draw made for an image.
        flip: Whether half of the training images are mirrored.
        cache: "uint8" packs pixels, "bytes" encoded images, "none" reads the source all the time.
        cache_dir: Where the packed images are kept.
        column: The column of images in parquet files.
        label: What the images are divided into classes by: a factor of faces (hair_style,
            glasses, ...), a column of parquet files, or "folder"; None for no classes.
        order: "shuffle" or "lanes"; see `order.py`.
        lanes: The number L of lanes.
        window: The number k of groups that a lane mixes.
        memory: Bound on what a device holds to stream with cache="none", in GiB: groups of encoded
            images, what is being read, and the batches fetched ahead.
        tail: "drop" or "spread"; see `Loader`.
        num_workers: How many threads fetch batches ahead.
        on_error: "raise" or "skip"; see `ingest`.
        max_bad: The largest number of images that may be skipped.

    Attributes:
        images: The images of each split, after `setup`.
        classes: The names of the classes, after `setup`.

    Raises:
        ConfigError: If a choice is unknown.
    """

    def __init__(
        self,
        source: str,
        size: int,
        batch_size: int,
        splits: Mapping[str, float],
        split: str | None = None,
        split_seed: int = 0,
        seed: int = 0,
        flip: bool = True,
        cache: str = "uint8",
        cache_dir: str = "~/.cache/diffusion_lab",
        column: str = "image",
        label: str | None = None,
        order: str = "shuffle",
        lanes: int = 8,
        window: int = 2,
        memory: float = 2.0,
        tail: str = "drop",
        num_workers: int = 0,
        on_error: str = "raise",
        max_bad: int = 100,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("cache", cache, CACHES),
            ("order", order, ORDERS),
            ("tail", tail, TAILS),
        ):
            if value not in allowed:
                raise ConfigError(f"data.{name}={value}; it is one of {', '.join(allowed)}")
        self.source, self.size, self.column, self.split = source, size, column, split
        self.label, self.classes = label, []
        self.batch_size, self.splits = batch_size, dict(splits)
        self.split_seed, self.seed, self.flip = split_seed, seed, flip
        self.kind, self.cache_dir = cache, Path(cache_dir).expanduser()
        self.order, self.lanes, self.window, self.memory = order, lanes, window, memory
        self.tail, self.num_workers = tail, num_workers
        self.on_error, self.max_bad = on_error, max_bad
        self.images: dict[str, Split] = {}
        self._source: Source | None = None
        self._cache: PackedCache | None = None
        self._hashes: dict[str, dict[str, str | None]] = {}

    def open_source(self) -> Source:
        """Opens the source itself, whatever is packed; lists it once."""
        if self._source is None:  # packing and labels ask for it
            download = self.kind != "none"
            self._source = open_source(
                self.source, self.size, self.splits, self.split_seed, self.column, download
            )
        return self._source

    @property
    def packed(self) -> Path | None:
        """The packed cache that `source` names, if it is the directory of one."""
        path = Path(self.source).expanduser()
        # A folder of images may well hold a manifest of its own.
        found = all((path / name).is_file() for name in (MANIFEST, "sha256.npy"))
        return path if found else None

    def open_cache(self) -> PackedCache:
        """Opens the packed cache, and makes it first if it is not there.

        Raises:
            DataError: If that fails, or `source` is a packed cache of images of another size.
        """
        if self._cache is not None:  # prepare_data and setup ask for it
            return self._cache
        packed = self.packed
        if packed is None:
            cache = ingest(
                self.open_source(),
                self.cache_dir,
                self.kind,
                on_error=self.on_error,
                max_bad=self.max_bad,
            )
        else:
            cache = PackedCache(packed)
            if cache.images.size != self.size:
                raise DataError(
                    f"data.source={packed} holds images of size {cache.images.size}; set "
                    f"data.size={cache.images.size} (now {self.size})"
                )
        self._cache = cache
        return cache

    def prepare_data(self) -> None:
        """Packs the images, once on each machine."""
        if self.kind != "none":
            self.open_cache()

    def setup(self, stage: str | None = None) -> None:
        """Opens the images.

        Raises:
            ConfigError: If the training split is smaller than one batch of all devices, or the
                order needs more memory than it may have.
            DataError: If a split that the stage needs is empty.
        """
        self.open()
        needed = {"validate": ["val"], "test": ["test"]}.get(stage, ["train", "val"])
        for split in needed:
            if not len(self.images[split]):
                raise DataError(
                    f"data.source={self.source} leaves no image for the {split} split; "
                    f"change data.splits (now {self.splits}) or add images"
                )
        world = self.trainer.world_size if self.trainer else 1
        count = len(self.images["train"])
        if stage == "fit" and count < self.batch_size * world:
            raise ConfigError(
                f"data.batch_size={self.batch_size} on {world} device(s) is more than the "
                f"{count} training images of data.source={self.source}; lower data.batch_size"
            )
        if stage == "fit":
            self._check_streaming(world)

    def open(self) -> None:
        """Opens the images and divides them into splits."""
        if self.images:
            return
        images: Images
        if self.kind == "none" and self.packed is None:
            source = self.open_source()
            images = SourceImages(source, self._room - self._under_way(source))
            names, own, sha256 = source.names, source.own, None
        else:
            cache = self.open_cache()
            images, names, own, sha256 = cache.images, cache.names, cache.own, cache.sha256
        labels = self._labels(names)
        places = divide(names, own, self.splits, self.split_seed, self.split)
        for split, positions in places.items():
            text = "\n".join(names[k] for k in positions)
            mine = None if labels is None else labels[positions]
            self.images[split] = Split(images, positions, mine)
            self._hashes[split] = {
                "names": hashlib.sha256(text.encode()).hexdigest()[:16],
                "content": None
                if sha256 is None
                else hashlib.sha256(sha256[positions].tobytes()).hexdigest()[:16],
            }

    def _labels(self, names: list[str]) -> np.ndarray | None:
        """The class of each image, int64; the source knows it, not the cache."""
        if self.label is None:
            return None
        if self.packed is not None:
            raise ConfigError(
                f"data.label={self.label}: the packed cache data.source={self.source} knows no "
                "classes; set data.source to where the images come from"
            )
        source = self.open_source()
        self.classes, labels = source.labels(self.label)
        places = {name: k for k, name in enumerate(source.names)}
        return labels[[places[name] for name in names]]  # some may have been left out

    @property
    def _room(self) -> int:
        """Bytes that may be held; the rest is left for what lies unused between them."""
        return int(ROOM * self.memory * 2**30)

    def _under_way(self, source: Source) -> int:
        """Bytes of the batches that are held, and of groups while they are read, in pieces."""
        batches = Loader.batches_held(self.num_workers) * self.batch_size * self.size**2 * 3
        reading = 3 * max(1, self.num_workers) * max(source.bytes) if source.whole else 0
        return batches + reading

    def _check_streaming(self, world: int) -> None:
        images = self.images["train"].images
        if not isinstance(images, SourceImages) or not images.source.whole:
            return
        if self.order == "shuffle":
            raise ConfigError(
                f"data.order=shuffle with data.cache=none would read a whole row group of "
                f"data.source={self.source} for almost every image; set data.order=lanes, or "
                "data.cache=uint8"
            )
        if self.lanes % world:
            log.warning(
                "data.lanes=%d is no multiple of the %d devices: a row group is read by %d of "
                "them; set data.lanes=%d",
                self.lanes, world, world // gcd(self.lanes, world),
                -(-self.lanes // world) * world,
            )  # fmt: skip
        groups = live_groups(self.lanes, self.window, world)
        kept = min(groups, len(images.groups)) * max(images.source.bytes)
        other = self._under_way(images.source)
        if kept + other > self._room:
            raise ConfigError(
                f"data.lanes={self.lanes} and data.window={self.window} on {world} device(s) hold "
                f"{groups} row groups at once, {kept / 2**30:.3g} GiB, and reading and batches "
                f"take {other / 2**30:.3g} GiB, which is above {ROOM:.0%} of data.memory="
                f"{self.memory}; lower data.window, data.lanes or data.num_workers, raise "
                "data.memory, or set data.cache=bytes"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns hashes of each split's names and pixels; every checkpoint carries them."""
        return {"splits": self._hashes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Holds a checkpoint's splits against those at hand.

        The same images from another place, in the same order, are welcome.

        Raises:
            DataError: If they are not the same images; shows both hashes.
        """
        for split, mine in self._hashes.items():
            theirs = state["splits"][split]
            # Pixels decide if both are known: reading a source as it is does not tell them.
            kind = "content" if mine["content"] and theirs["content"] else "names"
            if theirs[kind] != mine[kind]:
                raise DataError(
                    f"the {split} split of data.source={self.source} has {kind} hash "
                    f"{mine[kind]}, that of the run {theirs[kind]}: images were added, removed, "
                    "renamed or changed. Resume with the images of the run, or start a new run"
                )

    def _loader(self, split: str, *, train: bool = False) -> Loader:
        trainer, images = self.trainer, self.images[split]
        order = None
        if train and self.order == "lanes":
            order = partial(lanes, groups=images.groups, count=self.lanes, window=self.window)
        elif train:
            order = partial(shuffled, count=len(images))
        return Loader(
            images,
            split,
            self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            order=order,
            tail=self.tail,
            epoch=(lambda: trainer.current_epoch) if trainer else (lambda: 0),
            workers=self.num_workers,
            pin=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )

    def train_dataloader(self) -> Loader:
        """Returns the training images in a new order every epoch."""
        return self._loader("train", train=True)

    def val_dataloader(self) -> Loader:
        """Returns the validation images, each once."""
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        """Returns the test images, each once."""
        return self._loader("test")

    def test_images(self, count: int) -> Split:
        """Returns the test split, after `setup`.

        Raises:
            ConfigError: If it has fewer than `count` images.
        """
        images = self.images["test"]
        if count > len(images):
            raise ConfigError(
                f"num_images={count} is more than the {len(images)} test images of "
                f"data.source={self.source}; lower num_images"
            )
        return images

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict:
        """Adds `x_0`, float32 in [-1, 1], of shape (B, 3, H, W), in place of `image`."""
        images = batch.pop("image")
        if self.flip and batch["split"] == "train":
            mirrored = KeyedGenerator(make_key(batch["key"], "flip")).uniform() < 0.5
            images = images.where(~mirrored[:, None, None, None], images.flip(2))
        batch["x_0"] = to_model(images)
        return batch
