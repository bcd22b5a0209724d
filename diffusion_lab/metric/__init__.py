"""How good images are."""

__all__ = ["psnr", "ssim"]

from diffusion_lab.metric.restoration import psnr, ssim
