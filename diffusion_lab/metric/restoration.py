r"""Peak signal-to-noise ratio and structural similarity of each image of a batch.

The SSIM of torchmetrics is used without the windows that extend beyond the image.

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
    """Returns the structural similarity in [-1, 1], of shape (B,).

    Arguments:
        estimate: Images in [-1, 1], of shape (B, C, H, W), H and W at least 11.
        x_0: The clean images, of the same shape.
    """
    _, full = structural_similarity_index_measure(
        estimate, x_0, data_range=RANGE, reduction="none", return_full_image=True
    )
    # Only windows inside the image, as in the paper.
    margin = SSIM_WINDOW // 2
    return full[..., margin:-margin, margin:-margin].flatten(1).mean(1)
