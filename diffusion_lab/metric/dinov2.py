r"""Features of DINOv2, which go better with what people see than those of a classifier do.

A vision transformer of 14 x 14 patches, trained without labels; the features are its normalised
class token. Images are scaled to 224 x 224 (bicubic, anti-aliased); the embedding of positions,
trained for 37 x 37 patches, is interpolated to 16 x 16 as the authors do it: bicubic, with the
factor (16 + 0.1) / 37. The literature's FD_DINOv2 is the Fréchet distance with `size: large`.

Sources:
    Oquab et al., "DINOv2: learning robust visual features without supervision", 2023.
    Stein et al., "Exposing flaws of generative model evaluation metrics", 2023 (FD_DINOv2).
"""

__all__ = ["DINOv2"]

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.errors import ConfigError
from diffusion_lab.metric.features import damaged, find_weights, load_weights, sha256

SIDE, PATCH, TRAINED = 224, 14, 37  # pixels; pixels of a patch; patches a side in training
OFFSET = 0.1  # of the factor by which positions are interpolated
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels in [0, 1]
DIMS = {"small": 384, "base": 768, "large": 1024}


class DINOv2(nn.Module):
    """Maps uint8 images (B, H, W, 3) to features (B, d).

    Arguments:
        size: small (d = 384), base (768) or large (1024, which the literature uses).
        weights: The file of weights; None takes the one in torch's cache, or downloads it there.

    Attributes:
        name: What distinguishes these features from others, also in file names; with a part of
            the hash of the weights.
        dim: Their number d.

    Raises:
        ConfigError: If the size is unknown, or timm or the weights are missing or cannot be used.
    """

    def __init__(self, size: str = "large", weights: str | None = None) -> None:
        super().__init__()
        if size not in DIMS:
            raise ConfigError(f"extractor.size={size}; it is one of {', '.join(DIMS)}")
        try:
            import timm
            from timm.models.vision_transformer import checkpoint_filter_fn
        except ImportError as error:
            raise ConfigError(
                "extractor=dinov2 needs timm; pip install 'diffusion-lab[dinov2]'"
            ) from error
        model = f"vit_{size}_patch14_dinov2"
        path = find_weights(weights, timm.get_pretrained_cfg(model).url)
        state = load_weights(path)
        self.dim, self.name = DIMS[size], f"dinov2-{size}-{sha256(path)[:8]}"
        self.network = timm.create_model(model, num_classes=0, img_size=SIDE)
        try:
            state["pos_embed"] = _positions(state["pos_embed"])
            self.network.load_state_dict(checkpoint_filter_fn(state, self.network))
        except (RuntimeError, KeyError, TypeError) as error:
            raise damaged(path, error) from error
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "DINOv2":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True)
        return self.network((x / 255 - self.mean) / self.std)


def _positions(embedding: Tensor) -> Tensor:
    """The embedding of the class token and of 37² patches, (1, 1 + 37², d), for 16² patches."""
    token, patches = embedding.split([1, TRAINED**2], dim=1)
    grid = patches.transpose(1, 2).unflatten(2, (TRAINED, TRAINED))
    factor = (SIDE // PATCH + OFFSET) / TRAINED
    grid = F.interpolate(grid, scale_factor=factor, mode="bicubic")
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)
