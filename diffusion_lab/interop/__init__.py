"""Networks and schedules in the file formats of other libraries. One file per format."""

__all__ = ["load_prediction_type", "load_schedule", "load_unet", "save_unet"]

from diffusion_lab.interop.diffusers import (
    load_prediction_type,
    load_schedule,
    load_unet,
    save_unet,
)
