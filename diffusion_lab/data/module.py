r"""Lightning data module of images: source -> packed cache -> loader -> transform on the device.

Images are uint8, height x width x channels, until they are on the device. There they are flipped
(training only) and scaled, x_0 = x / 127.5 - 1 in [-1, 1], float32. The permutation to
(B, 3, H, W) is a view: it copies nothing and keeps the memory layout that convolutions prefer.
"""

__all__ = ["ImageDataModule"]

import hashlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning import LightningDataModule
from torch import Tensor

from diffusion_lab.constraints import (
    NonEmptyStr,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    checked,
)
from diffusion_lab.data.cache import MANIFEST, PackedCache, ingest
from diffusion_lab.data.images import Images, SourceImages, Split
from diffusion_lab.data.loader import Loader
from diffusion_lab.data.registry import GENERATED_SOURCES, open_source
from diffusion_lab.data.shuffle import interleaved, open_groups, shuffled
from diffusion_lab.data.source import Source, SourceOptions
from diffusion_lab.data.splits import SPLITS, split_images
from diffusion_lab.errors import ConfigError, DataError
from diffusion_lab.pixels import to_model
from diffusion_lab.redact import refuse_secrets
from diffusion_lab.rng import KeyedGenerator, make_key

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.85  # of data.memory; the rest is for fragmentation of the heap


class ImageDataModule(LightningDataModule):
    """Images of one size from any source, in train, val and test splits.

    Arguments:
        source: See `open_source`; the directory of a packed cache; or a `Source`.
        size: Height and width in pixels.
        batch_size: Images of a batch on one device.
        splits: For generated images the number of images of train, val and test; otherwise shares.
        split: Native splits, joined by "+", to pool and divide; see `split_images`.
        split_seed: Seed of the division into splits; for generated images seed of the drawings.
        seed: Seed of the training order and of every draw made for an image.
        flip: Whether half of the training images are mirrored.
        cache: "uint8" packs pixels, "bytes" encoded images, "none" reads the source every time.
        cache_dir: Directory of the packed caches.
        image_column: The column of images in parquet files.
        link_root: A folder that symbolic links of a local source may lead to, besides it.
        label: The attribute that defines the classes: a factor of faces (hair_style, glasses,
            ...), a column of parquet files, or "folder"; None for no classes.
        order: "shuffle", or "interleave" to read group by group; see `shuffle.py`.
        interleave: The number L of interleaved streams.
        shuffle_buffer: The number k of groups that are shuffled together in a stream.
        memory: Memory limit of a device with cache="none", in GiB: groups of encoded images,
            reads, and prefetched batches.
        drop_last: See `Loader`.
        num_workers: The number of threads that prefetch batches.
        on_error: "raise" or "skip"; see `ingest`. cache="none" allows "raise" only.
        max_bad: The largest number of images that may be skipped.

    Attributes:
        images: The images of each split, after `setup`.
        classes: The names of the classes, after `setup`.
        is_divided: Whether the images have no splits of their own and are divided by `splits`,
            after `setup`.

    Raises:
        ValueError: If an argument is not allowed, or arguments contradict each other.
        ConfigError: If `source` is an address with a secret.
    """

    @checked
    def __init__(
        self,
        source: NonEmptyStr | Source,
        size: PositiveInt,
        batch_size: PositiveInt,
        splits: Mapping[str, NonNegativeInt | NonNegative],
        split: NonEmptyStr | None = None,
        split_seed: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
        flip: bool = True,
        cache: Literal["uint8", "bytes", "none"] = "uint8",
        cache_dir: NonEmptyStr = "~/.cache/diffusion_lab",
        image_column: NonEmptyStr = "image",
        link_root: NonEmptyStr | None = None,
        label: NonEmptyStr | None = None,
        order: Literal["shuffle", "interleave"] = "shuffle",
        interleave: PositiveInt = 8,
        shuffle_buffer: PositiveInt = 2,
        memory: Positive = 2.0,
        drop_last: bool = True,
        num_workers: NonNegativeInt = 0,
        on_error: Literal["raise", "skip"] = "raise",
        max_bad: NonNegativeInt = 100,
    ) -> None:
        super().__init__()
        if isinstance(source, str):
            refuse_secrets(source)
        if set(splits) != set(SPLITS):
            raise ValueError(f"splits has the keys {', '.join(splits)}; they must be train, val, "
                             "test")  # fmt: skip
        if cache == "none" and on_error == "skip":
            raise ValueError(
                "on_error=skip omits bad images when they are packed, and cache=none packs none; "
                "set cache=uint8 or bytes, or on_error=raise"
            )
        self.size, self.image_column, self.split = size, image_column, split
        self.link_root = link_root
        self.label, self.classes = label, list[str]()
        self.batch_size, self.splits = batch_size, dict(splits)
        self.split_seed, self.seed, self.flip = split_seed, seed, flip
        try:
            self.cache, self.cache_dir = cache, Path(cache_dir).expanduser()
        except RuntimeError as error:
            raise ValueError(
                f"cache_dir={cache_dir} is in the home directory, and this user has none; name "
                "another one: data.cache_dir= or the environment variable DIFFUSION_LAB_CACHE"
            ) from error
        self.order, self.interleave, self.shuffle_buffer = order, interleave, shuffle_buffer
        self.memory, self.drop_last, self.num_workers = memory, drop_last, num_workers
        self.on_error, self.max_bad = on_error, max_bad
        self.images: dict[str, Split] = {}
        self.is_divided = False
        self._source: Source | None = None
        self._packed_cache: PackedCache | None = None
        self._hashes: dict[str, dict[str, str | None]] = {}
        if isinstance(source, Source):
            self.source, self._source = type(source).__name__, source
            if source.size != size:
                raise ValueError(f"size={size} is not that of the source, {source.size}")
        else:
            self.source = source
            if source in GENERATED_SOURCES:  # checks size and splits
                options = SourceOptions(source, size, splits, split_seed)
                self._source = GENERATED_SOURCES[source].open(options)

    def open_source(self) -> Source:
        """Opens the source itself, packed or not; lists it once."""
        if self._source is None:
            self._source = open_source(
                self.source, self.size, self.splits, self.split_seed, self.image_column,
                download=self.cache != "none", link_root=self.link_root,
            )  # fmt: skip
        return self._source

    @property
    def packed(self) -> Path | None:
        """The packed cache that `source` is, if it is the directory of one."""
        path = Path(self.source).expanduser()
        # A folder of images may hold a manifest of its own.
        found = all((path / name).is_file() for name in (MANIFEST, "sha256.npy"))
        return path if found else None

    def open_cache(self) -> PackedCache:
        """Opens the packed cache, and creates it first if it does not exist.

        Raises:
            DataError: If that fails, or `source` is a packed cache of images of another size.
        """
        if self._packed_cache is not None:
            return self._packed_cache
        packed = self.packed
        if packed is None:
            cache = ingest(
                self.open_source(),
                self.cache_dir,
                self.cache,
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
        self._packed_cache = cache
        return cache

    def prepare_data(self) -> None:
        """Packs the images, once on each machine."""
        if self.cache != "none":
            self.open_cache()

    def setup(self, stage: str | None = None) -> None:
        """Opens the images.

        Raises:
            ConfigError: If the training split is smaller than the global batch, or the order
                needs more memory than `memory`.
            DataError: If a split that the stage needs is empty.
        """
        self.open()
        needed = {"validate": ["val"], "test": ["test"]}.get(stage or "", ["train", "val"])
        for split in needed:
            if not len(self.images[split]):
                raise DataError(
                    f"data.source={self.source} has no image for the {split} split; "
                    f"change data.splits (now {self.splits}), add images, or set data.split=all "
                    "to divide all images by data.splits"
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
        sha256: np.ndarray | None
        if self.cache == "none" and self.packed is None:
            source = self.open_source()
            images = SourceImages(source, self._memory_limit - self._in_flight(source))
            names, native_splits, sha256 = source.names, source.native_splits, None
        else:
            cache = self.open_cache()
            images, names, sha256 = cache.images, cache.names, cache.sha256
            native_splits = cache.native_splits
            if self.packed is None:  # an earlier version may have packed them as other splits
                source = self.open_source()
                known = dict(zip(source.names, source.native_splits, strict=True))
                native_splits = [known[name] for name in names]
        self._log_ignored()
        labels = self._labels(names)
        self.is_divided = self.split is None and set(native_splits) == {"train"}
        parts = split_images(names, native_splits, self.splits, self.split_seed, self.split)
        for split, positions in parts.items():
            text = "\n".join(names[k] for k in positions)
            split_labels = None if labels is None else labels[positions]
            self.images[split] = Split(images, positions, split_labels)
            self._hashes[split] = {
                "names": hashlib.sha256(text.encode()).hexdigest()[:16],
                "content": None
                if sha256 is None
                else hashlib.sha256(sha256[positions].tobytes()).hexdigest()[:16],
            }

    def _log_ignored(self) -> None:
        """Logs the files of the source that are not used."""
        source = self._source
        if source is None or not source.ignored or (self.trainer and self.trainer.global_rank):
            return
        log.warning(
            "data.source=%s: %d images are used; ignored: %s",
            self.source, len(source.names),
            ", ".join(f"{count} {kind}" for kind, count in source.ignored.items()),
        )  # fmt: skip

    def _labels(self, names: list[str]) -> np.ndarray | None:
        """The class of each image, int64; read from the source, as caches have none."""
        if self.label is None:
            return None
        if self.packed is not None:
            raise ConfigError(
                f"data.label={self.label}: the packed cache data.source={self.source} has no "
                "classes; set data.source to the source of the images"
            )
        source = self.open_source()
        self.classes, labels = source.labels(self.label)
        places = {name: k for k, name in enumerate(source.names)}
        return labels[[places[name] for name in names]]  # bad images may have been skipped

    @property
    def _memory_limit(self) -> int:
        """Bytes that may be allocated."""
        return int(MEMORY_SHARE * self.memory * 2**30)

    def _in_flight(self, source: Source) -> int:
        """Bytes of the batches in memory, and of groups while they are read, in pieces."""
        batches = Loader.batches_held(self.num_workers) * self.batch_size * self.size**2 * 3
        if not source.group_access_only:
            return batches
        return batches + 3 * max(1, self.num_workers) * max(source.group_bytes)

    def _check_streaming(self, world: int) -> None:
        images = self.images["train"].images
        if not isinstance(images, SourceImages) or not images.source.group_access_only:
            return
        if self.order == "shuffle":
            raise ConfigError(
                f"data.order=shuffle with data.cache=none would read a complete row group of "
                f"data.source={self.source} for almost every image; set data.order=interleave, "
                "or data.cache=uint8"
            )
        if self.interleave % world:
            log.warning(
                "data.interleave=%d is not a multiple of the %d devices: %d of them read each row "
                "group; set data.interleave=%d",
                self.interleave, world, world // gcd(self.interleave, world),
                -(-self.interleave // world) * world,
            )  # fmt: skip
        groups = open_groups(self.interleave, self.shuffle_buffer, world)
        kept = min(groups, len(images.groups)) * max(images.source.group_bytes)
        other = self._in_flight(images.source)
        if kept + other > self._memory_limit:
            raise ConfigError(
                f"data.interleave={self.interleave} and data.shuffle_buffer={self.shuffle_buffer} "
                f"on {world} device(s) hold {groups} row groups at once, {kept / 2**30:.3g} GiB, "
                f"and reads and batches take {other / 2**30:.3g} GiB, which is above "
                f"{MEMORY_SHARE:.0%} of data.memory={self.memory}; lower data.shuffle_buffer, "
                "data.interleave or data.num_workers, raise data.memory, or set data.cache=bytes"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns hashes of the names and pixels of each split; checkpoints store them."""
        return {"splits": self._hashes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compares the splits of a checkpoint with the present ones.

        The same images, in the same order, may come from another source.

        Raises:
            DataError: If they are not the same images; shows both hashes.
        """
        for split, present in self._hashes.items():
            saved = state_dict["splits"][split]
            compared = _compared(present, saved)
            if saved[compared] != present[compared]:
                raise DataError(
                    f"the {split} split of data.source={self.source} has {compared} hash "
                    f"{present[compared]}, that of the run {saved[compared]}: images were added, "
                    "removed, renamed or changed. Resume with the images of the run, or start a "
                    "new run"
                )

    def has_splits(self, saved: Mapping[str, Any]) -> bool:
        """Returns whether the splits have the hashes of `state_dict`, after `setup`."""
        pairs = [(each, saved.get(split)) for split, each in self._hashes.items()]
        return all(old and old[k := _compared(new, old)] == new[k] for new, old in pairs)

    def _loader(self, split: str, *, train: bool = False) -> Loader:
        trainer, images = self.trainer, self.images[split]
        order: Callable[[Tensor], Tensor] | None = None
        if train and self.order == "interleave":
            order = partial(
                interleaved, groups=images.groups, streams=self.interleave,
                buffer=self.shuffle_buffer,
            )  # fmt: skip
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
            drop_last=self.drop_last,
            epoch=(lambda: trainer.current_epoch) if trainer else (lambda: 0),
            workers=self.num_workers,
            pin=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )

    def train_dataloader(self) -> Loader:
        """Returns the training images in another order in each epoch."""
        return self._loader("train", train=True)

    def val_dataloader(self) -> Loader:
        """Returns the validation images in order."""
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        """Returns the test images in order."""
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

    def on_after_batch_transfer(
        self, batch: dict[str, Any], dataloader_idx: int
    ) -> dict[str, Any]:
        """Adds `x_0`, float32 in [-1, 1], of shape (B, 3, H, W), in place of `image`."""
        images = batch.pop("image")
        if self.flip and batch["split"] == "train":
            mirrored = KeyedGenerator(make_key(batch["key"], "flip")).uniform() < 0.5
            images = images.where(~mirrored[:, None, None, None], images.flip(2))
        batch["x_0"] = to_model(images)
        return batch


def _compared(present: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """The hash that decides: of the pixels if both are known; with cache="none" only names are."""
    return "content" if present["content"] and saved["content"] else "names"
