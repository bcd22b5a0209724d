r"""3x3 convolutions on a CPU by Winograd's algorithm F(4x4, 3x3), norm and SiLU included.

    y = Aᵀ [ Σ_channels (G w Gᵀ) ⊙ (Bᵀ d B) ] A

is a tile of 4x4 pixels of the result; d are the 6x6 of the input that they depend on. The sum is
36 matrix products, 2.25 multiplications a pixel, where the convolution as it stands takes 9. The
gradient of the input is such a convolution as well, with the weights turned by 180° and their
channels exchanged; that of the weights is

    dw = Gᵀ [ Σ_tiles (Bᵀ d B) ⊙ (A g Aᵀ) ] G.

What is computed is `winograd.cpp`, compiled by g++ when it is first needed: 2 seconds, once. It
serves float32 images, channels_last, on x86-64 Linux with AVX2: there it takes 0.25 to 0.5 of the
time of oneDNN's convolutions, group norm and SiLU. Where it does not serve, or there is no
compiler, `suits` says so, and torch's own operations do the work.

Source:
    Lavin, Gray, "Fast algorithms for convolutional neural networks", 2015, section 4.3.
    Barabasz et al., "Error analysis and improving the accuracy of Winograd convolution", 2020: the
    choice of points.
"""

__all__ = ["convolve", "moments", "norm_silu_backward", "serves", "suits", "weight_gradient"]

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.atomic_io import write_atomic

SOURCE = Path(__file__).with_suffix(".cpp")
# OpenMP's library is not named: its functions are found in the one that torch has loaded, whose
# threads are those of torch.set_num_threads.
FLAGS = ["-std=c++17", "-O3", "-mavx2", "-mfma", "-fopenmp", "-fPIC"]
LANES, TILE = 8, 4  # what channels, and height and width, are multiples of
FEW = 8  # tiles, below which the weights' transform takes longer than it saves
MOST = 2**17  # pairs of channels, above which it does not fit the cache

POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


def _compile(compiler: str, folder: Path) -> Path:
    """Makes a library of the source in a folder."""
    unlinked, library = folder / "winograd.o", folder / "winograd.so"
    for command in (
        [compiler, *FLAGS, "-c", str(SOURCE), "-o", str(unlinked)],
        [compiler, "-shared", str(unlinked), "-o", str(library)],
    ):
        subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def _load() -> ctypes.CDLL:
    """Loads the compiled source; makes it first if it is not in the cache, or spoilt there.

    Raises:
        OSError, subprocess.CalledProcessError: If that cannot be done.
    """
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise FileNotFoundError(f"there is no {os.environ.get('CXX') or 'g++'}")
    key = hashlib.sha256("\0".join([SOURCE.read_text(), compiler, *FLAGS]).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion_lab"
    path = cache / f"winograd-{key[:16]}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        pass
    with tempfile.TemporaryDirectory() as folder:
        made = _compile(compiler, Path(folder))
        try:
            return ctypes.CDLL(str(write_atomic(path, made.read_bytes())))
        except OSError:  # no room there, or not ours to write to
            return ctypes.CDLL(str(made))


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled functions; None where they do not run, with a warning if g++ is missing."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return None
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):  # AVX2 or AVX512
        return None
    try:
        library = _load()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            "on this processor a U-Net runs at half its speed without a C++ compiler; install g++ "
            f"or name one in the variable CXX ({reason.strip().splitlines()[-1]})",
            stacklevel=2,
        )
        return None
    image = [POINTER, LONG, LONG, LONG, LONG, POINTER, POINTER, INT]
    norm = [LONG, LONG, LONG, LONG]
    for name, arguments in (
        ("moments", [POINTER, *norm, POINTER, POINTER, ctypes.c_float, *[POINTER] * 4]),
        ("norm_silu_backward", [POINTER, POINTER, *norm, *[POINTER] * 7]),
        ("transform_weight", [POINTER, LONG, LONG, INT, POINTER]),
        ("convolve", [*image, POINTER, LONG, *[POINTER] * 4]),
        ("weight_gradient", [*image, POINTER, LONG, POINTER, POINTER]),
    ):
        getattr(library, f"lab_{name}").argtypes = arguments
    return library


def serves(x: Tensor) -> bool:
    """Whether images like x are served: float32, on such a processor, with a compiler."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _library() is not None
    )


def suits(x: Tensor, weight: Tensor, repeats: bool = False) -> bool:
    """Whether the functions below do a convolution, and are the faster way.

    Arguments:
        x: The input, of shape (B, C, H, W).
        weight: Of shape (C', C, k, k).
        repeats: Whether the convolution is of x with its pixels repeated.
    """
    (batch, _, height, width), (out, channels, *size) = x.shape, weight.shape
    if repeats:
        height, width = 2 * height, 2 * width
    return (
        size == [3, 3]
        and weight.dtype == torch.float32
        and channels % LANES == out % LANES == 0
        and channels * out <= MOST
        and height % TILE == width % TILE == 0
        and batch * height * width >= FEW * TILE**2
        and serves(x)
    )


def _at(tensor: Tensor | None) -> int | None:
    """Where its numbers begin; nowhere, if there is none."""
    return None if tensor is None else tensor.data_ptr()


def _in_order(x: Tensor) -> Tensor:
    """The numbers in the order that the compiled functions read."""
    return x.detach().contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, *shape: int) -> Tensor:
    """A tensor of x's type in that order, whatever torch's default type is."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _call(name: str, *arguments: object) -> None:
    """Runs a compiled function; it returns 0 where it got no memory."""
    if not getattr(_library(), f"lab_{name}")(*arguments):
        raise MemoryError(f"no memory for {name} of {arguments[1:5]}; take a smaller batch_size")


class Moments(NamedTuple):
    """A group norm of one input: a = x scale + shift.

    Attributes:
        mean: μ, of shape (B, groups).
        rstd: 1 / √(v + eps), likewise.
        scale: γ rstd, of shape (B, C).
        shift: β - μ γ rstd, likewise.
    """

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor


def moments(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> Moments:
    """Computes what a group norm multiplies its input with, and adds.

    Arguments:
        x: The input, of shape (B, C, H, W).
        gamma, beta: γ and β, of shape (C,).
        groups: The number of groups.
        eps: Added to the variance.
    """
    x = _in_order(x)
    batch, channels, height, width = x.shape
    of_group, of_channel = ([x.new_empty(batch, n) for _ in range(2)] for n in (groups, channels))
    found = Moments(*of_group, *of_channel)
    arguments = (gamma.detach().contiguous(), beta.detach().contiguous())
    _call(
        "moments", _at(x), batch, height * width, channels, groups, *map(_at, arguments), eps,
        *map(_at, found),
    )  # fmt: skip
    return found


def norm_silu_backward(
    gradient: Tensor, x: Tensor, gamma: Tensor, norm: Moments
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradients of SiLU(a), a = x̂ γ + β, for x, γ and β.

        d_x = d_a γ / s - (x - μ) k - Σ d_a γ / (n s),  s = √(v + eps),  k = Σ d_a γ x̂ / (n s²),

    with sums over the n numbers of a group.

    Arguments:
        gradient: That of SiLU(a), of shape (B, C, H, W); its memory becomes that of d_x.
        x: The norm's input, of the same shape.
        gamma: γ, of shape (C,).
        norm: The norm of x.
    """
    gradient, x = _in_order(gradient), _in_order(x)
    batch, channels, height, width = x.shape
    d_gamma, d_beta = torch.empty_like(gamma), torch.empty_like(gamma)
    _call(
        "norm_silu_backward", _at(gradient), _at(x), batch, height * width, channels,
        norm.mean.shape[1], _at(gamma), *map(_at, norm), _at(d_gamma), _at(d_beta),
    )  # fmt: skip
    return gradient, d_gamma, d_beta


def _transformed(weight: Tensor, transposed: bool) -> Tensor:
    """G w Gᵀ, in the order that the product reads it in."""
    out, channels = weight.shape[1::-1] if transposed else weight.shape[:2]
    u = weight.new_empty(36, channels, out)
    ordered = _in_order(weight)
    _call("transform_weight", _at(ordered), channels, out, transposed, _at(u))
    return u


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: Moments | None = None,
    time: Tensor | None = None, skip: Tensor | None = None, repeats: bool = False,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """Returns y = f(x) * w + bias + time + skip, of shape (B, C', H, W).

    Arguments:
        x: Of shape (B, C, H, W).
        weight: w, of shape (C', C, 3, 3).
        bias: Of shape (C',).
        norm: If there is one, f(x) is SiLU(x scale + shift), otherwise x.
        time: Of shape (B, C').
        skip: Of y's shape.
        repeats: Whether f(x) is x with its pixels repeated, and y twice as high and wide.
        transposed: Whether x is the gradient of y, and what is returned is that of f(x): w is of
            shape (C, C', 3, 3) then.
    """
    u, x = _transformed(weight, transposed), _in_order(x)
    batch, channels, height, width = x.shape
    if repeats:
        height, width = 2 * height, 2 * width
    out = weight.shape[1 if transposed else 0]
    y = _empty(x, batch, out, height, width)
    bias, time = (t if t is None else t.detach().contiguous() for t in (bias, time))
    skip = skip if skip is None else _in_order(skip)
    scale, shift = (None, None) if norm is None else norm[2:]
    _call(
        "convolve", _at(x), batch, height, width, channels, _at(scale), _at(shift), repeats,
        _at(u), out, _at(bias), _at(time), _at(skip), _at(y),
    )  # fmt: skip
    return y


def weight_gradient(
    x: Tensor, gradient: Tensor, norm: Moments | None = None, repeats: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of w, of shape (C', C, 3, 3), and of `time`, for `convolve`.

    Arguments:
        x, norm, repeats: Those of `convolve`.
        gradient: That of y, of shape (B, C', H, W).
    """
    x, gradient = _in_order(x), _in_order(gradient)
    (batch, channels), (out, height, width) = x.shape[:2], gradient.shape[1:]
    d_w = _empty(x, out, channels, 3, 3)
    d_time = x.new_empty(batch, out)
    scale, shift = (None, None) if norm is None else norm[2:]
    _call(
        "weight_gradient", _at(x), batch, height, width, channels, _at(scale), _at(shift), repeats,
        _at(gradient), out, _at(d_w), _at(d_time),
    )  # fmt: skip
    return d_w, d_time
