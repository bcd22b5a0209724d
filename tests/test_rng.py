"""Keyed random numbers: reference values, distribution, independence of streams."""

import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusion_lab.rng import KeyedGenerator, _mix, make_key, normal_like

MASK = (1 << 64) - 1
G = 0x9E3779B97F4A7C15
COUNT = 200_000


def mix(x: int) -> int:
    """The finalizer of SplitMix64 as published, with Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def key_of(*parts: int | str) -> int:
    key = 0
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        key = mix(mix((key + G) & MASK) ^ (part & MASK))
    return key


def bits_of(key: int, draw: int, number: int) -> int:
    """Value `number` (from 1) of draw `draw` (from 0): m(m(k + c G) + j G)."""
    return mix((mix((key + draw * G) & MASK) + number * G) & MASK)


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def keys(count: int = COUNT) -> Tensor:
    return make_key(7, "test", torch.arange(count))


def uncorrelated(a: Tensor, b: Tensor) -> bool:
    """Returns whether the correlation is within 4 standard errors of zero."""
    r = torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1]
    return abs(float(r)) < 4 / math.sqrt(a.numel())


def test_mix_gives_the_published_stream_of_splitmix64() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    reference = [mix((1234567 + j * G) & MASK) for j in range(1, 6)]
    assert reference == published
    state = torch.tensor([signed((1234567 + j * G) & MASK) for j in range(1, 6)])
    assert [x % (1 << 64) for x in _mix(state).tolist()] == published


@pytest.mark.parametrize(
    "parts",
    [
        (0,),
        (0, "train", 3, 41),
        (-1, "val"),
        (2**63, "train", 0, 0),  # larger than a signed 64-bit integer
        (2**64 + 5, 2**200 + 1),
        ("", "é"),
    ],
)
def test_make_key_matches_its_formula(parts: tuple[int | str, ...]) -> None:
    assert int(make_key(*parts)) == signed(key_of(*parts))


def test_uniform_matches_its_formula() -> None:
    parts = [(2**63, "a", 0), (2**63, "a", 1), (2**63, "a", 2)]
    generator = KeyedGenerator(make_key(2**63, "a", torch.arange(3)))
    for draw in range(3):
        u = generator.uniform(2, 3, dtype=torch.float64)
        assert u.shape == (3, 2, 3)
        expected = [
            [(bits_of(key_of(*p), draw, j) >> 11) * 2.0**-53 for j in range(1, 7)] for p in parts
        ]
        assert u.flatten(1).tolist() == expected
    u = KeyedGenerator(make_key(*parts[0]).reshape(1)).uniform(4)
    assert u.dtype == torch.float32
    assert u.tolist() == [
        [(bits_of(key_of(*parts[0]), 0, j) >> 40) * 2.0**-24 for j in range(1, 5)]
    ]


@pytest.mark.parametrize("count", [1, 4, 5])
def test_normal_matches_the_box_muller_transform(count: int) -> None:
    key = key_of(3, "b")
    pairs = []
    for j in range(1, (count + 1) // 2 + 1):
        bits = bits_of(key, 0, j)
        radius = math.sqrt(-2 * math.log(((bits >> 32) + 1) * 2.0**-32))
        angle = 2 * math.pi * (bits & 0xFFFFFFFF) * 2.0**-32
        pairs.append((radius * math.cos(angle), radius * math.sin(angle)))
    expected = [[c for c, _ in pairs] + [s for _, s in pairs]]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
        z = KeyedGenerator(make_key(3, "b").reshape(1)).normal(count, dtype=dtype)
        wanted = torch.tensor(expected, dtype=dtype)[:, :count]
        torch.testing.assert_close(z, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("draw", [KeyedGenerator.normal, KeyedGenerator.uniform])
def test_random_numbers_of_an_image_do_not_depend_on_its_batch(
    draw: Callable[..., Tensor],
) -> None:
    whole = KeyedGenerator(keys(64))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:20]
    part = KeyedGenerator(keys(64)[order])
    for _ in range(3):  # successive draws as well
        assert torch.equal(draw(part, 3, 5), draw(whole, 3, 5)[order])
    alone = KeyedGenerator(keys(64)[9:10])
    assert torch.equal(draw(alone, 3, 5), draw(KeyedGenerator(keys(64)), 3, 5)[9:10])


def test_equal_keys_give_equal_numbers_and_successive_draws_differ() -> None:
    one, two = KeyedGenerator(keys(8)), KeyedGenerator(keys(8))
    first = one.normal(100)
    assert torch.equal(first, two.normal(100))
    assert not torch.isclose(first, one.normal(100), atol=1e-6, rtol=0).all(1).any()


def test_keys_depend_on_every_part_and_its_position() -> None:
    variants = [
        (0, "train", 1, 2),
        (1, "train", 1, 2),
        (0, "val", 1, 2),
        (0, "train", 2, 1),
        (0, "train", 1, 3),
        (0, "train", 1),
        (0, "train", 1, 2, 0),
        (0, "train", 12),
        ("train", 0, 1, 2),
        ("0", "train", 1, 2),
        (0, "train1", 2),
        (2**63, "train", 1, 2),
        (-1, "train", 1, 2),
        (),
        (0,),
        (0, 0),
        ("",),
    ]
    assert len({int(make_key(*parts)) for parts in variants}) == len(variants)
    grid = make_key(torch.arange(20)[:, None, None], torch.arange(50)[:, None], torch.arange(100))
    assert grid.shape == (20, 50, 100)
    assert len(grid.unique()) == grid.numel()
    # A tensor part is equivalent to its values.
    assert int(grid[3, 7, 42]) == int(make_key(3, 7, 42))


def test_make_key_is_independent_of_the_integer_dtype() -> None:
    expected = make_key(5, torch.arange(9))
    assert torch.equal(
        make_key(torch.tensor(5, dtype=torch.int32), torch.arange(9).int()), expected
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_and_uniform_have_their_distributions(dtype: torch.dtype) -> None:
    """Across keys and within one stream. The numbers are fixed, so the p-values do not vary."""
    for key, shape in ((keys(), ()), (keys(1), (COUNT,))):
        z = KeyedGenerator(key).normal(*shape, dtype=dtype).flatten().double()
        u = KeyedGenerator(key).uniform(*shape, dtype=dtype).flatten().double()
        assert stats.kstest(z.numpy(), "norm").pvalue > 0.01
        assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01
        for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3)):
            error = math.sqrt(float((z**power).var()) / COUNT)
            assert abs(float((z**power).mean()) - expected) < 4 * error
        assert 0 <= float(u.min()) < 1e-4 and 1 - 1e-4 < float(u.max()) < 1
        assert 4 < float(z.abs().max()) < 6.7  # √(2 · 32 ln 2) = 6.66 is the maximum


def test_float64_numbers_are_not_rounded_to_float32() -> None:
    for draw in (KeyedGenerator.uniform, KeyedGenerator.normal):
        x = draw(KeyedGenerator(keys(1000)), dtype=torch.float64)
        assert x.dtype == torch.float64 and (x != x.float().double()).float().mean() > 0.9


@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_draws_keys_and_seeds_are_uncorrelated(name: str) -> None:
    generator = KeyedGenerator(keys(COUNT // 10))
    first, second = getattr(generator, name)(10), getattr(generator, name)(10)
    for f in (lambda x: x, lambda x: (x - x.mean()).square()):
        a, b = f(first), f(second)
        assert uncorrelated(a, b)  # successive draws
        assert uncorrelated(a[1:], a[:-1])  # neighbouring keys
        assert uncorrelated(a[:, 1:], a[:, :-1])  # neighbouring numbers
        assert uncorrelated(a[:, :5], a[:, 5:])  # the two halves of Box-Muller
        other = f(getattr(KeyedGenerator(make_key(8, "test", torch.arange(len(a)))), name)(10))
        assert uncorrelated(a, other)  # neighbouring seeds


def test_normal_like_with_each_kind_of_generator() -> None:
    x = torch.zeros(4, 2, 3, dtype=torch.float64)
    keyed = normal_like(x, KeyedGenerator(keys(4)))
    assert torch.equal(keyed, KeyedGenerator(keys(4)).normal(2, 3, dtype=torch.float64))
    torch_s = normal_like(x, torch.Generator().manual_seed(5))
    expected = torch.randn(
        4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    assert torch.equal(torch_s, expected)
    torch.manual_seed(6)
    drawn = normal_like(x.float())
    torch.manual_seed(6)
    assert torch.equal(drawn, torch.randn(4, 2, 3))


def test_fewer_streams_than_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 random streams for a batch of 4"):
        normal_like(torch.empty(4, 2), KeyedGenerator(make_key(0, torch.arange(1))))
