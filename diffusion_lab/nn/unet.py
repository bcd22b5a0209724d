r"""U-Net of Ho et al. (2020), with any width, number of levels and levels with attention.

Each level of the encoder has `blocks` residual blocks, each level of the decoder one more. Every
activation of the encoder (of the first convolution, each block, each downsampling) is concatenated
to the input of one block of the decoder. With the defaults this is the network of the paper's
CelebA-HQ-256 experiments, with 113,673,219 parameters.

Weights and activations are channels_last, the fastest memory layout for convolutions.
`compile_blocks` and `cast_blocks` make the network faster on a GPU. On a CPU without bfloat16
instructions, the network runs in float32 instead of bfloat16: an emulated step takes 8 to 20 times
as long and is less exact.

Source:
    Ho, Jain, Abbeel, "Denoising diffusion probabilistic models", 2020, appendix B.
"""

__all__ = ["UNet", "check_size", "emulates_bfloat16"]

import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_lab.constraints import Decay, Length, NonNegativeInt, PositiveInt, checked
from diffusion_lab.nn import cpu
from diffusion_lab.nn.blocks import (
    LAST_LAYER_SCALE,
    NORM_EPS,
    Attention,
    Downsample,
    ResidualBlock,
    TimeEmbedding,
    Upsample,
    initialise,
)
from diffusion_lab.nn.differentiable import needs_formula
from diffusion_lab.nn.fused import norm_silu_conv

EMULATED = "this processor only emulates bfloat16, at least 8 times as slowly: the network"


def emulates_bfloat16() -> bool:
    """Returns whether torch has no bfloat16 instructions to use on this processor."""
    mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # by torch
    return not (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_size(size: Sequence[int], levels: int) -> None:
    """Checks that every level of a U-Net has a whole number of pixels.

    Arguments:
        size: Height and width of the image.
        levels: The number of levels, len(multipliers).

    Raises:
        ValueError: If height or width is not a multiple of 2^(levels - 1).
    """
    multiple = 2 ** (levels - 1)
    if any(n % multiple for n in size):
        raise ValueError(
            f"an image of {'x'.join(map(str, size))} pixels does not fit a U-Net of {levels} "
            f"levels: height and width must be multiples of {multiple}"
        )


def _autocasts_to_emulated(device: torch.device) -> bool:
    """Whether autocast is enabled for a bfloat16 that is slower and less exact than float32."""
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    return torch.get_autocast_dtype("cpu") == torch.bfloat16 and emulates_bfloat16()


class UNet(nn.Module):
    r"""Predicts an image from a noisy image x and the noise index i: unet(x, i).

    Arguments:
        channels: Width of the first level; the time embedding is four times as wide.
        multipliers: Width of each level as a multiple of `channels`, finest level first.
        blocks: Residual blocks per level of the encoder.
        attention_levels: Levels (0 is the finest) whose blocks are followed by attention. The
            middle of the network always has attention.
        groups: Groups of the group norms; divides every width.
        dropout: Dropout probability in the residual blocks.
        image_channels: Channels of input and prediction.
        classes: The number K of classes, 0 for an unconditional network; the label K means no
            class.
        learn_variance: Whether the output has a second half of channels, for the variance of the
            reverse steps; see `NetworkDenoiser`.
        checkpointing: Whether the backward pass recomputes each residual block from its input
            (activation checkpointing): a third more work for a fraction of the memory.

    Raises:
        ArgumentError: If an argument is not allowed.
        ValueError: If a width is not a multiple of `groups`, or a level does not exist.
    """

    @checked
    def __init__(
        self,
        channels: PositiveInt = 128,
        multipliers: Annotated[Sequence[PositiveInt], Length(1)] = (1, 1, 2, 2, 4, 4),
        blocks: PositiveInt = 2,
        attention_levels: Sequence[NonNegativeInt] = (4,),
        groups: PositiveInt = 32,
        dropout: Decay = 0.0,
        image_channels: PositiveInt = 3,
        classes: NonNegativeInt = 0,
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
        if any(level >= len(widths) for level in attention_levels):
            raise ValueError(
                f"attention_levels={list(attention_levels)} contains a level that does not exist; "
                f"multipliers={list(multipliers)} define levels 0 to {len(widths) - 1}"
            )
        features = 4 * channels
        self.image_channels, self.classes = image_channels, classes
        self.learn_variance, self.checkpointing = learn_variance, checkpointing
        self._is_compiled = False
        self.downsampling = 2 ** (len(widths) - 1)  # height and width must be multiples of it
        self.time_embedding = TimeEmbedding(channels, features)
        if classes:  # zeros: a new network ignores the label
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

        self.up = nn.ModuleList()  # coarsest level first, in the order of use
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
        self.conv_out = initialise(nn.Conv2d(width, outputs, 3, padding=1), LAST_LAYER_SCALE)
        self.to(memory_format=torch.channels_last)

    def _parts(self) -> list[nn.Module]:
        """All modules between the first and the last convolution."""
        return [*self.down, self.mid, *self.up]

    def compile_blocks(self) -> None:
        """Compiles each block by torch.compile, in place; names and values of weights stay.

        Blocks of one shape share their code, which keeps the compilation short; it happens at the
        first call with each shape of the input. On a CPU with compiled kernels (`nn.cpu`) the
        blocks run uncompiled, because the kernels are twice as fast.
        """
        self._is_compiled = True
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)  # one per shape of a block
        for part in self._parts():
            for module in part.modules():
                if isinstance(module, ResidualBlock | Attention | Downsample | Upsample):
                    module.compile(dynamic=False)

    def cast_blocks(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """Casts the weights of the blocks permanently, for sampling.

        The time embedding, the first convolution, the last norm and convolution, input and output
        keep their dtype. The sums of the norms are float32. On a processor that emulates bfloat16,
        the first call casts the rounded weights to float32.

        Arguments:
            dtype: torch.bfloat16 or torch.float16.
        """
        for part in self._parts():
            part.to(dtype)

    def _run(self, block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        """Applies a residual block, with activation checkpointing if it is enabled."""
        out: Tensor
        # The transforms of torch.func do not support the hooks of checkpointing.
        if self.checkpointing and torch.is_grad_enabled() and not needs_formula():
            out = checkpoint(block, h, embedding, use_reentrant=False)
        else:
            out = block(h, embedding)
        return out

    def forward(
        self, x: Tensor, index: Tensor | float, label: Tensor | int | None = None
    ) -> Tensor:
        """Predicts an image.

        Arguments:
            x: The noisy image x_t, of shape (B, C, H, W).
            index: DDPM's noise index i = tT - 1, integer or fractional, of shape () or (B,).
            label: The class of each image, int64, of shape () or (B,); None means no class.

        Raises:
            ValueError: If H or W is not a multiple of 2^(levels - 1).
        """
        if _autocasts_to_emulated(x.device):
            warnings.warn(
                f"{EMULATED} is trained in float32, as by trainer.precision=32-true",
                stacklevel=2,
            )
            with torch.autocast("cpu", enabled=False):
                return self.forward(x.float(), index, label)
        check_size(x.shape[-2:], len(self.down))
        if self._is_compiled and cpu.is_available(self.conv_in.weight):
            with torch.compiler.set_stance("force_eager"):
                return self._predict(x, index, label)
        return self._predict(x, index, label)

    def _predict(
        self, x: Tensor, index: Tensor | float, label: Tensor | int | None
    ) -> Tensor:  # fmt: skip
        """The network without checks of its input."""
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
            with torch.inference_mode(False):  # inference tensors would fail outside of it
                for part in self._parts():
                    part.to(dtype)
        cast = dtype != self.conv_in.weight.dtype  # by `cast_blocks`
        if cast:
            embedding, h = embedding.to(dtype), h.to(dtype)
        skips = [h]
        stage: Any  # torch does not type the attributes of modules
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
