"""Shuffle orders: uniform permutations, and interleaved ones that read each group few times."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from diffusion_lab.data.shuffle import interleaved, open_groups, shuffled
from diffusion_lab.rng import make_key

SHAPES = [  # groups, L streams, buffers of k groups
    ([100] * 30, 8, 2),
    ([7, 1, 30, 2, 2, 19, 5], 3, 2),
    ([1] * 50, 4, 3),
    ([10] * 3, 8, 2),
    ([2, 1], 8, 2),  # more streams than images
    ([1], 1, 1),
    ([1], 5, 4),
    ([53], 4, 2),  # one group
    ([53], 1, 1),
    ([10] * 7, 1, 2),
    ([10] * 7, 2, 100),  # one buffer
    ([0, 12, 0, 0, 7, 0], 2, 1),  # groups without an image
]


def key(epoch: int, seed: int = 0) -> Tensor:
    return make_key(seed, "train", "order", epoch)


def which(groups: list[int]) -> Tensor:
    """The group of each image."""
    return torch.arange(len(groups)).repeat_interleave(torch.tensor(groups, dtype=torch.int64))


@pytest.mark.parametrize("count", [1, 2, 17, 1000])
def test_shuffled_is_a_permutation(count: int) -> None:
    order = shuffled(key(0), count)
    assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(count))
    assert count < 17 or order.tolist() != list(range(count))


@pytest.mark.parametrize("groups, count, buffer", SHAPES)
def test_interleaved_is_a_permutation(groups: list[int], count: int, buffer: int) -> None:
    for epoch in range(3):
        order = interleaved(key(epoch), groups, count, buffer)
        assert order.dtype == torch.int64
        assert sorted(order.tolist()) == list(range(sum(groups)))


def test_orders_are_functions_of_the_key() -> None:
    """The order does not depend on earlier draws; epochs and seeds give different orders."""
    groups = [100, 60, 40, 100, 100]
    for make in (lambda k: shuffled(k, 400), lambda k: interleaved(k, groups, 4, 2)):
        one = make(key(0))
        torch.manual_seed(5), torch.rand(3), make(key(1))
        assert torch.equal(make(key(0)), one)
        for other in (make(key(1)), make(key(2)), make(key(0, seed=1))):
            assert int((one == other).sum()) < 20  # about 1 agrees by chance, about 2 for streams


@pytest.mark.parametrize("groups, count, buffer", SHAPES[:-1])
def test_each_stream_reads_buffer_after_buffer(groups: list[int], count: int, buffer: int) -> None:
    """The images of concatenated streams come in buffers of k complete groups."""
    order = interleaved(key(4), groups, count, buffer)
    stream = [order[first::count] for first in range(count)]
    lengths = [len(each) for each in stream]
    assert max(lengths) - min(lengths) <= 1
    rest, buffers = which(groups)[torch.cat(stream)].tolist(), 0
    while rest:
        inside = set(list(dict.fromkeys(rest))[:buffer])
        size = sum(groups[k] for k in inside)
        # All images of these groups come before all others.
        assert set(rest[:size]) == inside and not set(rest[size:]) & inside
        rest, buffers = rest[size:], buffers + 1
    assert buffers == -(-len(groups) // buffer)


def test_consecutive_images_come_from_few_groups() -> None:
    """They come from L buffers of k groups, or from twice as many while the buffers change."""
    number, count, buffer = which([100] * 300), 8, 2
    together = count * buffer * 100  # the number of images in L buffers
    stream, uniform = (
        [len(set(part.tolist())) for part in number[order].split(together)[:-1]]
        for order in (interleaved(key(0), [100] * 300, count, buffer), shuffled(key(0), 30_000))
    )
    assert count * buffer <= min(stream) and max(stream) <= 2 * count * buffer
    assert min(uniform) > 280
    # A batch has images of most open groups: 8 images per stream from 2 groups.
    batches = number[interleaved(key(0), [100] * 300, count, buffer)].split(64)[:-1]
    sizes = [len(set(batch.tolist())) for batch in batches]
    assert max(sizes) <= 2 * count * buffer and sum(sizes) / len(sizes) > 0.9 * count * buffer


# --- reads --------------------------------------------------------------------------------------


def reads(order: Tensor, number: Tensor, kept: int, world: int) -> int:
    """The number of groups that W devices read, if each keeps its last used groups."""
    total = 0
    drawn = number[order].tolist()
    for rank in range(world):
        live: OrderedDict[int, None] = OrderedDict()
        for group in drawn[rank::world]:
            total += group not in live
            live[group] = None
            live.move_to_end(group)
            if len(live) > kept:
                live.popitem(last=False)
    return total


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("buffer", [2, 3, 4])
def test_interleaved_reads_almost_no_group_twice(buffer: int, world: int) -> None:
    """Only a buffer that two streams share is read twice: at most k (L - 1) = 28 additional
    groups.

    Measured: 312 to 359 reads of 300 groups; the shuffled order needs more than 26 000.
    """
    groups = [100] * 300
    number, kept = which(groups), open_groups(8, buffer, world)
    assert kept == 8 // world * (buffer + 1)
    for epoch in range(2):
        count = reads(interleaved(key(epoch), groups, 8, buffer), number, kept, world)
        assert 300 <= count < 1.25 * 300
    assert reads(shuffled(key(0), 30_000), number, kept, world) > 10 * 1.25 * 300


def test_one_stream_reads_every_group_once() -> None:
    """The groups have different sizes, and only the groups of one buffer are kept in memory."""
    groups = [30, 5, 1, 17, 40, 2, 2, 60, 8]
    for buffer in (1, 2, 4):
        for epoch in range(5):
            order = interleaved(key(epoch), groups, 1, buffer)
            assert reads(order, which(groups), buffer, 1) == 9
            assert open_groups(1, buffer, 1) == buffer + 1


def test_open_groups_counts_the_streams_of_a_device() -> None:
    """The positions r, r + W, ... of a device belong to L / gcd(L, W) streams."""
    for count in (1, 4, 6, 8):
        for world in (1, 2, 3, 4, 8, 12):
            mine = {position % count for position in range(0, 48, world)}
            assert open_groups(count, 3, world) == 4 * len(mine)


# --- uniformity ---------------------------------------------------------------------------------


def correlation(order: Tensor) -> float:
    """The correlation of the position in the epoch with the position in the dataset."""
    return float(torch.corrcoef(torch.stack([torch.arange(len(order)), order]).double())[0, 1])


def test_order_is_uncorrelated_with_the_position_in_the_dataset() -> None:
    """The correlation is that of 300 groups in random order: deviation 1/√300 and mean 0.

    Streams over groups in their stored order would have 1/L = 0.12 in every epoch.
    """
    groups, epochs = [100] * 300, 20
    stream = [correlation(interleaved(key(e), groups, 8, 2)) for e in range(epochs)]
    assert max(map(abs, stream)) < 4 / 300**0.5
    assert abs(sum(stream) / epochs) < 3 / (300 * epochs) ** 0.5 < 0.05
    uniform = [correlation(shuffled(key(e), 30_000)) for e in range(epochs)]
    assert max(map(abs, uniform)) < 4 / 30_000**0.5


@pytest.mark.parametrize("image", [0, 57, 199])
def test_position_of_an_image_in_the_epoch_is_uniform(image: int) -> None:
    """Pearson's statistic of its position in 10 bins over 500 epochs has mean 9, deviation √18."""
    for make in (lambda k: shuffled(k, 200), lambda k: interleaved(k, [20] * 10, 4, 2)):
        places = torch.tensor([int((make(key(e)) == image).nonzero()) for e in range(500)])
        counts = torch.bincount(places // 20, minlength=10).double()
        assert float(((counts - 50) ** 2 / 50).sum()) < 9 + 4 * 18**0.5


def test_neighbours_in_the_dataset_are_separated() -> None:
    """They are in one buffer in random order, so their mean distance is a third of its size.

    Two uniform positions in 0, ..., s - 1 differ by (s² - 1) / (3 s) on average, here with s = 40.
    """
    distance = []
    for epoch in range(300):
        place = interleaved(key(epoch), [20] * 10, 1, 2).argsort()
        distance.append(abs(int(place[7] - place[8])))
    assert max(distance) < 40
    assert abs(sum(distance) / 300 - 1599 / 120) < 4 * 9.4 / 300**0.5  # deviation 40 / √18
