"""Loader: order as a function of (seed, epoch, N), distribution over devices, resuming."""

import threading
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch

from diffusion_lab.data.images import Images, Split
from diffusion_lab.data.loader import Loader
from diffusion_lab.data.shuffle import interleaved, shuffled
from diffusion_lab.data.source import chunk_ranges
from diffusion_lab.errors import DataError, RunError
from diffusion_lab.rng import make_key


def make_images(count: int) -> np.ndarray:
    """Image k has the value k in the first channel and 255 - k in the last."""
    images = np.zeros((count, 2, 2, 3), dtype=np.uint8)
    images[..., 0] = np.arange(count)[:, None, None]
    images[..., 2] = 255 - np.arange(count)[:, None, None]
    return images


class Memory(Images):
    """Images in memory, one of which may be bad; records the requested positions."""

    def __init__(self, array: np.ndarray, bad: int | None = None) -> None:
        self.array, self.bad, self.size = array, bad, array.shape[1]
        self.names = [f"image {k}" for k in range(len(array))]
        self.groups = chunk_ranges(len(array), 10)
        self.asked: list[list[int]] = []

    def gather(self, positions: np.ndarray) -> np.ndarray:
        self.asked.append(positions.tolist())
        if self.bad in positions:
            raise DataError(f"{self.names[self.bad]}: not a readable JPEG or PNG")
        return self.array[positions]


class Clock:
    """The current epoch, which a test sets."""

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch

    def __call__(self) -> int:
        return self.epoch


def make_loader(count: int, batch_size: int, *, shuffle: bool = True, **kwargs) -> Loader:
    images = kwargs.pop("images", None) or Memory(make_images(count))
    order = partial(shuffled, count=count) if shuffle else None
    kwargs = {"seed": 0, "order": order, **kwargs}
    split = Split(images, np.arange(count))
    return Loader(split, kwargs.pop("split", "train"), batch_size, **kwargs)


def indices(loader: Loader | Iterator) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [k for batch in batches for k in batch]


# --- images of an epoch -------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_of_two_ranks_are_those_of_one_rank_interleaved(shuffle: bool) -> None:
    one = list(make_loader(45, 8, shuffle=shuffle))
    two = [list(make_loader(45, 4, rank=r, world=2, shuffle=shuffle)) for r in (0, 1)]
    assert len(one) == len(two[0]) == len(two[1]) == (5 if shuffle else 6)
    for whole, first, second in zip(one, *two, strict=True):
        assert len(first["index"]) - len(second["index"]) in (0, 1)
        for name in ("index", "key", "stratum", "image"):
            merged = torch.zeros_like(whole[name])
            merged[0::2], merged[1::2] = first[name], second[name]
            assert torch.equal(merged, whole[name]), name


def test_shuffled_epoch_drops_only_the_incomplete_batch() -> None:
    loader = make_loader(45, 8)
    batches = indices(loader)
    assert [len(b) for b in batches] == [8] * 5 and len(loader) == 5
    assert flat(batches) == loader.order(0)[:40].tolist()
    assert sorted(loader.order(0).tolist()) == list(range(45))
    assert len(set(flat(batches))) == 40
    ranks = [indices(make_loader(45, 4, rank=r, world=3)) for r in range(3)]
    assert [[len(b) for b in rank] for rank in ranks] == [[4] * 3] * 3
    assert len(set(flat([flat(rank) for rank in ranks]))) == 36
    assert all(batch["weight"] == 1 for batch in make_loader(45, 4, rank=1, world=3))


def test_dropped_images_differ_between_epochs() -> None:
    loader, dropped = make_loader(10, 8), set()
    for epoch in range(40):
        dropped |= set(loader.order(epoch)[8:].tolist())
    assert dropped == set(range(10))


@pytest.mark.parametrize(
    "count, world, batch_size", [(10, 3, 2), (7, 3, 2), (10, 3, 4), (2, 3, 1)]
)
def test_unshuffled_epoch_has_each_image_once(count: int, world: int, batch_size: int) -> None:
    seen = []
    for rank in range(world):
        loader = make_loader(count, batch_size, rank=rank, world=world, shuffle=False)
        batches = indices(loader)
        assert len(batches) == len(loader)
        assert flat(batches) == list(range(rank, count, world))
        assert all(0 < len(batch) <= batch_size for batch in batches)
        seen += flat(batches)
    assert sorted(seen) == list(range(count))


def test_images_match_their_index() -> None:
    images = make_images(45)
    for batch in make_loader(45, 8):
        assert batch["image"].dtype == torch.uint8 and batch["split"] == "train"
        assert np.array_equal(batch["image"].numpy(), images[batch["index"].numpy()])
        assert batch["image"][:, 0, 0, 0].tolist() == batch["index"].tolist()


def test_index_is_the_position_in_the_split() -> None:
    """The split has every third image, so its image k is image 3 k + 1 of the dataset."""
    split = Split(Memory(make_images(45)), np.arange(1, 45, 3))
    for batch in Loader(split, "val", 4, seed=0, order=partial(shuffled, count=15)):
        assert batch["image"][:, 0, 0, 0].tolist() == (3 * batch["index"] + 1).tolist()
        assert batch["split"] == "val"
        assert torch.equal(batch["key"], make_key(0, "val", 0, batch["index"]))


# --- incomplete batches -------------------------------------------------------------------------

ODD = [  # N, B, W: all remainders of some, B = 1, N = W, and fewer images than a batch
    *((count, 4, 3) for count in range(12, 25)),
    *((count, 2, 4) for count in range(8, 17)),
    *((count, 1, 5) for count in range(5, 16)),
    *((count, 3, 2) for count in (2, 3, 5, 6, 7, 13)),
    *((count, 8, 1) for count in (1, 7, 8, 9, 45)),
    *((count, 16, 7) for count in (7, 111, 113, 118, 119, 223, 230)),
]


@pytest.mark.parametrize("count, batch_size, world", ODD)
def test_drop_last_false_distributes_every_image_once(
    count: int, batch_size: int, world: int
) -> None:
    """All ranks have equally many batches, and the weighted mean of their means is the mean.

    Only for B = 1 may a rank have more than B images: fewer images than devices remain, and the
    previous batch cannot be halved.
    """
    value = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ranks = [
        list(make_loader(count, batch_size, rank=r, world=world, drop_last=False, epoch=Clock(3)))
        for r in range(world)
    ]
    lengths = {len(make_loader(count, batch_size, rank=r, world=world, drop_last=False))
               for r in range(world)}  # fmt: skip
    assert {len(rank) for rank in ranks} == lengths and len(lengths) == 1
    largest = batch_size + (1 if batch_size == 1 else 0)
    seen = []
    for number, parts in enumerate(zip(*ranks, strict=True)):
        sizes = [len(part["index"]) for part in parts]
        assert 1 <= min(sizes) and max(sizes) <= largest and max(sizes) - min(sizes) <= 1
        if number < len(ranks[0]) - 2:  # only the last two may differ
            assert sizes == [batch_size] * world
            assert [part["weight"] for part in parts] == [1] * world
        index = torch.cat([part["index"] for part in parts])
        means = torch.stack([value[part["index"]].mean() * part["weight"] for part in parts])
        assert float(means.mean()) == pytest.approx(float(value[index].mean()), rel=1e-12)
        assert len(torch.cat([part["image"] for part in parts])) == len(index)
        seen += index.tolist()
    assert sorted(seen) == list(range(count))


def test_weights_of_an_unequally_distributed_batch() -> None:
    """5 images on two devices, as 3 and 2, have the weights 6/5 and 4/5."""
    last = [list(make_loader(45, 4, rank=r, world=2, drop_last=False))[-1] for r in (0, 1)]
    assert [len(part["index"]) for part in last] == [3, 2]
    assert [part["weight"] for part in last] == pytest.approx([6 / 5, 4 / 5], rel=1e-15)


@pytest.mark.parametrize(
    "count, batch_size, world, sizes",
    [
        (29, 4, 3, [12, 12, 5]),  # 5 images are enough for 3 devices
        (26, 4, 3, [12, 7, 7]),  # 2 images are not enough: they share with the previous batch
        (25, 4, 3, [12, 7, 6]),
        (24, 4, 3, [12, 12]),
        (11, 1, 5, [5, 6]),  # 6 images cannot be halved on 5 devices
        (3, 4, 3, [3]),
        (7, 4, 3, [7]),
    ],
)
def test_sizes_of_the_last_batches_with_drop_last_false(
    count: int, batch_size: int, world: int, sizes: list[int]
) -> None:
    ranks = [
        indices(make_loader(count, batch_size, rank=r, world=world, drop_last=False))
        for r in range(world)
    ]
    assert [sum(map(len, parts)) for parts in zip(*ranks, strict=True)] == sizes


# --- threads ------------------------------------------------------------------------------------


class Slow(Memory):
    """Images whose earlier reads take longer."""

    def gather(self, positions: np.ndarray) -> np.ndarray:
        time.sleep(0.004 * (3 - len(self.asked) % 4))
        return super().gather(positions)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(v, two[k]) if isinstance(v, torch.Tensor) else v == two[k]
        for k, v in one.items()
    )


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_threads_do_not_change_the_batches(workers: int, drop_last: bool) -> None:
    alone = list(make_loader(45, 4, rank=1, world=2, drop_last=drop_last, epoch=Clock(2)))
    images = Slow(make_images(45))
    loader = make_loader(
        45, 4, rank=1, world=2, drop_last=drop_last, epoch=Clock(2), images=images, workers=workers
    )
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == (6 if not drop_last else 5)
        assert all(same(a, b) for a, b in zip(alone, batches, strict=True))
    assert len(images.asked) == 2 * len(alone)  # nothing is fetched twice


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_read_error_is_raised_by_the_iterator_and_names_the_image(workers: int) -> None:
    order = make_loader(45, 8).order(0)
    bad = int(order[19])
    loader = make_loader(45, 8, images=Memory(make_images(45), bad), workers=workers)
    seen = []
    with pytest.raises(DataError, match=f"^image {bad}: not a readable"):
        for batch in loader:
            seen.append(batch["index"].tolist())
    assert flat(seen) == order[:16].tolist()  # the two batches before it are returned
    assert loader.state_dict()["consumed"] == 16


def fetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("end", ["close", "error", "finish", "forget"])
def test_threads_end_with_the_iteration(workers: int, end: str) -> None:
    bad = int(make_loader(45, 8).order(0)[30]) if end == "error" else None
    before = set(fetching())
    iterator = iter(make_loader(45, 8, images=Memory(make_images(45), bad), workers=workers))
    next(iterator)
    threads = set(fetching()) - before
    assert 1 <= len(threads) <= workers
    if end == "close":
        iterator.close()
    elif end == "error":
        with pytest.raises(DataError):
            list(iterator)
    elif end == "finish":
        assert len(list(iterator)) == 4
    else:
        del iterator
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_closing_cancels_batches_that_have_not_started() -> None:
    """One thread prefetches two batches, the second of which has not started."""
    go = threading.Event()

    class Gated(Memory):
        def gather(self, positions: np.ndarray) -> np.ndarray:
            image = super().gather(positions)
            if len(self.asked) > 1:
                go.wait(20)
            return image

    images, before = Gated(make_images(45)), set(fetching())
    iterator = iter(make_loader(45, 8, images=images, workers=1))
    next(iterator)
    (thread,) = set(fetching()) - before
    iterator.close()
    go.set()
    thread.join(20)
    assert not thread.is_alive() and len(images.asked) <= 2


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_state_counts_the_returned_images(workers: int) -> None:
    """Prefetched batches are not counted, and their number is bounded."""
    images = Memory(make_images(97))
    loader = make_loader(97, 4, images=images, workers=workers)
    before, iterator = set(fetching()), iter(loader)
    seen = []
    for number in range(1, 6):
        seen.append(next(iterator)["index"].tolist())
        assert loader.state_dict()["consumed"] == 4 * number
        assert number <= len(images.asked) <= number + (workers and workers + 1)
    state = loader.state_dict()
    threads, deadline = set(fetching()) - before, time.monotonic() + 20
    while workers and len(images.asked) == 5 and time.monotonic() < deadline:
        time.sleep(0.01)  # on a busy machine the threads may not have run yet
    iterator.close()
    for thread in threads:
        thread.join(20)
    assert workers == 0 or len(images.asked) > 5  # some batches were prefetched
    resumed = make_loader(97, 4, workers=workers)
    resumed.load_state_dict(state)
    assert seen + indices(resumed) == indices(make_loader(97, 4))


# --- orders and keys ----------------------------------------------------------------------------


def order(epoch: int, seed: int = 0, split: str = "train") -> list[int]:
    return flat(indices(make_loader(64, 8, seed=seed, split=split, epoch=Clock(epoch))))


def test_order_depends_only_on_the_epoch_the_seed_and_the_split() -> None:
    orders = [order(0), order(1), order(2), order(0, seed=1), order(0, split="other")]
    assert all(sorted(o) == list(range(64)) for o in orders)
    assert len({tuple(o) for o in orders}) == 5
    assert list(range(64)) not in orders
    assert order(1) == orders[1] and order(0, seed=1) == orders[3]
    for other in orders[1:]:  # not just rotated: about one position in 64 agrees by chance
        assert sum(a == b for a, b in zip(orders[0], other, strict=True)) < 8


def test_positions_in_the_order_are_uniform() -> None:
    """The mean position of image 0 over 400 epochs is the uniform mean up to 4 standard errors."""
    loader = make_loader(16, 4)
    places = [loader.order(epoch).tolist().index(0) for epoch in range(400)]
    assert abs(np.mean(places) - 7.5) < 4 * (255 / 12) ** 0.5 / 20
    assert set(places) == set(range(16))


def keys(epoch: int, shuffle: bool, batch_size: int = 8) -> dict[int, int]:
    loader = make_loader(64, batch_size, shuffle=shuffle, epoch=Clock(epoch))
    return {
        int(index): int(key)
        for batch in loader
        for index, key in zip(batch["index"], batch["key"], strict=True)
    }


def test_keys_depend_on_the_epoch_only_if_shuffled() -> None:
    assert keys(0, False) == keys(5, False) == keys(5, False, batch_size=3)
    assert keys(3, True) == keys(3, True, batch_size=4)
    assert not set(keys(0, True).values()) & set(keys(1, True).values())
    assert len(set(keys(0, True).values())) == 64
    expected = make_key(0, "train", 3, torch.arange(64)).tolist()
    assert keys(3, True) == dict(enumerate(expected))


def test_epoch_is_read_at_the_first_batch() -> None:
    clock = Clock(0)
    loader = make_loader(64, 8, epoch=clock)
    iterator = iter(loader)
    clock.epoch = 4
    assert next(iterator)["index"].tolist() == order(4)[:8]


# --- stratified numbers -------------------------------------------------------------------------


def strata(world: int, batch_size: int, **kwargs) -> list[torch.Tensor]:
    """The stratified numbers of each global batch of an epoch, in the order of its images."""
    ranks = [
        list(make_loader(45, batch_size, rank=r, world=world, **kwargs)) for r in range(world)
    ]
    merged = []
    for parts in zip(*ranks, strict=True):
        whole = torch.zeros(sum(len(part["index"]) for part in parts), dtype=torch.float64)
        for rank, part in enumerate(parts):
            assert part["stratum"].dtype == torch.float64
            assert part["stratum"].shape == part["index"].shape
            whole[rank::world] = part["stratum"]
        merged.append(whole)
    return merged


@pytest.mark.parametrize("world, batch_size", [(1, 12), (2, 6), (3, 4), (4, 3)])
@pytest.mark.parametrize("drop_last, sizes", [(True, [12] * 3), (False, [12] * 3 + [9])])
def test_each_stratum_has_one_number_of_the_global_batch(
    world: int, batch_size: int, drop_last: bool, sizes: list[int]
) -> None:
    """Image k has a number in the k-th interval, with one offset for the whole batch."""
    batches, alone = (
        strata(world, batch_size, drop_last=drop_last),
        strata(1, 12, drop_last=drop_last),
    )
    assert [len(u) for u in batches] == sizes
    for u, one in zip(batches, alone, strict=True):
        assert torch.equal(u, one)  # for any number of devices
        assert (u * len(u)).floor().tolist() == list(range(len(u)))
        offset = u * len(u) - torch.arange(len(u))
        torch.testing.assert_close(offset, offset[:1].expand(len(u)), rtol=0, atol=1e-14)


def test_halved_last_batches_are_stratified() -> None:
    """45 images on 4 devices of 11: the batches of 44 and 1 become 23 and 22."""
    batches = strata(4, 11, drop_last=False)
    assert [len(u) for u in batches] == [23, 22]
    for u in batches:
        assert (u * len(u)).floor().tolist() == list(range(len(u)))


def test_strata_depend_only_on_epoch_seed_split_and_batch() -> None:
    changes = [{}, {"epoch": Clock(1)}, {"seed": 1}, {"split": "other"}]
    offsets = [12 * float(u[0]) for change in changes for u in strata(1, 12, **change)]
    assert len(set(offsets)) == 12 and all(0 <= offset < 1 for offset in offsets)
    again = [12 * float(u[0]) for change in changes for u in strata(1, 12, workers=2, **change)]
    assert again == offsets


def test_strata_are_uniform_and_uncorrelated() -> None:
    """The Kolmogorov distance of 1000 batches is small; successive batches are uncorrelated."""
    images = Memory(np.zeros((3000, 1, 1, 3), dtype=np.uint8))
    offsets = []
    for batch in make_loader(3000, 3, images=images):
        offsets.append(3 * batch["stratum"] - torch.arange(3))
    u = torch.stack(offsets)[:, 1]
    steps, ordered = torch.arange(1001, dtype=torch.float64) / 1000, u.sort().values
    distance = max(float((steps[1:] - ordered).max()), float((ordered - steps[:-1]).max()))
    assert distance < 1.95 / 1000**0.5  # exceeded with probability 1 in 1000
    correlation = float(((u[1:] - 0.5) * (u[:-1] - 0.5)).mean() * 12)
    assert abs(correlation) < 4 / 1000**0.5


def test_resumed_epoch_has_the_same_strata() -> None:
    """The epoch is resumed on one device and on two."""
    loader = make_loader(45, 8, epoch=Clock(2))
    whole, iterator = list(loader), iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    for world in (1, 2):
        for rank in range(world):
            resumed = make_loader(45, 8 // world, rank=rank, world=world, epoch=Clock(2))
            resumed.load_state_dict(state)
            for batch, full in zip(resumed, whole[2:], strict=True):
                assert torch.equal(batch["stratum"], full["stratum"][rank::world])


# --- resuming -----------------------------------------------------------------------------------


def interrupted(steps: int, epoch: int = 2, **kwargs) -> tuple[list[list[int]], dict]:
    """The first steps of an epoch, and the state after them."""
    loader = make_loader(45, 8, epoch=Clock(epoch), **kwargs)
    iterator = iter(loader)
    seen = [next(iterator)["index"].tolist() for _ in range(steps)]
    return seen, loader.state_dict()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_resumed_epoch_continues_exactly(steps: int, shuffle: bool) -> None:
    seen, state = interrupted(steps, shuffle=shuffle)
    whole = indices(make_loader(45, 8, shuffle=shuffle, epoch=Clock(2)))
    resumed = make_loader(45, 8, shuffle=shuffle, epoch=Clock(2))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert resumed.remaining == len(whole) - steps and len(resumed) == len(whole)
    assert seen + indices(resumed) == whole


def test_resumed_epoch_continues_on_two_devices() -> None:
    seen, state = interrupted(2)
    ranks = []
    for rank in (0, 1):
        loader = make_loader(45, 4, rank=rank, world=2, epoch=Clock(2))
        loader.load_state_dict(state)
        ranks.append(indices(loader))
    whole = indices(make_loader(45, 8, epoch=Clock(2)))
    rest = [
        [k for pair in zip(*pair, strict=True) for k in pair] for pair in zip(*ranks, strict=True)
    ]
    assert seen + rest == whole


def stretch(
    count: int, batch_size: int, world: int, drop_last: bool, state: dict | None, steps: int | None
) -> tuple[list[list[int]], dict]:
    """Runs epoch 2 on `world` devices from a state; returns the global batches and the new state.

    It also checks `len` and `remaining` against the batches, and that all devices agree.
    """
    parts, states = [], []
    for rank in range(world):
        loader = make_loader(
            count, batch_size, rank=rank, world=world, drop_last=drop_last, epoch=Clock(2)
        )
        whole = indices(loader)
        assert len(loader) == loader.remaining == len(whole)
        if state:
            loader.load_state_dict(state)
        remaining, iterator = loader.remaining, iter(loader)
        assert len(loader) == len(whole)
        batches = []
        while steps is None or len(batches) < steps:
            batch = next(iterator, None)
            if batch is None:
                break
            batches.append(batch["index"].tolist())
        states.append(loader.state_dict())
        assert remaining == len(batches) + len(list(iterator))
        assert loader.remaining == len(whole)  # of the next pass
        assert all(batches)
        parts.append(batches)
    assert all(other == states[0] for other in states)
    merged = [flat(list(each)) for each in zip(*parts, strict=True)]
    return merged, states[0]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("count", [13, 24, 25, 29, 46, 61])
def test_epoch_on_two_then_one_then_three_devices(count: int, drop_last: bool) -> None:
    """With drop_last, no image occurs twice, and the rest is less than a batch.

    Without drop_last, all images occur, except if fewer images than devices remain: there is no
    previous batch that they could share with.
    """
    order, left = make_loader(count, 1).order(2).tolist(), set()
    for first in (1, 3):
        for second in (0, 1, 5):
            seen, state = [], None
            for batch_size, world, steps in ((4, 2, first), (3, 1, second), (4, 3, None)):
                batches, state = stretch(count, batch_size, world, drop_last, state, steps)
                seen += flat(batches)
                assert sorted(seen) == sorted(order[: len(seen)])  # a prefix of the order
                assert state["consumed"] == len(seen)
            assert len(set(seen)) == len(seen)
            rest = count - len(seen)
            assert rest < (12 if drop_last else 3)
            left.add(rest)
            again, _ = stretch(count, 4, 3, drop_last, state, None)
            assert again == []
    if not drop_last:
        assert min(left) == 0
    else:
        assert max(left) > 3


def test_fewer_images_than_devices_are_dropped_from_a_resumed_epoch() -> None:
    """22 of 24 images are consumed. The other 2 are enough for two devices, but not for three."""
    _, state = stretch(24, 11, 1, False, None, 2)
    assert state["consumed"] == 22
    assert stretch(24, 4, 3, False, state, None)[0] == []
    (rest,), after = stretch(24, 4, 2, False, state, None)
    assert sorted(rest) == sorted(make_loader(24, 1).order(2)[22:].tolist())
    assert after["consumed"] == 24


def test_state_is_equal_on_every_rank_and_has_only_integers() -> None:
    states = []
    for rank in (0, 1):
        loader = make_loader(45, 4, rank=rank, world=2, epoch=Clock(2))
        iterator = iter(loader)
        for _ in range(3):
            next(iterator)
        states.append(loader.state_dict())
    assert states[0] == states[1] == interrupted(3)[1]
    checksum = states[0].pop("order")
    assert states[0] == {"epoch": 2, "consumed": 24, "seed": 0, "size": 45}
    assert all(type(v) is int for v in (checksum, *states[0].values()))
    assert 0 < checksum < 2**63  # fits into a signed 64-bit integer


def test_state_of_a_finished_epoch_does_not_affect_the_next() -> None:
    loader = make_loader(45, 8, epoch=Clock(2))
    indices(loader)
    state = loader.state_dict()
    clock = Clock(3)
    resumed = make_loader(45, 8, epoch=clock)
    resumed.load_state_dict(state)
    assert resumed.remaining == 5
    assert flat(indices(resumed)) == make_loader(45, 8).order(3)[:40].tolist()


def test_state_of_another_epoch_does_not_skip_images() -> None:
    _, state = interrupted(3)
    loader = make_loader(45, 8, epoch=Clock(7))
    loader.load_state_dict(state)
    assert flat(indices(loader)) == loader.order(7)[:40].tolist()


def test_second_pass_starts_from_the_beginning() -> None:
    """This holds also after an incomplete pass and after a resumed one."""
    loader = make_loader(45, 8, epoch=Clock(2))
    whole = indices(loader)
    assert indices(loader) == whole
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert indices(loader) == whole
    loader.load_state_dict(interrupted(3)[1])
    assert indices(loader) == whole[3:]
    assert indices(loader) == whole


def test_resumed_epoch_has_complete_batches_of_a_new_size() -> None:
    old = make_loader(100, 8)
    next(iter(old))
    new = make_loader(100, 16)
    new.load_state_dict(old.state_dict())
    assert [len(batch["index"]) for batch in new] == [16] * 5  # 92 images remain


by_streams = partial(interleaved, groups=[9] * 5, streams=2, buffer=2)


@pytest.mark.parametrize(
    "change, name",
    [({"seed": 1}, "seed"), ({"count": 44}, "size"), ({"order": by_streams}, "order")],
)
def test_state_of_other_data_is_an_error(change: dict, name: str) -> None:
    _, state = interrupted(1)
    change = {"count": 45, **change}
    loader = make_loader(change.pop("count"), 8, epoch=Clock(2), **change)
    next(iter(loader))
    before = loader.state_dict()
    theirs, mine = state[name], before[name]
    assert theirs != mine
    with pytest.raises(
        RunError,
        match=f"train split of the checkpoint has {name}={theirs}, the present one {mine};",
    ):
        loader.load_state_dict(state)
    assert loader.state_dict() == before  # the state is not changed
    assert loader.remaining == len(indices(loader)) == 5


@pytest.mark.parametrize(
    "other",
    [
        partial(interleaved, groups=[9] * 5, streams=4, buffer=2),
        partial(interleaved, groups=[9] * 5, streams=2, buffer=1),
        partial(interleaved, groups=[5] * 9, streams=2, buffer=2),
        partial(shuffled, count=45),
    ],
)
def test_state_of_another_interleaved_order_is_an_error(other: partial) -> None:
    _, state = interrupted(1, order=by_streams)
    loader = make_loader(45, 8, epoch=Clock(2), order=other)
    with pytest.raises(RunError, match=f"order={state['order']}, the present one"):
        loader.load_state_dict(state)
    same = make_loader(45, 8, epoch=Clock(2), order=partial(by_streams))
    same.load_state_dict(state)
    assert same.remaining == 4
