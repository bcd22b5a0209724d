r"""The weight gradient of a 3x3 convolution by Winograd's algorithm, F(3x3, 4x4).

    dW = Gᵀ [ Σ_tiles (Bᵀ x B) ⊙ (A g Aᵀ) ] G

The output's gradient is cut into tiles g of 4x4 pixels; x are the 6x6 pixels of the input that a
tile was computed from. Between the brackets every pair of channels has a product of its own: 36
matrix products over the tiles, of 16 pixels each, where the sum as it stands takes 9 a pixel: a
quarter of the work. With tiles as columns, Bᵀ x B is (Bᵀ ⊗ Bᵀ) x, a matrix product as well.

On processors with AVX2 alone, oneDNN computes this gradient at half of the speed of the other two
convolutions of a step; this takes 0.3 to 0.8 of its time. Rounding errors are 3e-6 of dW, as large
as oneDNN's own.

Source:
    Lavin, Gray, "Fast algorithms for convolutional neural networks", 2015: A, B, G of section 4.3,
    here transposed: the gradient of their equation for F(4x4, 3x3).
"""

__all__ = ["weight_gradient"]

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BT = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
G = torch.tensor(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]],
    dtype=torch.float64,
).div(24)
A = torch.tensor(
    [[1, 0, 0, 0], [1, 1, 1, 1], [1, -1, 1, -1], [1, 2, 4, 8], [1, -2, 4, -8], [0, 0, 0, 1]],
    dtype=torch.float64,
)
OF_INPUT, OF_GRADIENT, OF_WEIGHT = (torch.kron(m, m) for m in (BT, A, G.T))
COLUMNS = 2**15  # tiles times channels at a time: what they become stays in the cache
ENOUGH = 64  # channels on either side; below, the products are too narrow
MANY = 512  # pixels of a batch; below, G's part is more than it saves


def _tiles(pixels: Tensor, size: int) -> Tensor:
    """Views (B, H, W, C) as tiles of a size, 4 pixels apart: (size, size, B, rows, columns, C)."""
    by_image, by_row, by_column, _ = pixels.stride()
    batch, rows, columns = len(pixels), pixels.shape[1] // 4, pixels.shape[2] // 4
    return pixels.as_strided(
        (size, size, batch, rows, columns, pixels.shape[3]),
        (by_row, by_column, by_image, 4 * by_row, 4 * by_column, 1),
    )


def _by_winograd(x: Tensor, gradient: Tensor) -> Tensor:
    """The formula above."""
    channels, out = x.shape[1], gradient.shape[1]
    of_input, of_gradient, of_weight = (m.to(x.dtype) for m in (OF_INPUT, OF_GRADIENT, OF_WEIGHT))
    tiles = _tiles(F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)), 6)
    gradients = _tiles(gradient.permute(0, 2, 3, 1), 4)
    batch, rows, columns = gradients.shape[2:5]
    some_rows = max(1, COLUMNS // (columns * channels))
    some_images = max(1, some_rows // rows)
    sums = x.new_zeros(36, channels, out)
    for b in range(0, batch, some_images):
        for r in range(0, rows, some_rows):
            part = np.s_[:, :, b : b + some_images, r : r + some_rows]
            v = (of_input @ tiles[part].reshape(36, -1)).view(36, -1, channels)
            m = (of_gradient @ gradients[part].reshape(16, -1)).view(36, -1, out)
            sums.baddbmm_(v.transpose(1, 2), m)
    result = (of_weight @ sums.view(36, -1)).view(3, 3, channels, out)
    return result.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor | None:
    """Returns dW, of shape (C', C, 3, 3), or None where torch's own way is the faster one.

    Arguments:
        x: The convolution's input, of shape (B, C, H, W); stride 1 and padding 1.
        gradient: Its output's gradient, of shape (B, C', H, W).
    """
    if (
        x.device.type != "cpu"
        or x.dtype != torch.float32
        or min(x.shape[1], gradient.shape[1]) < ENOUGH
        or x.numel() // x.shape[1] < MANY
        or x.shape[2] % 4
        or x.shape[3] % 4
        or not x.is_contiguous(memory_format=torch.channels_last)
        or not gradient.is_contiguous(memory_format=torch.channels_last)
        or torch.backends.cpu.get_cpu_capability() != "AVX2"
    ):
        return None
    with torch.autocast("cpu", enabled=False):  # some call backward() within one
        return _by_winograd(x, gradient)
