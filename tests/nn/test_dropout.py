"""Dropout whose masks are functions of the keys of the images."""

import pytest
import torch
from torch import nn

from diffusion_lab.nn import UNet
from diffusion_lab.nn.dropout import KeyedDropout, set_dropout_keys
from diffusion_lab.rng import KeyedGenerator, make_key

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_levels": (), "groups": 4}


def keyed(p: float, key: torch.Tensor) -> KeyedDropout:
    layer = KeyedDropout(p)
    set_dropout_keys(layer, key)
    return layer


def test_mask_has_its_probability_and_keeps_the_mean() -> None:
    key = make_key(0, torch.arange(64))
    for p in (0.1, 0.5, 0.9):
        out = keyed(p, key)(torch.ones(64, 16, 16, 16))
        share = round((1 - p) * 2**16) / 2**16
        assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / share).item()}
        deviation = (p * (1 - p) / out.numel()) ** 0.5
        assert abs(float((out == 0).double().mean()) - p) < 4 * deviation
    keep, share = KeyedGenerator(key).keep(0.25, 3)
    assert keep.shape == (64, 3) and share == 0.25
    assert KeyedGenerator(key).keep(1.0, 1000)[0].all()
    assert KeyedGenerator(key).keep(1e-9, 5)[1] == 2**-16


def test_mask_of_an_image_depends_on_its_key_and_the_layer_only() -> None:
    key, x = make_key(0, torch.arange(6)), torch.randn(6, 4, 5, 3)
    whole = keyed(0.5, key)(x)
    assert torch.equal(keyed(0.5, key[2:4])(x[2:4]), whole[2:4])
    assert torch.equal(keyed(0.5, key)(x.to(memory_format=torch.channels_last)), whole)
    masks = (whole != 0).flatten(1).float()
    assert len({tuple(mask.tolist()) for mask in masks}) == 6
    layers = nn.Sequential(KeyedDropout(0.5), KeyedDropout(0.0), KeyedDropout(0.5))
    set_dropout_keys(layers, key)
    assert torch.equal(layers[0](x), whole) and not torch.equal(layers[2](x), whole)
    assert torch.equal(layers[1](x), x) and torch.equal(layers.eval()(x), x)
    with pytest.raises(ValueError, match="6 dropout keys for a batch of 5"):
        layers.train()(x[:5])


def test_without_keys_masks_come_from_the_global_generator() -> None:
    x = torch.ones(2, 4, 4, 4)
    torch.manual_seed(0)
    expected = nn.Dropout(0.5)(x)
    torch.manual_seed(0)
    assert torch.equal(KeyedDropout(0.5)(x), expected)


def test_gradients_are_the_same_with_activation_checkpointing() -> None:
    """The backward pass repeats the masks, after the keys were used in the forward pass."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        network = UNet(**SMALL, dropout=0.5, checkpointing=checkpointing)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
        set_dropout_keys(network, make_key(0, torch.arange(2)))
        torch.manual_seed(2)
        network(torch.randn(2, 3, 8, 8), torch.tensor([3.0, 7.0])).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(map(torch.equal, *gradients))
