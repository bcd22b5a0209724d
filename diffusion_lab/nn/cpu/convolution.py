r"""Differentiable 3x3 convolution by the compiled kernels.

    y = f(x) * W + b + time + skip,    f = SiLU ∘ norm, or nearest-neighbour upsampling by 2.

The kernels serve float32 images on x86-64 Linux with AVX2, unless the environment variable
DIFFUSION_LAB_CPU_KERNELS is 0. They take 0.25 to 0.5 of the time of
oneDNN's convolutions with torch's group norm and SiLU. The backward pass keeps x and the norm's
statistics and computes f(x) again. A graph of the gradient, for second derivatives, is made of
torch's operations; see `differentiable`.
"""

__all__ = ["convolve", "is_available", "is_supported"]

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.nn.cpu import kernels
from diffusion_lab.nn.cpu.library import load_library
from diffusion_lab.nn.differentiable import formula_gradients, needs_formula

LANES, TILE = 8, 4  # channels are multiples of LANES, height and width of TILE
MIN_TILES = 8  # with fewer tiles the transform of the weights costs more than it saves
MAX_WEIGHTS = 2**17  # pairs of channels; the transformed weights of more exceed the cache


def is_available(x: Tensor) -> bool:
    """Returns whether the kernels run here on tensors of the device and dtype of x."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not needs_formula()
        and load_library() is not None
    )


def is_supported(x: Tensor, weight: Tensor, upsample: bool = False) -> bool:
    """Returns whether the kernels can do a convolution, and are faster than torch's operations.

    Arguments:
        x: The input, of shape (B, C, H, W).
        weight: The weights, of shape (C', C, k, k).
        upsample: Whether x is upsampled by 2 before the convolution.
    """
    (batch, _, height, width), (out, channels, *size) = x.shape, weight.shape
    if upsample:
        height, width = 2 * height, 2 * width
    return (
        size == [3, 3]
        and weight.dtype == torch.float32
        and channels % LANES == out % LANES == 0
        and channels * out <= MAX_WEIGHTS
        and height % TILE == width % TILE == 0
        and batch * height * width >= MIN_TILES * TILE**2
        and is_available(x)
    )


class _Convolution(torch.autograd.Function):
    """The formula above; f is the norm and SiLU if γ and β are given, otherwise upsampling.

    Arguments x, γ, β, W, b, time, skip, the number of groups, eps.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, weight: Tensor,
        bias: Tensor | None, time: Tensor | None, skip: Tensor | None, groups: int, eps: float,
    ) -> Tensor:  # fmt: skip
        norm = None
        if gamma is not None and beta is not None:
            norm = kernels.moments(x, gamma, beta, groups, eps)
        ctx.save_for_backward(x, gamma, beta, weight, *(norm or ()))
        ctx.groups, ctx.eps = groups, eps
        return kernels.convolve(x, weight, bias, norm, time, skip, upsample=norm is None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph
            return _backward_by_formula(ctx, gradient)
        x, gamma, _, weight, *saved = ctx.saved_tensors
        norm = kernels.Moments(*saved) if saved else None
        needs = ctx.needs_input_grad
        d_x = d_gamma = d_beta = d_weight = sums = None
        if needs[3]:
            d_weight, sums = kernels.weight_gradient(x, gradient, norm, upsample=norm is None)
        elif needs[4] or needs[5]:
            sums = gradient.sum((2, 3))
        d_bias = sums.sum(0) if sums is not None and needs[4] else None
        d_time = sums if needs[5] else None
        if any(needs[:3]):
            d_x = kernels.convolve(gradient, weight, transposed=True)
            if norm is None:
                d_x = F.avg_pool2d(d_x, 2, divisor_override=1)
            else:
                d_x, d_gamma, d_beta = kernels.norm_silu_backward(d_x, x, gamma, norm)
        d_skip = gradient if needs[6] else None
        return d_x, d_gamma, d_beta, d_weight, d_bias, d_time, d_skip, None, None


def _backward_by_formula(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass with a graph, by operations of torch."""
    x, gamma, beta, weight = ctx.saved_tensors[:4]
    needs = ctx.needs_input_grad

    def formula(x: Tensor, gamma: Tensor | None, beta: Tensor | None, weight: Tensor) -> Tensor:
        if gamma is None:
            h = F.interpolate(x, scale_factor=2)
        else:
            h = F.silu(F.group_norm(x, ctx.groups, gamma, beta, ctx.eps))
        return F.conv2d(h, weight, padding=1)

    with torch.autocast("cpu", enabled=False):
        found = formula_gradients(formula, (x, gamma, beta, weight), needs[:4], gradient)
    d_bias = gradient.sum((0, 2, 3)) if needs[4] else None
    d_time = gradient.sum((2, 3)) if needs[5] else None
    return *found, d_bias, d_time, gradient if needs[6] else None, None, None


def convolve(
    x: Tensor, conv: nn.Conv2d, norm: nn.GroupNorm | None = None, time: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Returns conv(f(x)) + time + skip, or None if the kernels do not support the input.

    The result can be differentiated any number of times.

    Arguments:
        x: The input, of shape (B, C, H, W).
        conv: The convolution, with stride 1 and padding 1.
        norm: If given, f(x) = SiLU(norm(x)); otherwise f upsamples x by 2, repeating pixels.
        time: Added to all pixels of an image, of shape (B, C').
        skip: Added to each pixel, of the result's shape.
    """
    if not is_supported(x, conv.weight, upsample=norm is None):
        return None
    gamma, beta, groups, eps = (
        (None, None, 0, 0.0) if norm is None
        else (norm.weight, norm.bias, norm.num_groups, norm.eps)
    )  # fmt: skip
    result: Tensor = _Convolution.apply(
        x, gamma, beta, conv.weight, conv.bias, time, skip, groups, eps
    )
    return result
