"""High dynamic range: the measurement is clipped to the range of the sensor."""

__all__ = ["HDR"]

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from diffusion_lab.constraints import Range, checked
from diffusion_lab.operator.base import Operator


class HDR(Operator):
    """y = clip(f x, -1, 1), of shape (B, *). The gradient is zero where y is clipped.

    Arguments:
        shape: The shape * of one image x_0; None accepts any.
        factor: f.
    """

    @checked
    def __init__(
        self, shape: Sequence[int] | None = None, factor: Annotated[float, Range(1)] = 2.0
    ) -> None:
        super().__init__(shape)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return (self.factor * x).clamp(-1, 1)

    def to_image(self, y: Tensor) -> Tensor:
        """Returns y."""
        return y
