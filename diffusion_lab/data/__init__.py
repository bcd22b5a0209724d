"""Images: their sources, the packed cache, the loader and the data module."""

__all__ = ["ImageDataModule", "draw_faces"]

from diffusion_lab.data.faces import draw_faces
from diffusion_lab.data.module import ImageDataModule
