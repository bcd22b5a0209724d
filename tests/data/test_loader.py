"""The order of images: a function of (seed, epoch, N), shared out over any number of devices."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_lab.data.loader import Loader
from diffusion_lab.noise import make_key


def make_images(count: int) -> np.ndarray:
    """Image k is filled with k in the first channel, and 255 - k in the last."""
    images = np.zeros((count, 2, 2, 3), dtype=np.uint8)
    images[..., 0] = np.arange(count)[:, None, None]
    images[..., 2] = 255 - np.arange(count)[:, None, None]
    return images


class Clock:
    """The current epoch, which a test may set."""

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch

    def __call__(self) -> int:
        return self.epoch


def make_loader(count: int, batch_size: int, **kwargs) -> Loader:
    kwargs = {"seed": 0, "shuffle": True, **kwargs}
    return Loader(make_images(count), kwargs.pop("split", "train"), batch_size, **kwargs)


def indices(loader: Loader | Iterator) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [k for batch in batches for k in batch]


# --- what an epoch holds ------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_two_ranks_share_the_batches_of_one(shuffle: bool) -> None:
    one = list(make_loader(45, 8, shuffle=shuffle))
    two = [list(make_loader(45, 4, rank=r, world=2, shuffle=shuffle)) for r in (0, 1)]
    assert len(one) == len(two[0]) == len(two[1]) == (5 if shuffle else 6)
    for whole, first, second in zip(one, *two, strict=True):
        assert len(first["index"]) - len(second["index"]) in (0, 1)
        for name in ("index", "key", "image"):
            merged = torch.zeros_like(whole[name])
            merged[0::2], merged[1::2] = first[name], second[name]
            assert torch.equal(merged, whole[name]), name


def test_a_shuffled_epoch_drops_only_the_tail() -> None:
    loader = make_loader(45, 8)
    batches = indices(loader)
    assert [len(b) for b in batches] == [8] * 5 and len(loader) == 5
    assert flat(batches) == loader.order(0)[:40].tolist()
    assert sorted(loader.order(0).tolist()) == list(range(45))
    assert len(set(flat(batches))) == 40
    ranks = [indices(make_loader(45, 4, rank=r, world=3)) for r in range(3)]
    assert [[len(b) for b in rank] for rank in ranks] == [[4] * 3] * 3
    assert len(set(flat([flat(rank) for rank in ranks]))) == 36


def test_every_image_is_dropped_in_some_epoch_and_kept_in_another() -> None:
    loader, dropped = make_loader(10, 8), set()
    for epoch in range(40):
        dropped |= set(loader.order(epoch)[8:].tolist())
    assert dropped == set(range(10))


@pytest.mark.parametrize(
    "count, world, batch_size", [(10, 3, 2), (7, 3, 2), (10, 3, 4), (2, 3, 1)]
)
def test_an_unshuffled_epoch_covers_each_image_once(
    count: int, world: int, batch_size: int
) -> None:
    seen = []
    for rank in range(world):
        loader = make_loader(count, batch_size, rank=rank, world=world, shuffle=False)
        batches = indices(loader)
        assert len(batches) == len(loader)
        assert flat(batches) == list(range(rank, count, world))
        assert all(0 < len(batch) <= batch_size for batch in batches)
        seen += flat(batches)
    assert sorted(seen) == list(range(count))


def test_the_rows_are_those_of_the_index() -> None:
    images = make_images(45)
    for batch in make_loader(45, 8):
        assert batch["image"].dtype == torch.uint8 and batch["split"] == "train"
        assert np.array_equal(batch["image"].numpy(), images[batch["index"].numpy()])
        assert batch["image"][:, 0, 0, 0].tolist() == batch["index"].tolist()


def test_a_batch_is_a_copy() -> None:
    loader = make_loader(8, 8, shuffle=False)
    next(iter(loader))["image"].fill_(7)
    assert np.array_equal(loader.images, make_images(8))


# --- orders and keys ----------------------------------------------------------------------------


def order(epoch: int, seed: int = 0, split: str = "train") -> list[int]:
    return flat(indices(make_loader(64, 8, seed=seed, split=split, epoch=Clock(epoch))))


def test_orders_differ_by_epoch_seed_and_split_and_by_nothing_else() -> None:
    orders = [order(0), order(1), order(2), order(0, seed=1), order(0, split="other")]
    assert all(sorted(o) == list(range(64)) for o in orders)
    assert len({tuple(o) for o in orders}) == 5
    assert list(range(64)) not in orders
    assert order(1) == orders[1] and order(0, seed=1) == orders[3]
    for other in orders[1:]:  # not merely rotated: about one place in 64 agrees by chance
        assert sum(a == b for a, b in zip(orders[0], other, strict=True)) < 8


def test_places_in_the_order_are_uniform() -> None:
    """The mean place of image 0 over 400 epochs is that of a uniform one, within 4 deviations."""
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


def test_keys_depend_on_the_epoch_only_when_shuffled() -> None:
    assert keys(0, False) == keys(5, False) == keys(5, False, batch_size=3)
    assert keys(3, True) == keys(3, True, batch_size=4)
    assert not set(keys(0, True).values()) & set(keys(1, True).values())
    assert len(set(keys(0, True).values())) == 64
    expected = make_key(0, "train", 3, torch.arange(64)).tolist()
    assert keys(3, True) == dict(enumerate(expected))


def test_the_epoch_is_asked_for_only_when_iteration_begins() -> None:
    clock = Clock(0)
    loader = make_loader(64, 8, epoch=clock)
    iterator = iter(loader)
    clock.epoch = 4
    assert next(iterator)["index"].tolist() == order(4)[:8]


# --- resume -------------------------------------------------------------------------------------


def interrupted(steps: int, epoch: int = 2, **kwargs) -> tuple[list[Tensor], dict]:
    """The first steps of an epoch, and the state after them."""
    loader = make_loader(45, 8, epoch=Clock(epoch), **kwargs)
    iterator = iter(loader)
    seen = [next(iterator)["index"].tolist() for _ in range(steps)]
    return seen, loader.state_dict()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_resumed_epoch_goes_on_exactly(steps: int, shuffle: bool) -> None:
    seen, state = interrupted(steps, shuffle=shuffle)
    whole = indices(make_loader(45, 8, shuffle=shuffle, epoch=Clock(2)))
    resumed = make_loader(45, 8, shuffle=shuffle, epoch=Clock(2))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert seen + indices(resumed) == whole


def test_a_resumed_epoch_goes_on_on_two_devices() -> None:
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


def test_the_state_is_the_same_on_every_rank_and_plain() -> None:
    states = []
    for rank in (0, 1):
        loader = make_loader(45, 4, rank=rank, world=2, epoch=Clock(2))
        iterator = iter(loader)
        for _ in range(3):
            next(iterator)
        states.append(loader.state_dict())
    assert states[0] == states[1] == interrupted(3)[1]
    assert states[0] == {"epoch": 2, "consumed": 24, "seed": 0, "size": 45}
    assert all(type(v) is int for v in states[0].values())


def test_the_state_of_a_finished_epoch_leaves_the_next_one_whole() -> None:
    loader = make_loader(45, 8, epoch=Clock(2))
    indices(loader)
    state = loader.state_dict()
    clock = Clock(3)
    resumed = make_loader(45, 8, epoch=clock)
    resumed.load_state_dict(state)
    assert flat(indices(resumed)) == make_loader(45, 8).order(3)[:40].tolist()


def test_a_state_of_another_epoch_does_not_skip() -> None:
    _, state = interrupted(3)
    loader = make_loader(45, 8, epoch=Clock(7))
    loader.load_state_dict(state)
    assert flat(indices(loader)) == loader.order(7)[:40].tolist()


def test_a_second_pass_starts_from_the_beginning() -> None:
    """Also after a pass that was broken off, and after one that was resumed."""
    loader = make_loader(45, 8, epoch=Clock(2))
    whole = indices(loader)
    assert indices(loader) == whole
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert indices(loader) == whole
    loader.load_state_dict(interrupted(3)[1])
    assert indices(loader) == whole[3:]
    assert indices(loader) == whole


@pytest.mark.parametrize(
    "count, seed, text", [(45, 1, "seed 0, these have 1"), (44, 0, "size 45, these have 44")]
)
def test_a_state_of_other_data_is_refused(count: int, seed: int, text: str) -> None:
    _, state = interrupted(1)
    loader = make_loader(count, 8, seed=seed, epoch=Clock(2))
    with pytest.raises(ValueError, match=text):
        loader.load_state_dict(state)
    assert len(indices(loader)) == 5  # and nothing was taken over


def test_a_resumed_epoch_has_whole_batches_of_the_new_size() -> None:
    images = np.zeros((100, 1, 1, 3), dtype=np.uint8)
    old = Loader(images, "train", 8, seed=0, shuffle=True)
    next(iter(old))
    new = Loader(images, "train", 16, seed=0, shuffle=True)
    new.load_state_dict(old.state_dict())
    assert [len(batch["index"]) for batch in new] == [16] * 5  # 92 are left
