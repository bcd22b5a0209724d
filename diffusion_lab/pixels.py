"""Conversion between 8-bit pixels and the model's range [-1, 1]."""

__all__ = ["to_model", "to_uint8"]

import torch
from torch import Tensor


def to_model(images: Tensor) -> Tensor:
    """Scales uint8 images (B, H, W, 3) to float32 in [-1, 1], of shape (B, 3, H, W)."""
    # In place: the allocation of a large tensor costs more than the arithmetic.
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_uint8(x: Tensor) -> Tensor:
    """Converts values in [-1, 1] to uint8: clamped, scaled by 127.5 and rounded.

    Arguments:
        x: Images of any floating-point type, of shape (..., H, W).

    Returns:
        The levels 0 to 255, uint8, of the same shape. The value k / 127.5 - 1 gives k.

    Raises:
        TypeError: If x is not of a floating-point type.
        ValueError: If some values are not finite; the message says how many.
    """
    if not x.is_floating_point():
        raise TypeError(f"images in [-1, 1] must be floating point, not {x.dtype}")
    x = x.detach()
    bad = x.numel() - int(torch.isfinite(x).sum())
    if bad:
        raise ValueError(f"{bad} of {x.numel()} values of the image are not finite")
    if x.dtype != torch.float64:
        x = x.float()  # half precision has too few digits for 127.5 (x + 1)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
