r"""Data loader whose order is a pure function of (seed, epoch, N), with exact resume.

Global batch k of an epoch is positions kB, ..., (k + 1)B - 1 of that epoch's permutation, B the
global batch size; rank r of W takes every W-th of them from r. The ranks therefore share the
batches that one device would see, and a run can be resumed on any number of devices. The state is
a few integers, equal on every rank.

Threads prefetch batches, not processes: decoding releases the interpreter lock, nothing is copied
between processes, and S3 clients do not survive a fork.
"""

__all__ = ["Loader"]

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.data.images import Split
from diffusion_lab.errors import RunError
from diffusion_lab.rng import KeyedGenerator, make_key


@dataclass(frozen=True)
class _Batch:
    """Plan of a batch: this rank's images, the weight of their mean, the position after it."""

    index: Tensor
    stratum: Tensor
    weight: float
    consumed: int


class Loader:
    """Iterates over the images of one split.

    A batch is a dictionary:

    - `image`: uint8, (B, H, W, 3).
    - `index`: positions of the images in the split, int64, (B,).
    - `key`: keys of all random draws made for the images, int64, (B,).
    - `stratum`: stratified uniform numbers in [0, 1), float64, (B,); in training one in each of
      as many equal intervals as the global batch has images.
    - `split`: the name of the split.
    - `label`: classes of the images, int64, (B,), if there are any.
    - `weight`: the weight of this device's mean in the mean over devices, so that this is the mean
      over all images: 1, unless devices get unequal numbers of images.

    Arguments:
        images: The N images.
        split: The name of the split.
        batch_size: Images of a batch on one device.
        seed: Seed of the order and of the keys.
        rank: The rank of this device.
        world: The number W of devices.
        order: Function from the key of an epoch to a permutation of N. None keeps the order of
            the split, uses all images, and the last batch may be smaller.
        drop_last: Whether the images of an epoch that do not fill a batch are dropped (different
            ones in each epoch). Otherwise they are distributed over the devices, at least one
            each; if they are fewer than the devices, together with the previous batch, which
            exceeds the batch size only if that is 1. Without a previous batch, as after a resume
            on more devices than images are left, they are dropped.
        epoch: Returns the current epoch.
        workers: The number of threads that prefetch batches.
        pin: Whether batches are in page-locked memory, which GPUs copy asynchronously.
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
        drop_last: bool = True,
        epoch: Callable[[], int] = lambda: 0,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        self.images, self.split, self.batch_size = images, split, batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.make_order, self.drop_last, self.epoch = order, drop_last, epoch
        self.workers, self.pin = workers, pin
        self._position = {"epoch": -1, "consumed": 0}
        self._resume: dict[str, int] | None = None  # the start of the next pass, if not 0

    def __len__(self) -> int:
        """The number of batches of a complete epoch on this rank."""
        return len(self._cuts(0)) - 1

    @property
    def remaining(self) -> int:
        """The number of batches of the next pass, which may resume an epoch."""
        resume = self._resume
        consumed = resume["consumed"] if resume and resume["epoch"] == self.epoch() else 0
        return len(self._cuts(consumed)) - 1

    def order(self, epoch: int) -> Tensor:
        """Returns the order of all N images in an epoch, int64."""
        if self.make_order is None:
            return torch.arange(len(self.images))
        return self.make_order(make_key(self.seed, self.split, "order", epoch))

    def _cuts(self, consumed: int) -> list[int]:
        """The starts of the remaining batches of an epoch, and the end of the last one."""
        count, step, world = len(self.images), self.batch_size * self.world, self.world
        if self.make_order is None:  # ranks may have unequal numbers of batches
            mine = len(range(self.rank + consumed, count, world))
            last = -(-mine // self.batch_size)
            return [*range(consumed, consumed + last * step, step), count]
        cuts = list(range(consumed, count + 1, step))
        rest = count - cuts[-1]
        if rest and not self.drop_last:
            if rest >= world:
                cuts.append(count)
            elif len(cuts) > 1:  # fewer than the devices: merged with the previous one
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
            stratum = stratum.clamp(max=1 - 2**-53)  # rounding may give 1
            weight = len(mine) * self.world / (last - first)
            yield _Batch(order[mine], stratum, weight, last)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator: the epoch is read at the first `next`, when it is known.
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
        ahead: deque[tuple[_Batch, Future[Tensor]]] = deque()
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
        """Returns the largest number of batches in memory, those in use and prefetched."""
        return workers + 3 if workers else 2

    def _fetch(self, batch: _Batch) -> Tensor:
        image = torch.from_numpy(self.images[batch.index.numpy()])
        return image.pin_memory() if self.pin else image

    def _checksum(self, epoch: int) -> int:
        """A checksum of the order of an epoch."""
        digest = hashlib.sha256(self.order(epoch).numpy().tobytes()).digest()
        return int.from_bytes(digest[:7], "little")

    def state_dict(self) -> dict[str, int]:
        """Returns the position in the epoch, the same on every rank."""
        return {
            **self._position,
            "seed": self.seed,
            "size": len(self.images),
            "order": self._checksum(self._position["epoch"]),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from a position in an epoch.

        Raises:
            RunError: If the state has another seed, number of images, or order.
        """
        mine = {"seed": self.seed, "size": len(self.images)}
        mine["order"] = self._checksum(state["epoch"])
        for name, value in mine.items():
            if state.get(name, value) != value:
                raise RunError(
                    f"the {self.split} split of the checkpoint has {name}={state[name]}, the "
                    f"present one {value}; resume with the same images in the same order"
                )
        self._position = {"epoch": state["epoch"], "consumed": state["consumed"]}
        self._resume = self._position
