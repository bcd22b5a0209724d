"""How good images are."""

__all__ = ["WINDOW", "EfficientNetLite0", "Moments", "frechet_distance", "psnr", "ssim"]

from diffusion_lab.metric.efficientnet import EfficientNetLite0
from diffusion_lab.metric.frechet import frechet_distance
from diffusion_lab.metric.restoration import WINDOW, psnr, ssim
from diffusion_lab.metric.statistics import Moments
