r"""Dropout with counter-based masks.

The masks of `nn.Dropout` come from torch's global generator: they depend on the batch size and
the device, and are other ones after a resume. Here the mask of an image is a function of its key,
which `DiffusionModule` sets in each training step, and of the number of the layer.
"""

__all__ = ["KeyedDropout", "set_dropout_keys"]

import torch
from torch import Tensor, nn

from diffusion_lab.rng import KeyedGenerator, make_key


class KeyedDropout(nn.Dropout):
    """Dropout whose mask of each image is a function of the key of the image.

    Without keys it is `nn.Dropout`. The probability of keeping an activation is rounded to a
    multiple of 2⁻¹⁶, and the kept activations are divided by the rounded value.

    Arguments:
        p: Probability of dropping an activation.

    Attributes:
        key: The keys of the batch in this layer, int64, of shape (B,); see `set_dropout_keys`.
    """

    key: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Maps x, of shape (B, ...), to the same shape.

        Raises:
            ValueError: If the number of keys differs from the batch size.
        """
        if self.key is None or not self.training or self.p == 0:
            return super().forward(x)
        if len(self.key) != len(x):
            raise ValueError(f"{len(self.key)} dropout keys for a batch of {len(x)}")
        # Drawn in the memory order of channels_last.
        shape = x.movedim(1, -1).shape[1:]
        keep, share = KeyedGenerator(self.key).keep(1 - self.p, *shape)
        return torch.where(keep.movedim(-1, 1), x / share, 0.0)


def set_dropout_keys(network: nn.Module, key: Tensor) -> None:
    """Gives every dropout layer of a network its keys of a batch.

    They stay until the next call, since activation checkpointing repeats the masks in the backward
    pass.

    Arguments:
        network: The network; layers that are not `KeyedDropout` are not affected.
        key: The keys of the images, int64, of shape (B,).
    """
    layers = [m for m in network.modules() if isinstance(m, KeyedDropout) and m.p > 0]
    if layers:
        number = torch.arange(len(layers), device=key.device)[:, None]
        for layer, own in zip(layers, make_key(key, "dropout", number), strict=True):
            layer.key = own
