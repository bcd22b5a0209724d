r"""Batches in an order that is a pure function of (seed, epoch, N).

Global batch k of an epoch is positions kB, ..., (k + 1)B - 1 of that epoch's permutation, B the
batch size of all devices together; rank r of W takes every W-th of them from r. So the ranks share
out the very batches that one device would see, and a run goes on where it stopped on any number of
devices. The state is a few integers, equal on every rank.
"""

__all__ = ["Loader"]

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.noise import KeyedGenerator, make_key


class Loader:
    """Iterates over the images of one split.

    A batch is a dictionary: `image` uint8 (B, H, W, 3), `index` int64 (B,), the images' places in
    the split, `key` int64 (B,), which names every random draw made for them, and `split`.

    Arguments:
        images: The images, uint8, of shape (N, H, W, 3).
        split: The split's name.
        batch_size: Images of a batch on one device.
        seed: Seed of the order and of the keys.
        rank: This device's number among `world`.
        world: The number of devices.
        shuffle: Whether each epoch has an order of its own and only whole batches; else all images
            come in their own order, and the last batch may be smaller.
        epoch: Returns the current epoch.
    """

    def __init__(
        self,
        images: np.ndarray,
        split: str,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = False,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self.images, self.split, self.batch_size = images, split, batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.shuffle, self.epoch = shuffle, epoch
        self._position = {"epoch": -1, "consumed": 0}
        self._resume: dict[str, int] | None = None  # where the next pass starts, if not at 0

    def __len__(self) -> int:
        """The number of batches of a whole epoch on this rank."""
        count, batch = len(self.images), self.batch_size * self.world
        if self.shuffle:
            return count // batch
        mine = len(range(self.rank, count, self.world))
        return -(-mine // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """Returns the order of all N images in an epoch, int64."""
        count = len(self.images)
        if not self.shuffle:
            return torch.arange(count)
        key = make_key(self.seed, self.split, "order", epoch).reshape(1)
        return torch.argsort(KeyedGenerator(key).uniform(count, dtype=torch.float64)[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator: nothing is decided before the first `next`, when the epoch is known.
        epoch = self.epoch()
        resume, self._resume = self._resume, None
        consumed = resume["consumed"] if resume and resume["epoch"] == epoch else 0
        order = self.order(epoch)
        step = self.batch_size * self.world
        left = len(order) - consumed  # a resumed epoch may have begun with another batch size
        end = consumed + left // step * step if self.shuffle else len(order)
        for first in range(consumed, end, step):
            index = order[first : min(first + step, end)][self.rank :: self.world]
            self._position = {"epoch": epoch, "consumed": first + step}
            if len(index):
                yield self._batch(index, epoch)
        self._position = {"epoch": epoch, "consumed": end}

    def _batch(self, index: Tensor, epoch: int) -> dict[str, Any]:
        return {
            "image": torch.from_numpy(self.images[index.numpy()]),
            "index": index,
            "key": make_key(self.seed, self.split, epoch if self.shuffle else 0, index),
            "split": self.split,
        }

    def state_dict(self) -> dict[str, int]:
        """Returns the place in the epoch, the same on every rank."""
        return {**self._position, "seed": self.seed, "size": len(self.images)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a place in an epoch.

        Raises:
            ValueError: If the state is of another seed or number of images.
        """
        for name, mine in (("seed", self.seed), ("size", len(self.images))):
            if state[name] != mine:
                raise ValueError(
                    f"the checkpoint's {self.split} data have {name} {state[name]}, "
                    f"these have {mine}; resume with the same data"
                )
        self._position = {"epoch": state["epoch"], "consumed": state["consumed"]}
        self._resume = self._position
