r"""The order of an epoch: a permutation that is a pure function of (seed, epoch, N).

`shuffled` is a uniform one. `lanes` reads a set that lies in groups (row groups of parquet files,
stretches of a file larger than the memory) group by group, and still mixes well:

    1.  the groups are put in a random order and taken k at a time, a window;
    2.  the images of each window are put in a random order, one window after the other;
    3.  the list is cut into L lanes of equal length, and position p of the epoch is the next
        image of lane p mod L.

At any time an epoch draws from L windows in different places of the set. With W devices, W a
divisor of L, device r gets the positions r, r + W, ... and so L/W lanes of its own: it holds
k L/W groups at a time and reads almost no group twice. Both orders are ordinary permutations, so
that sharing out, resuming and changing the number of devices are the same for both.
"""

__all__ = ["lanes", "live_groups", "shuffled"]

from math import gcd

import torch
from torch import Tensor

from diffusion_lab.rng import KeyedGenerator, make_key


def _uniform(key: Tensor, count: int) -> Tensor:
    return KeyedGenerator(key.reshape(1)).uniform(count, dtype=torch.float64)[0]


def shuffled(key: Tensor, count: int) -> Tensor:
    """Returns a random permutation of 0, ..., count - 1, int64.

    Arguments:
        key: The key of the epoch; see `make_key`.
        count: The number of images N.
    """
    return torch.argsort(_uniform(key, count))


def lanes(key: Tensor, groups: list[int], count: int, window: int) -> Tensor:
    """Returns a permutation of 0, ..., N - 1 that reads group by group, int64.

    Arguments:
        key: The key of the epoch; see `make_key`.
        groups: The number of images of each group; they lie one after the other.
        count: The number of lanes L, at least 1.
        window: The number k of groups that are mixed, at least 1.
    """
    length = torch.tensor(groups, dtype=torch.int64)
    total = int(length.sum())
    place = torch.argsort(_uniform(make_key(key, "groups"), len(groups))).argsort()
    which = (place // window).repeat_interleave(length)  # the window of each image
    mixed = torch.argsort(which + _uniform(make_key(key, "images"), total))
    size = -(-total // count)
    # The first lanes have one image more if L does not divide N: they end with a row of their own.
    full = total - (size - 1) * count
    first = torch.arange(count) * (size - 1) + torch.arange(count).clamp(max=full)
    position = torch.arange(total)
    return mixed[first[position % count] + position // count]


def live_groups(count: int, window: int, world: int) -> int:
    """Returns how many groups a device holds at once: one window a lane, and a group to come.

    Arguments:
        count: The number of lanes L.
        window: The number k of groups of a window.
        world: The number W of devices.
    """
    return count // gcd(count, world) * (window + 1)
