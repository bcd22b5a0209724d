"""Compiled kernels for 3x3 convolutions on CPUs with AVX2.

`convolve` returns a convolution, with the operations around it, or None where the kernels do not
apply; torch's own operations are the reference and do the work there.
"""

__all__ = ["convolve", "is_available"]

from diffusion_lab.nn.cpu.convolution import convolve, is_available
