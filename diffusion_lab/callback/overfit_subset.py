"""A handful of images, to see whether a network can learn them by heart."""

__all__ = ["FewImages"]

from lightning import Callback, Trainer

from diffusion_lab.data.images import Split
from diffusion_lab.errors import ConfigError
from diffusion_lab.training.module import DiffusionModule


class FewImages(Callback):
    """Trains on the first n training images and no others.

    Arguments:
        count: n, >= 1.

    Raises:
        ConfigError: If they make no batch.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def setup(self, trainer: Trainer, module: DiffusionModule, stage: str) -> None:
        data = trainer.datamodule
        if self.count < data.batch_size * trainer.world_size:
            raise ConfigError(
                f"callbacks.few_images.count={self.count} images are no batch of data.batch_size="
                f"{data.batch_size} on {trainer.world_size} device(s); raise it, or lower "
                "data.batch_size"
            )
        images = data.images["train"]
        labels = None if images.labels is None else images.labels[: self.count]
        data.images["train"] = Split(images.images, images.positions[: self.count], labels)
