"""Phase retrieval: the magnitudes of a Fourier transform are seen, its phases are not."""

__all__ = ["PhaseRetrieval"]

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_lab.operator.base import Operator, image_shape


class PhaseRetrieval(Operator):
    """y = |F P (x + 1) / 2|, of shape (B, C, H', W'): P pads with zeros, F is orthonormal.

    The intensity (x + 1) / 2 is not negative, and black outside the image. An image and itself
    turned by 180 degrees, for example, have the same y: the posterior has several modes. With an
    orthonormal F, Σ y² is the sum of the squared intensities, so the mean square of y is smaller
    than theirs by the oversampling squared; σ_y is on the scale of y.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        oversampling: H' / H = W' / W, at least 1. From 2 on y has the whole autocorrelation.

    Raises:
        ValueError: If the oversampling is out of its range.

    Source:
        Fienup, "Phase retrieval algorithms: a comparison", 1982; the setting is that of Zhang et
        al., "Improving diffusion inverse problem solving with decoupled noise annealing", 2024.
    """

    def __init__(self, shape: Sequence[int], oversampling: float = 2.0) -> None:
        _, height, width = image_shape(shape, "phase retrieval")
        if not 1 <= oversampling <= 8:
            raise ValueError(f"oversampling={oversampling} is not allowed; it is from 1 to 8")
        super().__init__(shape)
        self.padded = (round(oversampling * height), round(oversampling * width))

    def forward(self, x: Tensor) -> Tensor:
        # Padded at the end: where the image lies only turns the phases.
        return torch.fft.fft2((x + 1) / 2, s=self.padded, norm="ortho").abs()

    def to_image(self, y: Tensor) -> Tensor:
        """Returns log(1 + y / mean y), frequency 0 in the middle, scaled to [-1, 1]."""
        y = torch.fft.fftshift(y.clamp(min=0), (-2, -1))
        y = torch.log1p(y / y.mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(y.dtype).tiny))
        assert self.shape is not None
        y = interpolate(y, self.shape[1:], mode="area")
        largest = y.amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
        return 2 * y / largest - 1
