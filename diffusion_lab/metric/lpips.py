r"""LPIPS, the distance of two images in the features of AlexNet, where its weights are at hand.

Nothing is downloaded in an evaluation: the ImageNet weights are those in torch's own cache, where

    python -c "import torchvision; torchvision.models.alexnet(weights='DEFAULT')"

puts them. The weights of the features' channels come with torchmetrics.

Source:
    Zhang, Isola, Efros, Shechtman, Wang, "The unreasonable effectiveness of deep features as a
    perceptual metric", 2018, eq. 1.
"""

__all__ = ["LEAST", "LPIPS", "find_lpips"]

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import AlexNet_Weights

LEAST = 31  # pixels of the smallest image that AlexNet's two poolings leave something of


class LPIPS(nn.Module):
    """Maps images (B, 3, H, W) on the scale of [-1, 1], clipped, to distances (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LearnedPerceptualImagePatchSimilarity(net_type="alex").net
        self.requires_grad_(False)

    def forward(self, estimate: Tensor, x_0: Tensor) -> Tensor:
        return self.net(estimate.clamp(-1, 1), x_0.clamp(-1, 1)).flatten(1).mean(1)


def find_lpips() -> LPIPS | None:
    """Returns the metric, or None if AlexNet's weights are not in torch's cache."""
    name = AlexNet_Weights.DEFAULT.url.rsplit("/", 1)[1]
    return LPIPS() if Path(torch.hub.get_dir(), "checkpoints", name).is_file() else None
