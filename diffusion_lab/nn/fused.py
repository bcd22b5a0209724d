r"""Group norm, SiLU and 3x3 convolution in one, of which the backward pass keeps little.

    a = x̂ γ + β,  x̂ = (x - μ) / √(v + eps) with μ, v over a group,    y = SiLU(a) * W + b.

Written out, autograd keeps the norm's input x, its output a and SiLU's, three tensors of x's size.
Here only x is kept, and μ and v, one number a group: a and SiLU(a) are computed again, in one pass
over x, when the gradient comes. The skip of a residual block keeps x anyway.

Under autocast all of it runs in the reduced precision, with the norm's sums in float32, where
torch's own rule would have a and SiLU(a) written in float32 and rounded afterwards. What
torch.compile traces is the plain formula: its partitioner makes the same choice by itself.

Source:
    Chen et al., "Training deep nets with sublinear memory cost", 2016 (computing again).
    Bulò, Porzi, Kontschieder, "In-place activated BatchNorm", 2018 (norm and activation as one).
"""

__all__ = ["group_norm", "norm_silu_conv"]

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def _reduced(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Casts to the type that autocast asks for, or leaves everything as it is."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta: to count FLOP
        return x, *weights
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in (x, *weights))


def _as_is(x: Tensor) -> AbstractContextManager:
    """Within it, types are those of the tensors."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Applies a group norm, in the reduced precision if there is one: its sums are float32.

    Arguments:
        x: Of shape (B, C, *).
        norm: The norm.
    """
    x, gamma, beta = _reduced(x, norm.weight, norm.bias)
    with _as_is(x):
        return F.group_norm(x, norm.num_groups, gamma, beta, norm.eps)


class _NormSiLUConv(torch.autograd.Function):
    """The formula above; arguments x, γ, β, W, b, the number of groups, eps."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor,
        groups: int, eps: float,
    ) -> Tensor:  # fmt: skip
        batch, channels, *size = x.shape
        a, mean, rstd = torch.native_group_norm(
            x, gamma, beta, batch, channels, size[0] * size[1], groups, eps
        )
        ctx.save_for_backward(x, mean, rstd, gamma, beta, weight)
        ctx.groups = groups
        return F.conv2d(F.silu(a, inplace=True), weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, gamma, beta, weight = ctx.saved_tensors
        batch, channels, height, width = x.shape
        needs = ctx.needs_input_grad
        # a = x scale + shift, with a scale and a shift for each image and channel.
        each = channels // ctx.groups
        scale = rstd.repeat_interleave(each, 1) * gamma
        shift = beta - mean.repeat_interleave(each, 1) * scale
        scale, shift = (c.to(x.dtype)[:, :, None, None] for c in (scale, shift))
        a = torch.addcmul(shift, x, scale)
        activation = F.silu(a) if needs[3] else a  # else of the right shape is enough
        d_activation, d_weight, d_bias = aten.convolution_backward(
            gradient, activation, weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            [any(needs[:3]), needs[3], needs[4]],
        )  # fmt: skip
        del activation
        if d_activation is None:
            return None, None, None, d_weight, d_bias, None, None
        d_a = aten.silu_backward(d_activation, a)
        del a, d_activation
        d_x, d_gamma, d_beta = aten.native_group_norm_backward(
            d_a, x, mean, rstd, gamma, batch, channels, height * width, ctx.groups,
            [needs[0], needs[1], needs[2]],
        )  # fmt: skip
        return d_x, d_gamma, d_beta, d_weight, d_bias, None, None


def norm_silu_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, dropout: nn.Dropout | None = None
) -> Tensor:
    """Returns conv(dropout(SiLU(norm(x)))), of shape (B, C', H, W).

    The gradient can be taken once; a second derivative raises an error.

    Arguments:
        x: Of shape (B, C, H, W).
        norm: The group norm.
        conv: The convolution, 3x3 with stride 1 and padding 1.
        dropout: What is dropped in between, if anything is.
    """
    if dropout is not None and dropout.training and dropout.p > 0:
        return conv(dropout(F.silu(group_norm(x, norm))))
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return conv(F.silu(group_norm(x, norm), inplace=not torch.is_grad_enabled()))
    assert conv.bias is not None  # all of ours have one
    x, *weights = _reduced(x, norm.weight, norm.bias, conv.weight, conv.bias)
    with _as_is(x):
        return _NormSiLUConv.apply(x, *weights, norm.num_groups, norm.eps)
