r"""Counter-based random numbers: each draw is a pure function of its key.

The numbers of a `torch.Generator` depend on the order of the draws, and so on the batch size, the
rank and the number of restarts. Here every example has its own stream with a key such as
(seed, "train", epoch, index): the draws are the same for any batch size, any number of devices and
after any resume.

The stream is counter based. With the finaliser m of SplitMix64 and its increment G = 2⁶⁴/φ,

    number j of draw c under key k = m(m(k + c G) + j G),

64 bits that give one uniform number or, by Box-Muller, two normal ones. There is no state on the
device, no loop over the batch and no host synchronization.

Sources:
    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64).
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (counter-based streams).
"""

__all__ = ["KeyedGenerator", "make_key", "normal_like"]

import hashlib
import math
from typing import Any, TypeVar

import torch
from torch import Tensor


def _wrap(x: int) -> int:
    """The signed 64-bit number that is x modulo 2⁶⁴."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


INCREMENT = _wrap(0x9E3779B97F4A7C15)  # G
MULTIPLIER_1 = _wrap(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = _wrap(0x94D049BB133111EB)


Bits = TypeVar("Bits", int, Tensor)  # one number, in [-2⁶³, 2⁶³), or many


def _shift(x: Bits, bits: int) -> Bits:
    """Logical right shift; that of Python and of torch copies the sign bit of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _times(x: Bits, factor: int) -> Bits:
    """The product modulo 2⁶⁴; int64 tensors wrap around."""
    return _wrap(x * factor) if isinstance(x, int) else x * factor


def _mix(x: Bits) -> Bits:
    """The finaliser of SplitMix64, a bijection of 64 bits; a number is taken modulo 2⁶⁴."""
    x = _times(x ^ _shift(x, 30), MULTIPLIER_1)
    x = _times(x ^ _shift(x, 27), MULTIPLIER_2)
    return x ^ _shift(x, 31)


def make_key(*parts: int | str | Tensor) -> Tensor:
    """Returns the 64-bit key of a tuple of names and numbers.

    Arguments:
        parts: The name of the stream, for example `seed, "train", epoch, index`. Integer tensors
            broadcast against each other, so that one call returns a batch of keys.

    Returns:
        The key, int64, with the broadcast shape of the parts.
    """
    key: Any = 0  # a Python integer until a tensor is needed, which is 100 times slower
    for part in parts:
        if isinstance(part, str):
            digest = hashlib.blake2b(part.encode(), digest_size=8).digest()
            part = int.from_bytes(digest, "little", signed=True)
        word: Any = _wrap(part) if isinstance(part, int) else part.to(torch.int64)
        key = _mix(_mix(key + INCREMENT) ^ word)
    return torch.tensor(key) if isinstance(key, int) else key


class KeyedGenerator:
    """One stream of random numbers for each element of a batch.

    Successive calls continue the streams; a new generator with the same keys repeats them.

    Arguments:
        key: The keys k, int64, of shape (B,); see `make_key`. The draws are on their device.
    """

    def __init__(self, key: Tensor) -> None:
        self.key = key
        self.draws = 0

    def _bits(self, count: int) -> Tensor:
        """The next `count` 64-bit numbers of every stream, of shape (B, count)."""
        start = _mix(self.key + _wrap(self.draws * INCREMENT))
        self.draws += 1
        counter = torch.arange(1, count + 1, device=self.key.device) * INCREMENT
        return _mix(start[:, None] + counter)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draws u ~ U[0, 1), of shape (B, *shape); 24 bits of resolution, 53 in float64."""
        bits = 53 if dtype == torch.float64 else 24
        u = _shift(self._bits(math.prod(shape)), 64 - bits).to(dtype) * 2.0**-bits
        return u.reshape(-1, *shape)

    def keep(self, probability: float, *shape: int) -> tuple[Tensor, float]:
        """Draws a mask that is true with a probability, from 16 bits for each element.

        Arguments:
            probability: The probability; rounded to a multiple of 2⁻¹⁶, at least 2⁻¹⁶.
            shape: The shape of the mask of one stream.

        Returns:
            The mask, bool, of shape (B, *shape), and the rounded probability.
        """
        count, level = math.prod(shape), max(1, round(probability * 2**16))
        words = self._bits(-(-count // 4)).view(torch.int16)[:, :count]
        return (words <= level - 2**15 - 1).reshape(-1, *shape), level / 2**16

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draws z ~ N(0, 1), of shape (B, *shape), by Box-Muller from 2 x 32 bits."""
        count = math.prod(shape)
        bits = self._bits((count + 1) // 2)
        u = (_shift(bits, 32) + 1).to(dtype) * 2.0**-32  # in (0, 1]: its logarithm is finite
        angle = (bits & 0xFFFFFFFF).to(dtype) * (2.0**-32 * 2 * math.pi)
        radius = torch.sqrt(-2 * torch.log(u))
        z = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
        return z[:, :count].reshape(-1, *shape)


def normal_like(x: Tensor, generator: KeyedGenerator | torch.Generator | None = None) -> Tensor:
    """Draws z ~ N(0, I) with the shape, type and device of x.

    Arguments:
        x: A batch, of shape (B, *).
        generator: Keyed streams (one per element of the batch), a torch generator, or None for
            the global one.

    Raises:
        ValueError: If the number of streams differs from the batch size.
    """
    if isinstance(generator, KeyedGenerator):
        if len(generator.key) != len(x):
            raise ValueError(f"{len(generator.key)} random streams for a batch of {len(x)}")
        return generator.normal(*x.shape[1:], dtype=x.dtype).to(x.device)
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
