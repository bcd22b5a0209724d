r"""Group norm, SiLU and 3x3 convolution by the compiled functions, on tensors, without autograd.

The convolution is Winograd's F(4x4, 3x3). A tile of 4x4 pixels of the result depends on 6x6 pixels
d of the input and is

    y = Aᵀ [ Σ_channels (G w Gᵀ) ⊙ (Bᵀ d B) ] A.

The sum is 36 matrix products with 2.25 multiplications per pixel and pair of channels; a direct
convolution needs 9. The gradient of the input is such a convolution as well, with the weights
rotated by 180° and their channels exchanged. The gradient of the weights is

    dw = Gᵀ [ Σ_tiles (Bᵀ d B) ⊙ (A g Aᵀ) ] G.

Source:
    Lavin, Gray, "Fast algorithms for convolutional neural networks", 2015, section 4.3.
    Barabasz et al., "Error analysis and improving the accuracy of Winograd convolution", 2020: the
    choice of points.
"""

__all__ = ["Moments", "convolve", "moments", "norm_silu_backward", "weight_gradient"]

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.nn.cpu.library import load_library


def _channels_last(x: Tensor) -> Tensor:
    """The tensor in the memory layout of the compiled functions, without its graph."""
    return x.detach().contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, *shape: int) -> Tensor:
    """An uninitialised channels_last tensor of x's dtype and device."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _call(name: str, *arguments: object) -> None:
    """Calls a compiled function with the addresses of tensors; it returns 0 without memory."""
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if not getattr(load_library(), f"lab_{name}")(*values):
        sizes = [a for a in arguments if isinstance(a, int)]
        raise MemoryError(f"no memory for {name} of size {sizes}; choose a smaller batch_size")


class Moments(NamedTuple):
    """A group norm of one input: a = x scale + shift.

    Attributes:
        mean: μ, of shape (B, groups).
        rstd: 1 / √(v + eps), of shape (B, groups).
        scale: γ rstd, of shape (B, C).
        shift: β - μ γ rstd, of shape (B, C).
    """

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor


def moments(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> Moments:
    """Computes the statistics of a group norm, and its scale and shift per channel.

    Arguments:
        x: The input, of shape (B, C, H, W).
        gamma, beta: γ and β, of shape (C,).
        groups: The number of groups.
        eps: A constant that is added to the variance.
    """
    x = _channels_last(x)
    batch, channels, height, width = x.shape
    per_group, per_channel = (
        [x.new_empty(batch, n) for _ in range(2)] for n in (groups, channels)
    )
    result = Moments(*per_group, *per_channel)
    arguments = (gamma.detach().contiguous(), beta.detach().contiguous())
    _call(
        "moments", x, batch, height * width, channels, groups, *arguments, eps,
        *result,
    )  # fmt: skip
    return result


def norm_silu_backward(
    gradient: Tensor, x: Tensor, gamma: Tensor, norm: Moments
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Backpropagates through SiLU(a), a = x̂ γ + β, to x, γ and β.

        d_x = d_a γ / s - (x - μ) k - Σ d_a γ / (n s),  s = √(v + eps),  k = Σ d_a γ x̂ / (n s²),

    with sums over the n numbers of a group.

    Arguments:
        gradient: The gradient of SiLU(a), of shape (B, C, H, W); overwritten by d_x.
        x: The norm's input, of the same shape.
        gamma: γ, of shape (C,).
        norm: The moments of x.
    """
    gradient, x = _channels_last(gradient), _channels_last(x)
    batch, channels, height, width = x.shape
    d_gamma, d_beta = torch.empty_like(gamma), torch.empty_like(gamma)
    _call(
        "norm_silu_backward", gradient, x, batch, height * width, channels,
        norm.mean.shape[1], gamma, *norm, d_gamma, d_beta,
    )  # fmt: skip
    return gradient, d_gamma, d_beta


def _transform(weight: Tensor, transposed: bool) -> Tensor:
    """G w Gᵀ, in the memory layout of the matrix products."""
    out, channels = weight.shape[1::-1] if transposed else weight.shape[:2]
    u = weight.new_empty(36, channels, out)
    ordered = _channels_last(weight)
    _call("transform_weight", ordered, channels, out, transposed, u)
    return u


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: Moments | None = None,
    time: Tensor | None = None, skip: Tensor | None = None, upsample: bool = False,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """Returns y = f(x) * w + bias + time + skip, of shape (B, C', H, W).

    Arguments:
        x: Of shape (B, C, H, W).
        weight: w, of shape (C', C, 3, 3).
        bias: Of shape (C',).
        norm: If given, f(x) = SiLU(x scale + shift), otherwise f(x) = x.
        time: Of shape (B, C').
        skip: Of y's shape.
        upsample: Whether f(x) is x upsampled to (2H, 2W) by repeating pixels; y has that size.
        transposed: Whether x is the gradient of y, and the gradient of f(x) is returned; w then
            has the shape (C, C', 3, 3).
    """
    u, x = _transform(weight, transposed), _channels_last(x)
    batch, channels, height, width = x.shape
    if upsample:
        height, width = 2 * height, 2 * width
    out = weight.shape[1 if transposed else 0]
    y = _empty(x, batch, out, height, width)
    bias, time = (t if t is None else t.detach().contiguous() for t in (bias, time))
    skip = skip if skip is None else _channels_last(skip)
    scale, shift = (None, None) if norm is None else norm[2:]
    _call(
        "convolve", x, batch, height, width, channels, scale, shift, upsample,
        u, out, bias, time, skip, y,
    )  # fmt: skip
    return y


def weight_gradient(
    x: Tensor, gradient: Tensor, norm: Moments | None = None, upsample: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of w, of shape (C', C, 3, 3), and of `time`, for `convolve`.

    Arguments:
        x, norm, upsample: As for `convolve`.
        gradient: The gradient of y, of shape (B, C', H, W).
    """
    x, gradient = _channels_last(x), _channels_last(gradient)
    (batch, channels), (out, height, width) = x.shape[:2], gradient.shape[1:]
    d_w = _empty(x, out, channels, 3, 3)
    d_time = x.new_empty(batch, out)
    scale, shift = (None, None) if norm is None else norm[2:]
    _call(
        "weight_gradient", x, batch, height, width, channels, scale, shift, upsample,
        gradient, out, d_w, d_time,
    )  # fmt: skip
    return d_w, d_time
