"""How good images are."""

__all__ = ["WINDOW", "psnr", "ssim"]

from diffusion_lab.metric.restoration import WINDOW, psnr, ssim
