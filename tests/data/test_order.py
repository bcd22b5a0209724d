"""Orders: permutations that mix well, and of groups that are read few times."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor

from diffusion_lab.data.shuffle import lanes, live_groups, shuffled
from diffusion_lab.rng import make_key

SHAPES = [  # groups, L, k
    ([100] * 30, 8, 2),
    ([7, 1, 30, 2, 2, 19, 5], 3, 2),
    ([1] * 50, 4, 3),
    ([10] * 3, 8, 2),
    ([2, 1], 8, 2),  # more lanes than images
    ([1], 1, 1),
    ([1], 5, 4),
    ([53], 4, 2),  # one group
    ([53], 1, 1),
    ([10] * 7, 1, 2),
    ([10] * 7, 2, 100),  # one window
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


@pytest.mark.parametrize("groups, count, window", SHAPES)
def test_lanes_are_a_permutation(groups: list[int], count: int, window: int) -> None:
    for epoch in range(3):
        order = lanes(key(epoch), groups, count, window)
        assert order.dtype == torch.int64
        assert sorted(order.tolist()) == list(range(sum(groups)))


def test_orders_are_functions_of_the_key() -> None:
    """Whatever was drawn before; epochs and seeds differ nearly everywhere."""
    groups = [100, 60, 40, 100, 100]
    for make in (lambda k: shuffled(k, 400), lambda k: lanes(k, groups, 4, 2)):
        one = make(key(0))
        torch.manual_seed(5), torch.rand(3), make(key(1))
        assert torch.equal(make(key(0)), one)
        for other in (make(key(1)), make(key(2)), make(key(0, seed=1))):
            assert int((one == other).sum()) < 20  # about 1 by chance, with lanes about 2


@pytest.mark.parametrize("groups, count, window", SHAPES[:-1])
def test_each_lane_reads_window_after_window(groups: list[int], count: int, window: int) -> None:
    """One lane after the other, the images come by windows of k whole groups."""
    order = lanes(key(4), groups, count, window)
    lane = [order[first::count] for first in range(count)]
    lengths = [len(each) for each in lane]
    assert max(lengths) - min(lengths) <= 1
    rest, windows = which(groups)[torch.cat(lane)].tolist(), 0
    while rest:
        inside = set(list(dict.fromkeys(rest))[:window])
        size = sum(groups[k] for k in inside)
        # All images of these groups come before any other.
        assert set(rest[:size]) == inside and not set(rest[size:]) & inside
        rest, windows = rest[size:], windows + 1
    assert windows == -(-len(groups) // window)


def test_at_any_time_the_images_come_from_few_groups() -> None:
    """From L windows of k groups, and from twice as many while one window's images are drawn."""
    number, count, window = which([100] * 300), 8, 2
    together = count * window * 100  # images that L windows hold
    lane, uniform = (
        [len(set(part.tolist())) for part in number[order].split(together)[:-1]]
        for order in (lanes(key(0), [100] * 300, count, window), shuffled(key(0), 30_000))
    )
    assert count * window <= min(lane) and max(lane) <= 2 * count * window
    assert min(uniform) > 280
    # A batch draws from most of the groups that are open: 8 images a lane from 2 groups.
    batches = number[lanes(key(0), [100] * 300, count, window)].split(64)[:-1]
    sizes = [len(set(batch.tolist())) for batch in batches]
    assert max(sizes) <= 2 * count * window and sum(sizes) / len(sizes) > 0.9 * count * window


# --- reads --------------------------------------------------------------------------------------


def reads(order: Tensor, number: Tensor, kept: int, world: int) -> int:
    """How many groups W devices read together, each of which keeps those that it used last."""
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
@pytest.mark.parametrize("window", [2, 3, 4])
def test_lanes_read_almost_no_group_twice(window: int, world: int) -> None:
    """Only a window that two lanes share is read by both: at most k (L - 1) = 28 groups more.

    Measured: 312 to 359 of 300 groups; the shuffled order needs above 26 000.
    """
    groups = [100] * 300
    number, kept = which(groups), live_groups(8, window, world)
    assert kept == 8 // world * (window + 1)
    for epoch in range(2):
        count = reads(lanes(key(epoch), groups, 8, window), number, kept, world)
        assert 300 <= count < 1.25 * 300
    assert reads(shuffled(key(0), 30_000), number, kept, world) > 10 * 1.25 * 300


def test_one_lane_reads_every_group_once() -> None:
    """With uneven groups, and with no group more than the window in memory."""
    groups = [30, 5, 1, 17, 40, 2, 2, 60, 8]
    for window in (1, 2, 4):
        for epoch in range(5):
            order = lanes(key(epoch), groups, 1, window)
            assert reads(order, which(groups), window, 1) == 9
            assert live_groups(1, window, 1) == window + 1


def test_live_groups_count_the_lanes_that_meet_on_a_device() -> None:
    """The positions r, r + W, ... of a device fall on L / gcd(L, W) lanes."""
    for count in (1, 4, 6, 8):
        for world in (1, 2, 3, 4, 8, 12):
            mine = {position % count for position in range(0, 48, world)}
            assert live_groups(count, 3, world) == 4 * len(mine)


# --- mixing -------------------------------------------------------------------------------------


def correlation(order: Tensor) -> float:
    """Of the place in the epoch with the place in the set."""
    return float(torch.corrcoef(torch.stack([torch.arange(len(order)), order]).double())[0, 1])


def test_the_epoch_goes_through_the_set_in_no_direction() -> None:
    """The correlation is that of 300 groups in a random order, 1/√300 a time and no mean.

    Lanes over groups in their own order would have 1/L = 0.12 every time.
    """
    groups, epochs = [100] * 300, 20
    lane = [correlation(lanes(key(e), groups, 8, 2)) for e in range(epochs)]
    assert max(map(abs, lane)) < 4 / 300**0.5
    assert abs(sum(lane) / epochs) < 3 / (300 * epochs) ** 0.5 < 0.05
    uniform = [correlation(shuffled(key(e), 30_000)) for e in range(epochs)]
    assert max(map(abs, uniform)) < 4 / 30_000**0.5


@pytest.mark.parametrize("image", [0, 57, 199])
def test_an_image_comes_anywhere_in_the_epoch(image: int) -> None:
    """Pearson's statistic of its place in 10 bins over 500 epochs: mean 9, deviation √18."""
    for make in (lambda k: shuffled(k, 200), lambda k: lanes(k, [20] * 10, 4, 2)):
        places = torch.tensor([int((make(key(e)) == image).nonzero()) for e in range(500)])
        counts = torch.bincount(places // 20, minlength=10).double()
        assert float(((counts - 50) ** 2 / 50).sum()) < 9 + 4 * 18**0.5


def test_neighbours_in_the_set_part() -> None:
    """In one window, but in any order in it: their distance in a lane is a third of a window's.

    Two uniform places in 0, ..., s - 1 differ by (s² - 1) / (3 s) on average, here s = 40.
    """
    distance = []
    for epoch in range(300):
        place = lanes(key(epoch), [20] * 10, 1, 2).argsort()
        distance.append(abs(int(place[7] - place[8])))
    assert max(distance) < 40
    assert abs(sum(distance) / 300 - 1599 / 120) < 4 * 9.4 / 300**0.5  # deviation 40 / √18
