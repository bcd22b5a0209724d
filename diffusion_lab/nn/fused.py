r"""Group norm, SiLU and 3x3 convolution in one, of which the backward pass keeps little.

    a = x̂ γ + β,  x̂ = (x - μ) / √(v + eps) with μ, v over a group,    y = SiLU(a) * W + b.

Written out, autograd keeps the norm's input x, its output a and SiLU's, three tensors of x's size.
Here only x is kept, and μ and v, one number a group: a and SiLU(a) are computed again, in one pass
over x, when the gradient comes. The skip of a residual block keeps x anyway. Where x is small
there is little to be saved, and it is written out.

On a CPU that `winograd` serves, all of it happens there, whatever its size, and what is added to
the result is added on the way.

Under autocast all of it runs in the reduced precision, with the norm's sums in float32, where
torch's own rule would have a and SiLU(a) written in float32 and rounded afterwards. What
torch.compile traces is the plain formula: its partitioner makes the same choice by itself.

Source:
    Chen et al., "Training deep nets with sublinear memory cost", 2016 (computing again).
    Bulò, Porzi, Kontschieder, "In-place activated BatchNorm", 2018 (norm and activation as one).
"""

__all__ = ["group_norm", "norm_silu_conv", "repeat_conv"]

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffusion_lab.nn import winograd

aten = torch.ops.aten
SMALL = 2**18  # numbers, below which less memory is not worth the time of more operations


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
        needs = ctx.needs_input_grad
        # a = x scale + shift, with a scale and a shift for each image and channel.
        gamma_g, beta_g = (c.view(ctx.groups, -1) for c in (gamma, beta))
        scale = rstd[:, :, None] * gamma_g
        shift = beta_g - mean[:, :, None] * scale
        scale, shift = (c.to(x.dtype).view(*x.shape[:2], 1, 1) for c in (scale, shift))
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
        batch, channels, *size = x.shape
        gradients = aten.native_group_norm_backward(
            d_a, x, mean, rstd, gamma, batch, channels, size[0] * size[1], ctx.groups, needs[:3]
        )
        return *gradients, d_weight, d_bias, None, None


class _ByWinograd(torch.autograd.Function):
    """f(x) * W + b + time + skip, by `winograd`: f is the norm and SiLU, or repeats pixels.

    Arguments x, γ, β, W, b, time, skip, the number of groups, eps; there is no γ if f repeats.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, weight: Tensor,
        bias: Tensor, time: Tensor | None, skip: Tensor | None, groups: int, eps: float,
    ) -> Tensor:  # fmt: skip
        norm = None
        if gamma is not None and beta is not None:
            norm = winograd.moments(x, gamma, beta, groups, eps)
        ctx.save_for_backward(x, gamma, weight, *(norm or ()))
        return winograd.convolve(x, weight, bias, norm, time, skip, repeats=norm is None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, weight, *saved = ctx.saved_tensors
        norm = winograd.Moments(*saved) if saved else None
        needs = ctx.needs_input_grad
        d_x = d_gamma = d_beta = d_weight = sums = None
        if needs[3]:
            d_weight, sums = winograd.weight_gradient(x, gradient, norm, repeats=norm is None)
        elif needs[4] or needs[5]:
            sums = gradient.sum((2, 3))
        d_bias = sums.sum(0) if sums is not None and needs[4] else None
        d_time = sums if needs[5] else None
        if any(needs[:3]):
            d_x = winograd.convolve(gradient, weight, transposed=True)
            if norm is None:
                d_x = F.avg_pool2d(d_x, 2, divisor_override=1)
            else:
                d_x, d_gamma, d_beta = winograd.norm_silu_backward(d_x, x, gamma, norm)
        d_skip = gradient if needs[6] else None
        return d_x, d_gamma, d_beta, d_weight, d_bias, d_time, d_skip, None, None


def norm_silu_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, dropout: nn.Dropout | None = None,
    time: Tensor | None = None, skip: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns conv(dropout(SiLU(norm(x)))) + time + skip, of shape (B, C', H, W).

    The gradient can be taken once; a second derivative raises an error if x is large, or on a CPU.

    Arguments:
        x: Of shape (B, C, H, W).
        norm: The group norm.
        conv: The convolution, 3x3 with stride 1 and padding 1.
        dropout: What is dropped in between, if anything is.
        time: What is added to all pixels of an image, of shape (B, C').
        skip: What is added to each pixel, of shape (B, C', H, W).
    """
    if dropout is not None and not (dropout.training and dropout.p > 0):
        dropout = None
    if dropout is None and winograd.suits(x, conv.weight):
        return _ByWinograd.apply(
            x, norm.weight, norm.bias, conv.weight, conv.bias, time, skip, norm.num_groups,
            norm.eps,
        )  # fmt: skip
    if dropout is not None:
        h = conv(dropout(F.silu(group_norm(x, norm))))
    elif torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.numel() < SMALL:
        h = conv(F.silu(group_norm(x, norm), inplace=not torch.is_grad_enabled()))
    else:
        assert conv.bias is not None  # all of ours have one
        x, *weights = _reduced(x, norm.weight, norm.bias, conv.weight, conv.bias)
        with _as_is(x):
            h = _NormSiLUConv.apply(x, *weights, norm.num_groups, norm.eps)
    if time is not None:
        h = h.add_(time[:, :, None, None])
    return h if skip is None else h.add_(skip)


def repeat_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    r"""Repeats pixels, to twice the height and width, and applies a 3x3 convolution.

    Both are one transposed convolution of stride 2: a pixel meets a 4x4 patch of the result, by
    Sᵀ W S, S as below. That is 4 products a pixel of the result, not 9; or 2.25, by Winograd's
    algorithm.

    Arguments:
        x: Of shape (B, C, H, W).
        conv: The convolution, with stride 1 and padding 1.
    """
    w = conv.weight
    if winograd.suits(x, w, repeats=True):
        return _ByWinograd.apply(x, None, None, w, conv.bias, None, None, 0, 0.0)
    # S: which of 4 rows of the result a pixel, repeated, reaches by each of W's 3.
    k = torch.arange(3, device=w.device)[:, None] + torch.arange(4, device=w.device)
    s = ((k == 2) | (k == 3)).to(w.dtype)
    kernel = (w.flatten(2) @ torch.kron(s, s)).transpose(0, 1).unflatten(2, (4, 4))
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)
