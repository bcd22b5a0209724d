r"""Order of the images in an epoch: a permutation that is a pure function of (seed, epoch, N).

`shuffled` is a uniform permutation. `interleaved` reads a dataset that is stored in groups (row
groups of parquet files, blocks of a file larger than the memory) group by group, and still mixes
well:

    1.  the groups are put in a random order, and each k consecutive ones form a buffer;
    2.  the images of each buffer are put in a random order, one buffer after the other;
    3.  the list is cut into L streams of equal length, and position p of the epoch is the next
        image of stream p mod L.

At any time an epoch draws from L buffers in different places of the dataset. With W devices, W a
divisor of L, device r gets the positions r, r + W, ... and so L/W streams of its own: it holds
k L/W groups at a time and reads almost no group twice. Both orders are ordinary permutations, so
that sharding, resuming and changing the number of devices are the same for both.
"""

__all__ = ["interleaved", "open_groups", "shuffled"]

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


def interleaved(key: Tensor, groups: list[int], streams: int, buffer: int) -> Tensor:
    """Returns a permutation of 0, ..., N - 1 that reads group by group, int64.

    Arguments:
        key: The key of the epoch; see `make_key`.
        groups: The number of images of each group, in the order in which they are stored.
        streams: The number L of interleaved streams, at least 1.
        buffer: The number k of groups that are shuffled together, at least 1.
    """
    length = torch.tensor(groups, dtype=torch.int64)
    total = int(length.sum())
    place = torch.argsort(_uniform(make_key(key, "groups"), len(groups))).argsort()
    buffer_of = (place // buffer).repeat_interleave(length)  # the buffer of each image
    mixed = torch.argsort(buffer_of + _uniform(make_key(key, "images"), total))
    size = -(-total // streams)
    # The first streams are one image longer if L does not divide N; their last images form a row.
    longer = total - (size - 1) * streams
    first = torch.arange(streams) * (size - 1) + torch.arange(streams).clamp(max=longer)
    position = torch.arange(total)
    return mixed[first[position % streams] + position // streams]


def open_groups(streams: int, buffer: int, world: int) -> int:
    """Returns the number of groups that a device holds: one buffer a stream, and the next group.

    Arguments:
        streams: The number L of streams.
        buffer: The number k of groups of a buffer.
        world: The number W of devices.
    """
    return streams // gcd(streams, world) * (buffer + 1)
