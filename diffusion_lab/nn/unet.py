r"""The U-Net of Ho et al. (2020), with any width, number of levels and place of attention.

Each level of the way down has `blocks` residual blocks, each level of the way up one more. Every
activation of the way down (the first convolution, each block, each downsampling) is kept and
concatenated to the input of one block of the way up. With the defaults this is the network of the
paper's CelebA-HQ-256 experiments, of 113,673,219 parameters.

The weights are held channels_last, the order in memory that convolutions are fastest in, and so
is everything in between; `compile_blocks` and `cast_blocks` make it faster on a GPU. Where a
processor has no instructions for bfloat16, the network runs in float32 whatever it is asked for:
emulated, a step takes 8 to 20 times as long, and is less exact.

Source:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, appendix B.
"""

__all__ = ["UNet", "emulates_bfloat16"]

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_lab.nn import winograd
from diffusion_lab.nn.blocks import (
    NEARLY_ZERO,
    NORM_EPS,
    Attention,
    Downsample,
    ResidualBlock,
    TimeEmbedding,
    Upsample,
    initialise,
)
from diffusion_lab.nn.fused import norm_silu_conv

EMULATED = (
    "this processor only emulates bfloat16, which takes 8 times as long or more: the network"
)


def emulates_bfloat16() -> bool:
    """Whether the processor has no instructions for bfloat16 that torch makes use of."""
    mkldnn = torch.backends.mkldnn.is_available()
    return not (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_pointless(device: torch.device) -> bool:
    """Whether what autocast asks for here is slower than float32, and less exact."""
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    return torch.get_autocast_dtype("cpu") == torch.bfloat16 and emulates_bfloat16()


class UNet(nn.Module):
    r"""Predicts an image from a noisy image x and the noise index i: unet(x, i).

    Arguments:
        channels: Width of the first level; the time embedding is four times as wide.
        multipliers: Width of each level as a multiple of `channels`, finest level first.
        blocks: Residual blocks per level on the way down.
        attention_levels: Levels (0 is the finest) whose blocks are followed by attention. The
            middle always has attention.
        groups: Groups of the group norms; divides every width.
        dropout: Dropout probability, in [0, 1).
        image_channels: Channels of input and prediction.
        classes: The number K of classes of images that it is told, 0 for none; the label K stands
            for no class.
        learn_variance: Whether the output has a second half of its channels, for the variance of
            the reverse steps; see `NetworkDenoiser`.
        checkpointing: Whether a block keeps its input alone for the backward pass and computes
            the rest again: a third more work, for a fraction of the memory.

    Raises:
        ValueError: If a width is not a multiple of `groups`, or a level does not exist.
    """

    def __init__(
        self,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4, 4),
        blocks: int = 2,
        attention_levels: Sequence[int] = (4,),
        groups: int = 32,
        dropout: float = 0.0,
        image_channels: int = 3,
        classes: int = 0,
        learn_variance: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        if any(width % groups for width in widths):
            raise ValueError(
                f"groups={groups} does not divide the widths {widths}; "
                f"choose a divisor of channels={channels}"
            )
        if not all(0 <= level < len(widths) for level in attention_levels):
            raise ValueError(
                f"attention_levels={list(attention_levels)} names a level that does not exist; "
                f"multipliers={list(multipliers)} make levels 0 to {len(widths) - 1}"
            )
        features = 4 * channels
        self.image_channels, self.classes = image_channels, classes
        self.learn_variance, self.checkpointing = learn_variance, checkpointing
        self._is_compiled = False
        self.downsampling = 2 ** (len(widths) - 1)  # height and width must be multiples of it
        self.time_embedding = TimeEmbedding(channels, features)
        if classes:  # a new network does not tell the classes apart
            self.class_embedding = nn.Embedding(classes + 1, features)
            nn.init.zeros_(self.class_embedding.weight)
        self.conv_in = initialise(nn.Conv2d(image_channels, channels, 3, padding=1))

        def block(in_channels: int, out_channels: int) -> ResidualBlock:
            return ResidualBlock(in_channels, out_channels, features, groups, dropout)

        def attention(level: int) -> nn.Module:
            return Attention(widths[level], groups) if level in attention_levels else nn.Identity()

        self.down = nn.ModuleList()
        width, skips = channels, [channels]
        for level, out in enumerate(widths):
            last = level == len(widths) - 1
            stage = nn.Module()
            stage.block = nn.ModuleList(
                block(width if j == 0 else out, out) for j in range(blocks)
            )
            stage.attention = nn.ModuleList(attention(level) for _ in range(blocks))
            stage.resample = nn.Identity() if last else Downsample(out)
            self.down.append(stage)
            skips += [out] * (blocks if last else blocks + 1)
            width = out

        self.mid = nn.Module()
        self.mid.block_1 = block(width, width)
        self.mid.attention = Attention(width, groups)
        self.mid.block_2 = block(width, width)

        self.up = nn.ModuleList()  # coarsest level first: the order of use
        for level, out in reversed(list(enumerate(widths))):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(blocks + 1):
                stage.block.append(block(width + skips.pop(), out))
                width = out
            stage.attention = nn.ModuleList(attention(level) for _ in range(blocks + 1))
            stage.resample = nn.Identity() if level == 0 else Upsample(out)
            self.up.append(stage)

        self.norm_out = nn.GroupNorm(groups, width, eps=NORM_EPS)
        outputs = 2 * image_channels if learn_variance else image_channels
        self.conv_out = initialise(nn.Conv2d(width, outputs, 3, padding=1), NEARLY_ZERO)
        self.to(memory_format=torch.channels_last)

    def _parts(self) -> list[nn.Module]:
        """All that is between the first and the last convolution."""
        return [*self.down, self.mid, *self.up]

    def compile_blocks(self) -> None:
        """Has torch.compile make code of each block, in place: names and values stay.

        Blocks of one shape share their code, which keeps compiling short. The first call of each
        shape of the input takes it. On a CPU that `winograd` serves they run as they are: its
        code is compiled already, and twice as fast.
        """
        self._is_compiled = True
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)  # one for each shape of a block
        for part in self._parts():
            for module in part.modules():
                if isinstance(module, ResidualBlock | Attention | Downsample | Upsample):
                    module.compile(dynamic=False)

    def cast_blocks(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """Casts the weights of the blocks, once and for good: for sampling.

        Where it turns out that they are to run on a processor that emulates bfloat16, they become
        float32 again, rounded as they are.

        The embedding of the time, the first convolution and the last norm and convolution stay as
        they are, and so do input and output: what enters and leaves is not rounded. The sums of
        the norms are float32.

        Arguments:
            dtype: The type, torch.bfloat16 or torch.float16.
        """
        for part in self._parts():
            part.to(dtype)

    def _run(self, block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        """A residual block, of which only the input is kept with `checkpointing`."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, embedding, use_reentrant=False)
        return block(h, embedding)

    def forward(
        self, x: Tensor, index: Tensor | float, label: Tensor | int | None = None
    ) -> Tensor:
        """Predicts an image.

        Arguments:
            x: The noisy image x_t, of shape (B, C, H, W).
            index: DDPM's noise index i = tT - 1, integer or fractional, of shape () or (B,).
            label: The class of each image, int64, of shape () or (B,); none if None.

        Raises:
            ValueError: If H or W is not a multiple of 2^(levels - 1).
        """
        if _is_pointless(x.device):
            warnings.warn(
                f"{EMULATED} is trained in float32, as by trainer.precision=32-true",
                stacklevel=2,
            )
            with torch.autocast("cpu", enabled=False):
                return self.forward(x.float(), index, label)
        if x.shape[-2] % self.downsampling or x.shape[-1] % self.downsampling:
            raise ValueError(
                f"an image of {x.shape[-2]}x{x.shape[-1]} pixels does not fit a U-Net of "
                f"{len(self.down)} levels: height and width must be multiples of "
                f"{self.downsampling}"
            )
        if self._is_compiled and winograd.serves(self.conv_in.weight):
            with torch.compiler.set_stance("force_eager"):
                return self._predict(x, index, label)
        return self._predict(x, index, label)

    def _predict(
        self, x: Tensor, index: Tensor | float, label: Tensor | int | None
    ) -> Tensor:  # fmt: skip
        """The network itself."""
        index = torch.as_tensor(index, device=x.device).expand(x.shape[0])
        embedding = self.time_embedding(index)
        if self.classes:
            if label is None:
                label = torch.full((len(x),), self.classes, device=x.device)
            label = torch.as_tensor(label, device=x.device).expand(len(x))
            embedding = embedding + self.class_embedding(label)
        embedding, h = F.silu(embedding), self.conv_in(x)
        dtype = next(self.mid.parameters()).dtype
        if dtype == torch.bfloat16 and x.device.type == "cpu" and emulates_bfloat16():
            warnings.warn(f"{EMULATED} runs in float32, with rounded weights", stacklevel=2)
            dtype = torch.float32
            with torch.inference_mode(False):  # or they would be of no use outside of one
                for part in self._parts():
                    part.to(dtype)
        cast = dtype != self.conv_in.weight.dtype  # the blocks were
        if cast:
            embedding, h = embedding.to(dtype), h.to(dtype)
        skips = [h]
        stage: Any  # of what a module is made of, torch knows too little to check it
        mid: Any = self.mid
        for level, stage in enumerate(self.down):
            for block, attention in zip(stage.block, stage.attention, strict=True):
                h = attention(self._run(block, h, embedding))
                skips.append(h)
            if level < len(self.down) - 1:
                h = stage.resample(h)
                skips.append(h)

        h = self._run(mid.block_1, h, embedding)
        h = self._run(mid.block_2, mid.attention(h), embedding)

        for stage in self.up:
            for block, attention in zip(stage.block, stage.attention, strict=True):
                h = attention(self._run(block, torch.cat([h, skips.pop()], dim=1), embedding))
            h = stage.resample(h)

        if cast:
            h = h.to(self.conv_out.weight.dtype)
        return norm_silu_conv(h, self.norm_out, self.conv_out).contiguous()
