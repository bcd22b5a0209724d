"""Measurement operators: they map an image to the measurement."""

__all__ = [
    "HDR", "JPEG", "AveragePool", "Bicubic", "BoxInpainting", "CircularBlur", "CompressedSensing",
    "Gaussian", "GaussianBlur", "Grayscale", "Identity", "Inpainting", "LinearOperator", "Matrix",
    "MotionBlur", "Noise", "Operator", "PhaseRetrieval", "Poisson", "RandomInpainting",
    "SVDOperator", "Separable", "Tomography", "UniformBlur",
]  # fmt: skip

from diffusion_lab.operator.base import Identity, LinearOperator, Operator, SVDOperator
from diffusion_lab.operator.blur import GaussianBlur, UniformBlur
from diffusion_lab.operator.circular_blur import CircularBlur, MotionBlur
from diffusion_lab.operator.compressed_sensing import CompressedSensing
from diffusion_lab.operator.grayscale import Grayscale
from diffusion_lab.operator.hdr import HDR
from diffusion_lab.operator.inpainting import BoxInpainting, Inpainting, RandomInpainting
from diffusion_lab.operator.jpeg import JPEG
from diffusion_lab.operator.matrix import Matrix
from diffusion_lab.operator.noise_model import Gaussian, Noise, Poisson
from diffusion_lab.operator.phase_retrieval import PhaseRetrieval
from diffusion_lab.operator.separable import Separable
from diffusion_lab.operator.super_resolution import AveragePool, Bicubic
from diffusion_lab.operator.tomography import Tomography
