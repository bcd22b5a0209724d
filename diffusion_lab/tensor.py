"""Helpers for tensor shapes."""

__all__ = ["broadcast"]

from torch import Tensor


def broadcast(coefficient: Tensor, x: Tensor) -> Tensor:
    """Gives a coefficient of shape () or (B,) x's type, device and number of dimensions.

    One number may stay on the CPU, from where products with x take it by value: to copy it would
    be to wait for the device.
    """
    if not coefficient.ndim and coefficient.device.type == "cpu":
        return coefficient.to(x.dtype)
    coefficient = coefficient.to(x)
    return coefficient.reshape(-1, *[1] * (x.ndim - 1)) if coefficient.ndim else coefficient
