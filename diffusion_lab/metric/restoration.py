r"""Peak signal-to-noise ratio and structural similarity of each image of a batch.

The SSIM of torchmetrics is used without the windows that extend beyond the image, in float64, as
variances are differences of means of squares. It is computed on [0, 1]: its luminance term
(2 μ_x μ_y + C_1) / (μ_x² + μ_y² + C_1) is for means of one sign.

Sources:
    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", 2004 (SSIM: Gaussian window of
    standard deviation 1.5, K_1 = 0.01, K_2 = 0.03).
"""

__all__ = ["SSIM_WINDOW", "psnr", "ssim"]

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

RANGE = 2.0  # of images in [-1, 1]
SSIM_WINDOW = 11  # pixels, the window of torchmetrics for a standard deviation of 1.5


def psnr(estimate: Tensor, x_0: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio 10 log10(2² / MSE), in dB, of shape (B,).

    Arguments:
        estimate: Images, nominally in [-1, 1] and not clipped, of shape (B, C, H, W).
        x_0: The clean images, of the same shape.
    """
    mse = (estimate - x_0).square().flatten(1).mean(1)
    return 10 * torch.log10(RANGE**2 / mse)


def ssim(estimate: Tensor, x_0: Tensor) -> Tensor:
    """Returns the structural similarity, at most 1, of shape (B,).

    It is that of the paper on the levels 127.5 (x + 1) of 0 to 255.

    Arguments:
        estimate: Images, nominally in [-1, 1] and not clipped, of shape (B, C, H, W), H and W at
            least 11.
        x_0: The clean images, of the same shape.
    """
    x, y = ((image.double() + 1) / 2 for image in (estimate, x_0))
    _, full = structural_similarity_index_measure(
        x, y, data_range=1.0, reduction="none", return_full_image=True
    )
    # Only windows inside the image, as in the paper.
    margin = SSIM_WINDOW // 2
    inside = full[..., margin:-margin, margin:-margin]
    return inside.flatten(1).mean(1).to(estimate.dtype)
