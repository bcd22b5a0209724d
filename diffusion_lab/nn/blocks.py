r"""Blocks of the U-Net of Ho et al. (2020): residual block, attention, resampling, embedding.

The initialisation is that of the original code: every weight is Xavier-uniform with zero bias, and
the last layer of each residual branch is scaled by almost zero. A new network is therefore the
identity on each branch, and its output is zero.

Source:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, appendix B.
"""

__all__ = [
    "LAST_LAYER_SCALE", "NORM_EPS", "Attention", "Downsample", "ResidualBlock", "TimeEmbedding",
    "Upsample", "initialise",
]  # fmt: skip

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.nn.attention import attention
from diffusion_lab.nn.dropout import KeyedDropout
from diffusion_lab.nn.fused import group_norm, norm_silu_conv, upsample_conv

NORM_EPS = 1e-6
LAST_LAYER_SCALE = 1e-10  # variance scale of last layers in the original code

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def initialise(layer: Layer, scale: float = 1.0) -> Layer:
    """Initialises w ~ U(-a, a), a = √(6 scale / (fan_in + fan_out)), b = 0; returns the layer.

    Arguments:
        layer: A convolution or linear layer.
        scale: The variance scale; 1 is that of Xavier initialisation.
    """
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class TimeEmbedding(nn.Module):
    r"""Embeds the noise index i as sinusoids, followed by two linear layers.

    [sin(i w_k), cos(i w_k)], w_k = 10000^(-k / (K - 1)), k = 0, ..., K - 1, with K = channels / 2.

    Arguments:
        channels: Number of sinusoids, 2K.
        features: Width of both linear layers.
    """

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = initialise(nn.Linear(channels, features))
        self.linear_2 = initialise(nn.Linear(features, features))

    def forward(self, index: Tensor) -> Tensor:
        """Maps the index i, of shape (B,), to features of shape (B, features)."""
        half, dtype = self.channels // 2, self.linear_1.weight.dtype
        exact = torch.promote_types(dtype, torch.float32)  # at least float32
        k = torch.arange(half, dtype=exact, device=index.device)
        angle = index.to(exact)[:, None] * torch.exp(-math.log(10000) / (half - 1) * k)
        sinusoids = torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype)
        features: Tensor = self.linear_2(F.silu(self.linear_1(sinusoids)))
        return features


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; the time embedding is added in between.

    Arguments:
        in_channels: Channels of the input; the skip is a 1x1 convolution if they change.
        out_channels: Channels of the output.
        features: Width of the time embedding.
        groups: Groups of the norms; divides both channel numbers.
        dropout: Probability of dropping an activation before the second convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, features: int, groups: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv_1 = initialise(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.time = initialise(nn.Linear(features, out_channels))
        self.norm_2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.dropout = KeyedDropout(dropout)
        self.conv_2 = initialise(
            nn.Conv2d(out_channels, out_channels, 3, padding=1), LAST_LAYER_SCALE
        )
        self.skip = (
            nn.Identity()
            if in_channels == out_channels
            else initialise(nn.Conv2d(in_channels, out_channels, 1))
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Maps x (B, C, H, W) and SiLU(embedding) (B, features) to (B, C', H, W)."""
        h = norm_silu_conv(x, self.norm_1, self.conv_1, time=self.time(embedding))
        return norm_silu_conv(h, self.norm_2, self.conv_2, self.dropout, skip=self.skip(x))


class Attention(nn.Module):
    """Self-attention over the pixels with a single head, x + softmax(q kᵀ / √C) v.

    Arguments:
        channels: Channels C of input and output.
        groups: Groups of the norm.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.query = initialise(nn.Linear(channels, channels))
        self.key = initialise(nn.Linear(channels, channels))
        self.value = initialise(nn.Linear(channels, channels))
        self.out = initialise(nn.Linear(channels, channels), LAST_LAYER_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, C, H, W) to the same shape."""
        tokens = group_norm(x, self.norm).flatten(2).transpose(1, 2)  # (B, HW, C)
        query, key, value = self.query(tokens), self.key(tokens), self.value(tokens)
        h = attention(query, key, value)
        out: Tensor = self.out(h).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + out


class Downsample(nn.Module):
    """Halves the resolution by a strided 3x3 convolution, padded on the right and bottom only.

    The padding is TensorFlow's SAME for even sizes, as pretrained weights require.

    Arguments:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = initialise(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, C, H, W) to (B, C, H/2, W/2)."""
        h: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return h


class Upsample(nn.Module):
    """Doubles the resolution by repeating pixels, followed by a 3x3 convolution.

    Arguments:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = initialise(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, C, H, W) to (B, C, 2H, 2W)."""
        return upsample_conv(x, self.conv)
