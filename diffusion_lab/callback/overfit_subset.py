"""Training on a few images, which tests whether a network can overfit them."""

__all__ = ["OverfitSubset"]

from lightning import Callback, LightningModule, Trainer

from diffusion_lab.callback.trainer_state import data_module
from diffusion_lab.constraints import PositiveInt, checked
from diffusion_lab.data.images import Split
from diffusion_lab.errors import ConfigError


class OverfitSubset(Callback):
    """Restricts training to the first n training images.

    Arguments:
        count: n.

    Raises:
        ConfigError: If n is less than one batch of all devices.
    """

    @checked
    def __init__(self, count: PositiveInt) -> None:
        self.count = count

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        data = data_module(trainer)
        if self.count < data.batch_size * trainer.world_size:
            raise ConfigError(
                f"callbacks.overfit_subset.count={self.count} is less than one batch, which is "
                f"data.batch_size={data.batch_size} on {trainer.world_size} device(s); raise it, "
                "or lower data.batch_size"
            )
        images = data.images["train"]
        labels = None if images.labels is None else images.labels[: self.count]
        data.images["train"] = Split(images.images, images.positions[: self.count], labels)
