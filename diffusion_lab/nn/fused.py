r"""Group norm, SiLU and 3x3 convolution in one, of which the backward pass keeps little.

    a = x̂ γ + β,  x̂ = (x - μ) / √(v + eps) with μ, v over a group,    y = SiLU(a) * W + b.

Written out, autograd keeps the norm's input x, its output a and SiLU's, three tensors of x's size.
Here only x is kept, and μ and v, one number a group: a and SiLU(a) are computed again, in one pass
over x, when the gradient comes. The skip of a residual block keeps x anyway. Where x is small
there is little to be saved, and it is written out.

Under autocast all of it runs in the reduced precision, with the norm's sums in float32, where
torch's own rule would have a and SiLU(a) written in float32 and rounded afterwards. What
torch.compile traces is the plain formula: its partitioner makes the same choice by itself.

Source:
    Chen et al., "Training deep nets with sublinear memory cost", 2016 (computing again).
    Bulò, Porzi, Kontschieder, "In-place activated BatchNorm", 2018 (norm and activation as one).
"""

__all__ = ["group_norm", "group_norm_backward", "norm_silu_conv"]

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffusion_lab.nn.weight_gradient import weight_gradient

aten = torch.ops.aten
SMALL = 2**18  # numbers, below which less memory is not worth the time of more operations
LARGE = 1024  # pixels, from which on torch's kernel for channels_last is another one


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


def group_norm_backward(
    d_a: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, groups: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    r"""The gradients of a = x̂ γ + β for x, γ and β, those that are needed.

        d_x = d_a γ / s - x k + (μ k - Σ d_a γ / (n s)),  s = √(v + eps),  k = Σ d_a γ x̂ / (n s²),

    with sums over the n numbers of a group. On a CPU, torch takes 3 to 9 times as long for large
    channels_last images as for small or contiguous ones; there this goes through memory by itself.

    Arguments:
        d_a: The gradient of a, of shape (B, C, H, W).
        x: The norm's input, of the same shape.
        mean, rstd: μ and 1 / s, of shape (B, groups).
        gamma: γ, of shape (C,).
        groups: The number of groups.
        needs: Whether there is to be a gradient for x, γ, β.
    """
    batch, channels, height, width = x.shape
    if (
        x.device.type != "cpu"
        or height * width < LARGE
        or x.dtype not in (torch.float32, torch.float64)
        or not x.is_contiguous(memory_format=torch.channels_last)
        or not d_a.is_contiguous(memory_format=torch.channels_last)
    ):
        return aten.native_group_norm_backward(
            d_a, x, mean, rstd, gamma, batch, channels, height * width, groups, list(needs)
        )
    each, count = channels // groups, channels // groups * height * width
    gamma, mean, rstd = gamma.view(groups, each), mean[:, :, None], rstd[:, :, None]
    x, d_a = (tensor.permute(0, 2, 3, 1).flatten(1, 2) for tensor in (x, d_a))
    product = x * d_a
    of_x, d_beta = (sums.sum(1).view(batch, groups, each) for sums in (product, d_a))
    d_gamma = (of_x - mean * d_beta) * rstd  # of each image, like d_beta
    k = (d_gamma * gamma).sum(2, keepdim=True) * rstd**2 / count
    constant = mean * k - (d_beta * gamma).sum(2, keepdim=True) * rstd / count
    k, constant, scale = (
        c.expand(batch, groups, each).reshape(batch, 1, channels)
        for c in (k, constant, rstd * gamma)
    )
    d_x = torch.addcmul(constant, x, k, value=-1, out=product).addcmul_(d_a, scale)
    d_x = d_x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    found = (d_x, d_gamma.sum(0).flatten(), d_beta.sum(0).flatten())
    return tuple(gradient if need else None for gradient, need in zip(found, needs, strict=True))


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
        needs = ctx.needs_input_grad
        # a = x scale + shift, with a scale and a shift for each image and channel.
        gamma_g, beta_g = (c.view(ctx.groups, -1) for c in (gamma, beta))
        scale = rstd[:, :, None] * gamma_g
        shift = beta_g - mean[:, :, None] * scale
        scale, shift = (c.to(x.dtype).view(*x.shape[:2], 1, 1) for c in (scale, shift))
        a = torch.addcmul(shift, x, scale)
        activation = F.silu(a) if needs[3] else a  # else of the right shape is enough
        own = weight_gradient(activation, gradient) if needs[3] else None
        d_activation, d_weight, d_bias = aten.convolution_backward(
            gradient, activation, weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            [any(needs[:3]), needs[3] and own is None, needs[4] and own is None],
        )  # fmt: skip
        if own is not None:  # torch would compute the weights' for the bias'
            d_weight, d_bias = own, gradient.sum((0, 2, 3)) if needs[4] else None
        del activation
        if d_activation is None:
            return None, None, None, d_weight, d_bias, None, None
        d_a = aten.silu_backward(d_activation, a)
        del a, d_activation
        gradients = group_norm_backward(d_a, x, mean, rstd, gamma, ctx.groups, needs[:3])
        return *gradients, d_weight, d_bias, None, None


def norm_silu_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, dropout: nn.Dropout | None = None
) -> Tensor:
    """Returns conv(dropout(SiLU(norm(x)))), of shape (B, C', H, W).

    The gradient can be taken once; a second derivative raises an error if x is large.

    Arguments:
        x: Of shape (B, C, H, W).
        norm: The group norm.
        conv: The convolution, 3x3 with stride 1 and padding 1.
        dropout: What is dropped in between, if anything is.
    """
    if dropout is not None and dropout.training and dropout.p > 0:
        return conv(dropout(F.silu(group_norm(x, norm))))
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.numel() < SMALL:
        return conv(F.silu(group_norm(x, norm), inplace=not torch.is_grad_enabled()))
    assert conv.bias is not None  # all of ours have one
    x, *weights = _reduced(x, norm.weight, norm.bias, conv.weight, conv.bias)
    with _as_is(x):
        return _NormSiLUConv.apply(x, *weights, norm.num_groups, norm.eps)
