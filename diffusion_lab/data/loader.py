r"""Batches in an order that is a pure function of (seed, epoch, N).

Global batch k of an epoch is positions kB, ..., (k + 1)B - 1 of that epoch's permutation, B the
batch size of all devices together; rank r of W takes every W-th of them from r. So the ranks share
out the very batches that one device would see, and a run goes on where it stopped on any number of
devices. The state is a few integers, equal on every rank.

Batches are fetched ahead by threads, not processes: decoding releases Python's lock, nothing is
copied between processes, and clients of S3 do not survive a fork.
"""

__all__ = ["TAILS", "Loader"]

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.data.images import Split
from diffusion_lab.errors import RunError
from diffusion_lab.rng import KeyedGenerator, make_key

TAILS = ("drop", "spread")


@dataclass(frozen=True)
class _Batch:
    """A batch to be: this rank's images, the weight of their mean, and what is consumed then."""

    index: Tensor
    stratum: Tensor
    weight: float
    consumed: int


class Loader:
    """Iterates over the images of one split.

    A batch is a dictionary: `image` uint8 (B, H, W, 3); `index` int64 (B,), the images' places in
    the split; `key` int64 (B,), which names every random draw made for them; `stratum` float64
    (B,), uniform numbers in [0, 1), in training one in each of as many equal intervals as the
    batch of all devices has images; `split`; `label` int64 (B,), the images' classes, if
    they have any; and `weight`, with which the mean over this device's
    images enters the mean over the devices, so that it is the mean over all images: 1, except
    where devices get unequal numbers of them.

    Arguments:
        images: The images, N of them.
        split: The split's name.
        batch_size: Images of a batch on one device.
        seed: Seed of the order and of the keys.
        rank: This device's number among `world`.
        world: The number W of devices.
        order: Makes an epoch's permutation of N from its key. None takes the images in their own
            order, all of them, and the last batch may be smaller.
        tail: Of an epoch's images that make no whole batch, "drop" leaves them out, others in each
            epoch, and "spread" shares them out among the devices, at least one each: if they are
            too few, with the batch before, which only for B = 1 gets larger than B. Where there is
            none, as after a resume on more devices than images are left, they are left out.
        epoch: Returns the current epoch.
        workers: How many threads fetch batches ahead.
        pin: Whether batches are put into page-locked memory, from which GPUs copy meanwhile.
    """

    def __init__(
        self,
        images: Split,
        split: str,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        order: Callable[[Tensor], Tensor] | None = None,
        tail: str = "drop",
        epoch: Callable[[], int] = lambda: 0,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.images, self.split, self.batch_size = images, split, batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.make_order, self.tail, self.epoch = order, tail, epoch
        self.workers, self.pin = workers, pin
        self._position = {"epoch": -1, "consumed": 0}
        self._resume: dict[str, int] | None = None  # where the next pass starts, if not at 0

    def __len__(self) -> int:
        """The number of batches of a whole epoch on this rank."""
        return len(self._cuts(0)) - 1

    @property
    def remaining(self) -> int:
        """The number of batches of the next pass, which may be a resumed one."""
        resumed = self._resume and self._resume["epoch"] == self.epoch()
        return len(self._cuts(self._resume["consumed"] if resumed else 0)) - 1

    def order(self, epoch: int) -> Tensor:
        """Returns the order of all N images in an epoch, int64."""
        if self.make_order is None:
            return torch.arange(len(self.images))
        return self.make_order(make_key(self.seed, self.split, "order", epoch))

    def _cuts(self, consumed: int) -> list[int]:
        """Where the batches of the rest of an epoch begin, and where the last one ends."""
        count, step, world = len(self.images), self.batch_size * self.world, self.world
        if self.make_order is None:  # every rank has its own number of batches
            mine = len(range(self.rank + consumed, count, world))
            last = -(-mine // self.batch_size)
            return [*range(consumed, consumed + last * step, step), count]
        cuts = list(range(consumed, count + 1, step))
        rest = count - cuts[-1]
        if self.tail == "spread" and rest:
            if rest >= world:
                cuts.append(count)
            elif len(cuts) > 1:  # too few for the devices: shared with the batch before
                begin = cuts[-2]
                half = (count - begin) // 2
                cuts[-1:] = [count - half, count] if half >= world else [count]
        return cuts

    def _plan(self, epoch: int, consumed: int) -> Iterator[_Batch]:
        order, cuts = self.order(epoch), self._cuts(consumed)
        for first, last in pairwise(cuts):
            mine = torch.arange(first, last)[self.rank :: self.world]
            offset = KeyedGenerator(
                make_key(self.seed, self.split, "stratum", epoch, torch.tensor([first]))
            )
            stratum = (mine - first + offset.uniform(dtype=torch.float64)) / (last - first)
            stratum = stratum.clamp(max=1 - 2**-53)  # it may have been rounded up to 1
            weight = len(mine) * self.world / (last - first)
            yield _Batch(order[mine], stratum, weight, last)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator: nothing is decided before the first `next`, when the epoch is known.
        epoch = self.epoch()
        resume, self._resume = self._resume, None
        consumed = resume["consumed"] if resume and resume["epoch"] == epoch else 0
        self._position = {"epoch": epoch, "consumed": consumed}
        for batch, image in self._fetched(self._plan(epoch, consumed)):
            self._position = {"epoch": epoch, "consumed": batch.consumed}
            labels = self.images.labels
            yield {
                **({} if labels is None else {"label": torch.from_numpy(labels)[batch.index]}),
                "image": image,
                "index": batch.index,
                "key": make_key(
                    self.seed, self.split, epoch if self.make_order else 0, batch.index
                ),
                "stratum": batch.stratum,
                "split": self.split,
                "weight": batch.weight,
            }

    def _fetched(self, plan: Iterator[_Batch]) -> Iterator[tuple[_Batch, Tensor]]:
        if not self.workers:
            for batch in plan:
                yield batch, self._fetch(batch)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        ahead: deque = deque()
        try:
            for batch in plan:
                ahead.append((batch, pool.submit(self._fetch, batch)))
                if len(ahead) > self.workers + 1:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def batches_held(workers: int) -> int:
        """Returns how many batches there are at once at most, the user's and the next included."""
        return workers + 3 if workers else 2

    def _fetch(self, batch: _Batch) -> Tensor:
        image = torch.from_numpy(self.images[batch.index.numpy()])
        return image.pin_memory() if self.pin else image

    def _checksum(self, epoch: int) -> int:
        """A number that stands for the order of an epoch."""
        digest = hashlib.sha256(self.order(epoch).numpy().tobytes()).digest()
        return int.from_bytes(digest[:7], "little")

    def state_dict(self) -> dict[str, int]:
        """Returns the place in the epoch, the same on every rank."""
        return {
            **self._position,
            "seed": self.seed,
            "size": len(self.images),
            "order": self._checksum(self._position["epoch"]),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a place in an epoch.

        Raises:
            RunError: If the state is of another seed, number of images, or order.
        """
        mine = {"seed": self.seed, "size": len(self.images)}
        mine["order"] = self._checksum(state["epoch"])
        for name, value in mine.items():
            if state.get(name, value) != value:
                raise RunError(
                    f"the checkpoint's {self.split} data have {name} {state[name]}, "
                    f"these have {value}; resume with the same data and the same order of them"
                )
        self._position = {"epoch": state["epoch"], "consumed": state["consumed"]}
        self._resume = self._position
