r"""Features of DINOv2, whose distances agree with human judgement better than those of Inception.

A vision transformer with patches of 14 x 14 pixels, trained without labels; the features are its
normalised class token. Images are scaled to 224 x 224 (bicubic, anti-aliased). The position
embedding, trained for 37 x 37 patches, is interpolated to 16 x 16 as by the authors: bicubic, with
the factor (16 + 0.1) / 37. FD_DINOv2 in the literature is the Fréchet distance with `size: large`.

Sources:
    Oquab et al., "DINOv2: learning robust visual features without supervision", 2023.
    Stein et al., "Exposing flaws of generative model evaluation metrics", 2023 (FD_DINOv2).
"""

__all__ = ["DINOv2"]

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.constraints import NonEmptyStr, checked
from diffusion_lab.errors import ConfigError
from diffusion_lab.metric.features import damaged, find_weights, load_weights, sha256

SIDE, PATCH, TRAINED = 224, 14, 37  # pixels; pixels of a patch; patches per side in training
OFFSET = 0.1  # of the interpolation factor of positions
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels in [0, 1]
DIMS = {"small": 384, "base": 768, "large": 1024}


class DINOv2(nn.Module):
    """Maps uint8 images (B, H, W, 3) to features (B, d).

    Arguments:
        size: small (d = 384), base (768) or large (1024, as in the literature).
        weights: The file of weights; None uses the cache of torch, and downloads it if missing.

    Attributes:
        name: Identifies the features, also in file names; contains a part of the hash of the
            weights.
        dim: The number d of features.

    Raises:
        ArgumentError: If the size is unknown.
        ConfigError: If timm or the weights are missing, or cannot be used.
    """

    mean: Tensor
    std: Tensor

    @checked
    def __init__(
        self,
        size: Literal["small", "base", "large"] = "large",
        weights: NonEmptyStr | None = None,
    ) -> None:
        super().__init__()
        try:
            import timm
            from timm.models.vision_transformer import checkpoint_filter_fn
        except ImportError as error:
            raise ConfigError(
                "extractor=dinov2 needs timm; pip install 'diffusion-lab[dinov2]'"
            ) from error
        model = f"vit_{size}_patch14_dinov2"
        pretrained = timm.get_pretrained_cfg(model)
        assert pretrained is not None and isinstance(pretrained.url, str)
        path = find_weights(weights, pretrained.url)
        state = load_weights(path)
        self.dim, self.name = DIMS[size], f"dinov2-{size}-{sha256(path)[:8]}"
        self.network = timm.create_model(model, num_classes=0, img_size=SIDE)
        try:
            state["pos_embed"] = _positions(state["pos_embed"])
            self.network.load_state_dict(
                checkpoint_filter_fn(state, self.network)  # type: ignore[arg-type]  # is a ViT
            )
        except (RuntimeError, KeyError, TypeError) as error:
            raise damaged(path, error) from error
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "DINOv2":
        """Keeps evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)
        features: Tensor = self.network((x / 255 - self.mean) / self.std)
        return features


def _positions(embedding: Tensor) -> Tensor:
    """The embedding of the class token and of 37² patches, (1, 1 + 37², d), for 16² patches."""
    token, patches = torch.split(embedding, [1, TRAINED**2], dim=1)
    grid = patches.transpose(1, 2).reshape(len(patches), -1, TRAINED, TRAINED)
    factor = (SIDE // PATCH + OFFSET) / TRAINED
    grid = F.interpolate(grid, scale_factor=factor, mode="bicubic")
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)
