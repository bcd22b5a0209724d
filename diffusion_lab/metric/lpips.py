r"""LPIPS, the distance between two images in the features of AlexNet.

An evaluation downloads nothing. The ImageNet weights must be in the cache of torch, where

    python -c "import torchvision; torchvision.models.alexnet(weights='DEFAULT')"

puts them. The weights of the channels come with torchmetrics, whose network is used here without
its running mean: a value for each image is needed.

Source:
    Zhang, Isola, Efros, Shechtman, Wang, "The unreasonable effectiveness of deep features as a
    perceptual metric", 2018, eq. 1.
"""

__all__ = ["LPIPS", "MIN_SIZE", "find_lpips"]

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import AlexNet_Weights

MIN_SIZE = 31  # pixels, the smallest image for the two poolings of AlexNet


class LPIPS(nn.Module):
    """Maps two batches of images (B, 3, H, W), clipped to [-1, 1], to distances (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LearnedPerceptualImagePatchSimilarity(net_type="alex").net
        self.requires_grad_(False)

    def forward(self, estimate: Tensor, x_0: Tensor) -> Tensor:
        distances: Tensor = self.net(estimate.clamp(-1, 1), x_0.clamp(-1, 1))
        return distances.flatten(1).mean(1)


def find_lpips() -> LPIPS | None:
    """Returns the metric, or None if the weights of AlexNet are not in the cache of torch."""
    name = AlexNet_Weights.DEFAULT.url.rsplit("/", 1)[1]
    return LPIPS() if Path(torch.hub.get_dir(), "checkpoints", name).is_file() else None
