"""Colourisation: the measurement is the brightness of every pixel."""

__all__ = ["Grayscale"]

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from diffusion_lab.constraints import Length, NonNegative, checked
from diffusion_lab.operator.base import SVDOperator, image_shape

LUMA = (0.299, 0.587, 0.114)  # red, green, blue of ITU-R BT.601, as in JPEG


class Grayscale(SVDOperator):
    """y = Σ_c w_c x_c, the weighted mean of the channels, of shape (B, 1, H, W).

    The coefficients of a pixel are its component along w, with S = |w|, and its components
    orthogonal to w, which are not measured.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        weights: w, one weight per channel; divided by their sum.

    Raises:
        ValueError: If the number of weights is not C, or all weights are zero.
    """

    basis: Tensor
    s: Tensor

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        weights: Annotated[Sequence[NonNegative], Length(1)] = LUMA,
    ) -> None:
        channels, _, _ = image_shape(shape, "colourisation")
        w = torch.as_tensor(weights, dtype=torch.float64)
        if not bool(w.any()):
            raise ValueError(f"weights={weights} is not allowed; at least one must be above 0")
        if len(w) != channels:
            raise ValueError(
                f"weights={weights} is not allowed for images of shape {tuple(shape)}: "
                f"{len(w)} weights for {channels} channels; give one per channel"
            )
        super().__init__(shape)
        w = w / w.sum()
        basis = torch.linalg.svd(w[None], full_matrices=True).Vh
        basis[0] = w / w.norm()  # LAPACK may flip its sign
        s = torch.zeros(channels, 1, 1, dtype=torch.float64)
        s[0] = w.norm()
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("s", s, persistent=False)

    @property
    def singular_values(self) -> Tensor:
        return self.s

    def vt(self, x: Tensor) -> Tensor:
        return torch.einsum("kc,bchw->bkhw", self.basis.to(x), x)

    def v(self, c: Tensor) -> Tensor:
        return torch.einsum("kc,bkhw->bchw", self.basis.to(c), c)

    def u(self, c: Tensor) -> Tensor:
        return c[:, :1]

    def ut(self, y: Tensor) -> Tensor:
        zeros = y.new_zeros(()).expand(len(y), len(self.basis) - 1, *y.shape[2:])
        return torch.cat([y, zeros], dim=1)

    def to_image(self, y: Tensor) -> Tensor:
        """Returns y in every channel."""
        return y.expand(-1, len(self.basis), -1, -1)
