"""`capture`: a network that replays CUDA graphs returns the values of the plain network."""

import pytest
import torch
from torch import Tensor, nn

from diffusion_lab.nn import UNet
from diffusion_lab.nn.cuda_graph import capture


def make(**options: object) -> UNet:
    """A small U-Net with non-zero weights."""
    torch.manual_seed(0)
    network = UNet(8, (1, 2), 1, (1,), 4, **options).eval().requires_grad_(False)
    for weight in network.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    return network


def inputs(device: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    index = 1000 * torch.rand(count, generator=generator)
    return x.to(device), index.to(device)


def test_capture_has_no_effect_without_a_gpu() -> None:
    plain, network = make(classes=3, learn_variance=True), make(classes=3, learn_variance=True)
    capture(network)
    assert isinstance(network, UNet) and network.state_dict().keys() == plain.state_dict().keys()
    assert (network.classes, network.learn_variance, network.downsampling) == (3, True, 2)
    x, index = inputs("cpu", 2, 0)
    for label in ((), (torch.tensor([0, 2]),), (1,), (None,)):
        for _ in range(3):
            assert torch.equal(network(x, index, *label), plain(x, index, *label))
    gradients = []
    for each in (plain, network):
        variable = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(each(variable, index).square().sum(), variable)[0])
    assert torch.equal(*gradients) and bool((gradients[0] != 0).any())
    network.load_state_dict({k: 2 * v for k, v in plain.state_dict().items()})
    assert not torch.equal(network(x, index), plain(x, index))


class Counting(nn.Module):
    """Counts the calls of a network's forward function on the host."""

    calls = 0

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network, self.classes = network, network.classes

    def forward(self, x: Tensor, index: Tensor, label: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.network(x, index, label)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_replay_equals_the_plain_network(classes: int, dtype: torch.dtype) -> None:
    network = make(classes=classes).cuda()
    if dtype == torch.bfloat16:
        network.cast_blocks(dtype)
    counting = Counting(network)
    capture(counting)
    kept = []
    for seed in range(6):
        for count in (2, 5):  # two alternating shapes
            x, index = inputs("cuda", count, seed)
            label = (torch.arange(count, device="cuda") % 4,) if classes and seed % 2 else ()
            with torch.no_grad():
                kept.append((counting(x, index, *label), network(x, index, *label)))
    for actual, expected in kept:  # a later replay does not overwrite an earlier output
        torch.testing.assert_close(actual, expected)
    calls = counting.calls
    with torch.no_grad():
        counting(*inputs("cuda", 2, 9))
    assert counting.calls == calls  # a replay does not run the network's code on the host
    x, index = inputs("cuda", 2, 0)
    variable = x.clone().requires_grad_()
    actual = torch.autograd.grad(counting(variable, index).sum(), variable)[0]
    expected = torch.autograd.grad(network(variable, index).sum(), variable)[0]
    torch.testing.assert_close(actual, expected)
    assert counting.calls == calls + 1
