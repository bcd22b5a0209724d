"""Networks."""

__all__ = ["UNet"]

from diffusion_lab.nn.unet import UNet
