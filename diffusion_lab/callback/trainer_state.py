"""Typed access to the module and to attributes that Lightning sets on the trainer."""

__all__ = ["data_module", "diffusion_module", "image_shape", "is_debug_run"]

from typing import cast

from lightning import LightningModule, Trainer

from diffusion_lab.data.module import ImageDataModule
from diffusion_lab.training.module import DiffusionModule


def data_module(trainer: Trainer) -> ImageDataModule:
    """Returns the data module of the training."""
    data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]  # set by Trainer.fit
    return data


def diffusion_module(module: LightningModule) -> DiffusionModule:
    """Returns the argument of a hook, which is a `DiffusionModule` in every training."""
    return cast(DiffusionModule, module)


def is_debug_run(trainer: Trainer) -> bool:
    """Returns whether the run is a smoke test of a few batches, which saves nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by Trainer.__init__


def image_shape(trainer: Trainer, module: DiffusionModule) -> tuple[int, int, int]:
    """Returns the shape (C, H, W) of the images; networks without `image_channels` are of RGB."""
    size = data_module(trainer).size
    return getattr(module.network, "image_channels", 3), size, size
