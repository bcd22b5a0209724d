"""Phase retrieval: the measurement is the magnitude of the Fourier transform."""

__all__ = ["PhaseRetrieval"]

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusion_lab.constraints import Range, checked
from diffusion_lab.operator.base import Operator, image_shape


class PhaseRetrieval(Operator):
    """y = |F P (x + 1) / 2|, of shape (B, C, H', W'): P pads with zeros, F is orthonormal.

    The intensity (x + 1) / 2 is non-negative, and zero outside the image. Several images have the
    same y, for example an image and its rotation by 180 degrees, so the posterior has several
    modes. Since F is orthonormal, the mean square of y is that of the intensity divided by the
    squared oversampling factor; σ_y is on the scale of y.

    Arguments:
        shape: The shape (C, H, W) of one image x_0.
        oversampling: H' / H = W' / W. From 2 on, y determines the autocorrelation of the image.

    Source:
        Fienup, "Phase retrieval algorithms: a comparison", 1982; the setting is that of Zhang et
        al., "Improving diffusion inverse problem solving with decoupled noise annealing", 2024.
    """

    @checked
    def __init__(
        self, shape: Sequence[int], oversampling: Annotated[float, Range(1, 8)] = 2.0
    ) -> None:
        _, height, width = image_shape(shape, "phase retrieval")
        super().__init__(shape)
        self.padded = (round(oversampling * height), round(oversampling * width))

    def forward(self, x: Tensor) -> Tensor:
        # Padded at the end: a shift of the image changes only the phases.
        spectrum: Tensor = torch.fft.fft2((x + 1) / 2, s=self.padded, norm="ortho")
        return spectrum.abs()

    def to_image(self, y: Tensor) -> Tensor:
        """Returns log(1 + y / mean y), with frequency 0 in the middle, scaled to [-1, 1]."""
        y = torch.fft.fftshift(y.clamp(min=0), (-2, -1))
        y = torch.log1p(y / y.mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(y.dtype).tiny))
        assert self.shape is not None
        y = interpolate(y, self.shape[1:], mode="area")
        largest = y.amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
        return 2 * y / largest - 1
