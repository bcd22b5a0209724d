r"""How close a restored image is to the clean one, for each image of a batch.

Sources:
    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", 2004 (SSIM: Gaussian window of
    standard deviation 1.5, K_1 = 0.01, K_2 = 0.03).
"""

__all__ = ["WINDOW", "psnr", "ssim"]

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

RANGE = 2.0  # of an image in [-1, 1]
WINDOW = 11  # pixels of SSIM's window, torchmetrics' for a standard deviation of 1.5


def psnr(estimate: Tensor, x_0: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio 10 log10(2² / MSE), in dB, of shape (B,).

    Arguments:
        estimate: Images on the scale of [-1, 1], not clipped, of shape (B, C, H, W).
        x_0: The clean images, of the same shape.
    """
    mse = (estimate - x_0).square().flatten(1).mean(1)
    return 10 * torch.log10(RANGE**2 / mse)


def ssim(estimate: Tensor, x_0: Tensor) -> Tensor:
    """Returns the structural similarity in [-1, 1], of shape (B,).

    Arguments:
        estimate: Images on the scale of [-1, 1], of shape (B, C, H, W), H and W at least 11.
        x_0: The clean images, of the same shape.
    """
    _, full = structural_similarity_index_measure(
        estimate, x_0, data_range=RANGE, reduction="none", return_full_image=True
    )
    # Only windows inside the image, as in the paper; torchmetrics averages over mirrored ones too.
    margin = WINDOW // 2
    return full[..., margin:-margin, margin:-margin].flatten(1).mean(1)
