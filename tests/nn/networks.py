"""Networks with random weights, random images and comparisons for the tests of this directory."""

import torch
from torch import Tensor, nn

SMALL = {"channels": 32, "multipliers": (1, 2), "groups": 8, "attention_levels": (1,)}


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Sets every parameter to a random value, because the branches of a new network are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(offset + scale * noise)
    return network.eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Returns whether the largest error is small relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max()) < tolerance
