"""Helpers for tensor shapes."""

__all__ = ["broadcast"]

from torch import Tensor


def broadcast(coefficient: Tensor, x: Tensor) -> Tensor:
    """Returns a coefficient of shape () or (B,) with x's type, device and number of dimensions.

    A tensor of shape () on the CPU stays there: products with x take its value without a copy to
    the device, which would synchronize.

    Arguments:
        coefficient: The coefficient, of shape () or (B,).
        x: The tensor that it is multiplied with, of shape (B, *).
    """
    if not coefficient.ndim and coefficient.device.type == "cpu":
        return coefficient.to(x.dtype)
    coefficient = coefficient.to(x)
    return coefficient.reshape(-1, *[1] * (x.ndim - 1)) if coefficient.ndim else coefficient
