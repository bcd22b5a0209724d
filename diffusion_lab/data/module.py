r"""The data module: source -> packed cache -> loader -> transform on the device.

Images travel as uint8, height x width x channels. On the device they are flipped (training only)
and scaled, x_0 = x / 127.5 - 1 in [-1, 1], float32; the permutation to (B, 3, H, W) costs nothing
and leaves the memory layout that convolutions like.
"""

__all__ = ["ImageDataModule"]

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch import Tensor

from diffusion_lab.data.cache import PackedCache, pack
from diffusion_lab.data.loader import Loader
from diffusion_lab.data.source import open_source
from diffusion_lab.errors import ConfigError, DataError
from diffusion_lab.noise import KeyedGenerator, make_key


def to_model(images: Tensor) -> Tensor:
    """Scales uint8 images (B, H, W, 3) to float32 in [-1, 1], of shape (B, 3, H, W)."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


class ImageDataModule(LightningDataModule):
    """Streams images of one size from any source.

    Arguments:
        source: See `open_source`.
        size: Height and width in pixels.
        batch_size: Images of a batch on one device.
        splits: For faces the number of images of each of train, val and test; otherwise shares.
        split_seed: Seed of the drawings or of the division into splits.
        seed: Seed of the training order and of every draw made for an image.
        flip: Whether half of the training images are mirrored.
        cache_dir: Where the packed images are kept.
        column: The column of images in parquet files.
    """

    def __init__(
        self,
        source: str,
        size: int,
        batch_size: int,
        splits: Mapping[str, float],
        split_seed: int = 0,
        seed: int = 0,
        flip: bool = True,
        cache_dir: str = "~/.cache/diffusion_lab",
        column: str = "image",
    ) -> None:
        super().__init__()
        self.source, self.size, self.column = source, size, column
        self.batch_size, self.splits = batch_size, dict(splits)
        self.split_seed, self.seed, self.flip = split_seed, seed, flip
        self.cache_dir = Path(cache_dir).expanduser()
        self.cache: PackedCache | None = None

    def _pack(self) -> PackedCache:
        source = open_source(self.source, self.size, self.splits, self.split_seed, self.column)
        return pack(source, self.cache_dir)

    def prepare_data(self) -> None:
        """Packs the images, once on each machine."""
        self._pack()

    def setup(self, stage: str | None = None) -> None:
        """Opens the packed images.

        Raises:
            ConfigError: If the training split is smaller than one batch of all devices.
            DataError: If a split that the stage needs is empty.
        """
        if self.cache is None:
            self.cache = self._pack()
        needed = {"validate": ["val"], "test": ["test"]}.get(stage, ["train", "val"])
        for split in needed:
            if not len(self.cache.images[split]):
                raise DataError(
                    f"data.source={self.source} leaves no image for the {split} split; "
                    f"change data.splits (now {self.splits}) or add images"
                )
        world = self.trainer.world_size if self.trainer else 1
        count = len(self.cache.images["train"])
        if stage == "fit" and count < self.batch_size * world:
            raise ConfigError(
                f"data.batch_size={self.batch_size} on {world} device(s) is more than the "
                f"{count} training images of data.source={self.source}; lower data.batch_size"
            )

    def state_dict(self) -> dict[str, dict[str, str]]:
        """Returns a hash of the names in each split; every checkpoint carries it."""
        hashes = {
            split: hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
            for split, names in self.cache.names.items()
        }
        return {"splits": hashes}

    def load_state_dict(self, state: dict[str, dict[str, str]]) -> None:
        """Holds a checkpoint's splits against those at hand.

        Raises:
            DataError: If they are not of the same images; shows both hashes.
        """
        for split, mine in self.state_dict()["splits"].items():
            if state["splits"][split] != mine:
                raise DataError(
                    f"the {split} split of data.source={self.source} has hash {mine}, that of the "
                    f"run {state['splits'][split]}: images were added, removed or renamed. Resume "
                    "with the images of the run, or start a new run"
                )

    def _loader(self, split: str, *, shuffle: bool = False) -> Loader:
        trainer = self.trainer
        return Loader(
            self.cache.images[split],
            split,
            self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            shuffle=shuffle,
            epoch=(lambda: trainer.current_epoch) if trainer else (lambda: 0),
        )

    def train_dataloader(self) -> Loader:
        """Returns the training images in a new order every epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> Loader:
        """Returns the validation images, each once."""
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        """Returns the test images, each once."""
        return self._loader("test")

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict:
        """Adds `x_0`, float32 in [-1, 1], of shape (B, 3, H, W), in place of `image`."""
        images = batch.pop("image")
        if self.flip and batch["split"] == "train":
            mirrored = KeyedGenerator(make_key(batch["key"], "flip")).uniform() < 0.5
            images = images.where(~mirrored[:, None, None, None], images.flip(2))
        batch["x_0"] = to_model(images)
        return batch
