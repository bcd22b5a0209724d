r"""Fused GroupNorm, SiLU and 3x3 convolution with reduced activation memory.

    a = x̂ γ + β,  x̂ = (x - μ) / √(v + eps) with μ, v over a group,    y = SiLU(a) * W + b.

As separate operations, autograd keeps x, a and SiLU(a), three tensors of x's size. Here only x, μ
and v are kept; the backward pass computes a and SiLU(a) again in one pass over x. The skip
connection of a residual block keeps x anyway. For a small x, where this saves little memory, the
operations stay separate.

Where the compiled kernels of `nn.cpu` support the input, they do all of it. Under autocast, all of
it runs in the reduced precision, with the norm's sums in float32; torch's own rule would write a
and SiLU(a) in float32 and round afterwards. torch.compile traces the separate operations: its
partitioner makes the same choice by itself.

Source:
    Chen et al., "Training deep nets with sublinear memory cost", 2016 (recomputation).
    Bulò, Porzi, Kontschieder, "In-place activated BatchNorm", 2018 (fused norm and activation).
"""

__all__ = ["group_norm", "norm_silu_conv", "upsample_conv"]

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.nn import cpu
from diffusion_lab.nn.differentiable import formula_gradients, needs_formula

aten = torch.ops.aten
MIN_NUMEL = 2**18  # for a smaller x, the saved memory is not worth the time of recomputation


def _reduced(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Casts to the dtype of autocast if it is enabled."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta tensors: counts of FLOP
        return x, *weights
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in (x, *weights))


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Disables autocast for x's device."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Applies a group norm in autocast's dtype, with float32 sums.

    Arguments:
        x: Of shape (B, C, *).
        norm: The norm.
    """
    x, gamma, beta = _reduced(x, norm.weight, norm.bias)
    with _without_autocast(x):
        return F.group_norm(x, norm.num_groups, gamma, beta, norm.eps)


class _NormSiLUConv(torch.autograd.Function):
    """The formula above. Arguments x, γ, β, W, b, the number of groups, eps."""

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
        ctx.groups, ctx.eps = groups, eps
        return F.conv2d(F.silu(a, inplace=True), weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph
            return _backward_by_formula(ctx, gradient)
        x, mean, rstd, gamma, beta, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        # a = x scale + shift, with one scale and shift per image and channel.
        gamma_g, beta_g = (c.view(ctx.groups, -1) for c in (gamma, beta))
        scale = rstd[:, :, None] * gamma_g
        shift = beta_g - mean[:, :, None] * scale
        scale, shift = (c.to(x.dtype).view(*x.shape[:2], 1, 1) for c in (scale, shift))
        a = torch.addcmul(shift, x, scale)
        activation = F.silu(a) if needs[3] else a  # otherwise only the shape is used
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


def _backward_by_formula(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass with a graph, by operations of torch."""
    x, _, _, gamma, beta, weight = ctx.saved_tensors

    def formula(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
        a = F.group_norm(x, ctx.groups, gamma, beta, ctx.eps)
        return F.conv2d(F.silu(a), weight, padding=1)

    needs = ctx.needs_input_grad
    with _without_autocast(x):
        found = formula_gradients(formula, (x, gamma, beta, weight), needs[:4], gradient)
    return *found, gradient.sum((0, 2, 3)) if needs[4] else None, None, None


def norm_silu_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, dropout: nn.Dropout | None = None,
    time: Tensor | None = None, skip: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns conv(dropout(SiLU(norm(x)))) + time + skip, of shape (B, C', H, W).

    The result can be differentiated any number of times; only the first derivative is fused.

    Arguments:
        x: The input, of shape (B, C, H, W).
        norm: The group norm.
        conv: The convolution, 3x3 with stride 1 and padding 1.
        dropout: Dropout between activation and convolution.
        time: Added to all pixels of an image, of shape (B, C').
        skip: Added to each pixel, of shape (B, C', H, W).
    """
    if dropout is not None and not (dropout.training and dropout.p > 0):
        dropout = None
    h: Tensor | None
    if dropout is None and (h := cpu.convolve(x, conv, norm, time, skip)) is not None:
        return h
    if dropout is not None:
        h = conv(dropout(F.silu(group_norm(x, norm))))
    elif _is_plain(x):
        h = conv(F.silu(group_norm(x, norm), inplace=not torch.is_grad_enabled()))
    else:
        assert conv.bias is not None
        x, *weights = _reduced(x, norm.weight, norm.bias, conv.weight, conv.bias)
        with _without_autocast(x):
            h = _NormSiLUConv.apply(x, *weights, norm.num_groups, norm.eps)
    # In place, which saves memory; under vmap, a term may have a dimension that h does not have.
    add = torch.Tensor.add if needs_formula() else torch.Tensor.add_
    if time is not None:
        h = add(h, time[:, :, None, None])
    return h if skip is None else add(h, skip)


def _is_plain(x: Tensor) -> bool:
    """Whether the operations stay separate."""
    return (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or x.numel() < MIN_NUMEL
        or needs_formula()
    )


def upsample_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    r"""Upsamples by 2, repeating pixels, and applies a 3x3 convolution.

    Both together are one transposed convolution of stride 2: each pixel of x contributes to a 4x4
    patch of the result, with weights Sᵀ W S. This needs 4 products per pixel of the result instead
    of 9, or 2.25 by the compiled kernels.

    Arguments:
        x: The input, of shape (B, C, H, W).
        conv: The convolution, with stride 1 and padding 1.
    """
    if (y := cpu.convolve(x, conv)) is not None:
        return y
    w = conv.weight
    # S[i, j] = 1 if row i of W maps a repeated pixel to row j of the 4 rows of its patch.
    k = torch.arange(3, device=w.device)[:, None] + torch.arange(4, device=w.device)
    s = ((k == 2) | (k == 3)).to(w.dtype)
    kernel = (w.flatten(2) @ torch.kron(s, s)).transpose(0, 1)
    kernel = kernel.unflatten(2, (4, 4))  # type: ignore[no-untyped-call]  # by torch
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)
