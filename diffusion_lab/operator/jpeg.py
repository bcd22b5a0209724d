r"""JPEG compression as an operator, without its lossless entropy coding.

The image is converted to brightness and two colour differences (YCbCr, JFIF) on the scale of
[0, 255]. Every block X of 8 x 8 pixels is replaced by its cosine transform D X Dᵀ, and every
coefficient c by the nearest multiple of its step q, q round(c / q). Then all transforms are
inverted. The colour differences keep their resolution ("4:4:4"), and values are not rounded to
8 bits before or after.

Sources:
    ITU-T Recommendation T.81, "Digital compression and coding of continuous-tone still images",
        1992, annexes A.3.3 (transform) and K.1 (tables).
    ITU-T Recommendation T.871, "JPEG File Interchange Format", 2011, section 7 (colours).
    Tables for qualities other than 50 follow the library of the Independent JPEG Group.
"""

__all__ = ["JPEG", "quantization"]

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffusion_lab.constraints import Range, checked
from diffusion_lab.operator.base import Operator, image_shape

BLOCK = 8  # pixels, the side of a block
# fmt: off
BRIGHTNESS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
COLOUR = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# fmt: on
RED, GREEN, BLUE = 0.299, 0.587, 0.114  # of the brightness Y
TO_YCBCR = (
    (RED, GREEN, BLUE),
    (-RED / (2 - 2 * BLUE), -GREEN / (2 - 2 * BLUE), 0.5),  # (B - Y) / (2 - 2 w_B)
    (0.5, -GREEN / (2 - 2 * RED), -BLUE / (2 - 2 * RED)),  # (R - Y) / (2 - 2 w_R)
)


def quantization(quality: int) -> Tensor:
    """Returns the steps q of brightness and of colour differences, float64, of shape (2, 8, 8).

    Arguments:
        quality: From 1 to 100.
    """
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor([BRIGHTNESS, COLOUR])
    return ((tables * percent + 50) // 100).clamp(1, 255).double()


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """Returns `value`, with the gradient of x."""
    return x + (value - x).detach()


class JPEG(Operator):
    """y is the image after JPEG compression, of shape (B, C, H, W).

    The derivative of rounding is zero almost everywhere, so the gradient is the straight-through
    estimate: that of A without rounding and clipping, the identity.

    Arguments:
        shape: The shape (C, H, W) of one image x_0, C = 1 or 3. Sides that are not multiples of 8
            are padded with the last pixel.
        quality: From 1 (coarse) to 100 (fine), as in Pillow.

    Raises:
        ValueError: If the image has neither 1 nor 3 channels.
    """

    colours: Tensor
    inverse: Tensor
    cosines: Tensor
    step: Tensor

    @checked
    def __init__(self, shape: Sequence[int], quality: Annotated[int, Range(1, 100)] = 10) -> None:
        channels, height, width = image_shape(shape, "JPEG")
        if channels not in (1, 3):
            raise ValueError(
                f"shape={tuple(shape)} is not allowed; JPEG is for images of 1 or 3 channels"
            )
        super().__init__(shape)
        self.missing = (0, -width % BLOCK, 0, -height % BLOCK)
        colours = torch.tensor(TO_YCBCR if channels == 3 else ((1.0,),), dtype=torch.float64)
        # Rows k are √(2 / 8) cos(π k (i + 1/2) / 8), the first one smaller by √2.
        k, i = torch.arange(BLOCK, dtype=torch.float64)[:, None], torch.arange(BLOCK)
        cosines = math.sqrt(2 / BLOCK) * torch.cos(math.pi / BLOCK * k * (i + 0.5))
        cosines[0] /= math.sqrt(2)
        step = quantization(quality)[[0, 1, 1][:channels]]
        self.register_buffer("colours", colours, persistent=False)
        self.register_buffer("inverse", torch.linalg.inv(colours), persistent=False)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("step", step[:, None, None], persistent=False)  # (C, 1, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        cosines, step = self.cosines.to(x), self.step.to(x)
        # x = 0 is the grey level 127.5, whereas the standard subtracts 128 from the brightness.
        offset = torch.tensor([-0.5, 0.0, 0.0]).to(x)[: x.shape[1], None, None]
        z = torch.einsum("kc,bchw->bkhw", self.colours.to(x), 127.5 * x) + offset
        z = pad(z, self.missing, mode="replicate")
        rows, columns = z.shape[-2] // BLOCK, z.shape[-1] // BLOCK
        blocks = z.reshape(*z.shape[:2], rows, BLOCK, columns, BLOCK).transpose(-3, -2)
        c = cosines @ blocks @ cosines.mT / step
        blocks = cosines.mT @ (straight_through(c, c.round()) * step) @ cosines
        z = blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)
        z = z[..., : x.shape[-2], : x.shape[-1]] - offset
        y = torch.einsum("kc,bchw->bkhw", self.inverse.to(x), z) / 127.5
        return straight_through(y, y.clamp(-1, 1))

    def to_image(self, y: Tensor) -> Tensor:
        """Returns y."""
        return y
