"""High dynamic range: what is brighter or darker than the sensor's range is clipped."""

__all__ = ["HDR"]

from collections.abc import Sequence

from torch import Tensor

from diffusion_lab.operator.base import Operator


class HDR(Operator):
    """y = clip(f x, -1, 1), of shape (B, *). The gradient is zero where y is clipped.

    Arguments:
        shape: The shape * of one image x_0; None takes any.
        factor: f, at least 1 and finite.

    Raises:
        ValueError: If the factor is out of its range.
    """

    def __init__(self, shape: Sequence[int] | None = None, factor: float = 2.0) -> None:
        if not 1 <= factor < float("inf"):
            raise ValueError(f"factor={factor} is not allowed; it is at least 1 and finite")
        super().__init__(shape)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return (self.factor * x).clamp(-1, 1)

    def to_image(self, y: Tensor) -> Tensor:
        """Returns y."""
        return y
