"""U-Net blocks in bfloat16: the change of samples and posteriors.

Only the weights of the blocks, and so the activations between them, are bfloat16. The time
embedding, the class embedding, the first convolution, the sums of the norms, the last norm and
convolution, x_t, the estimate, the method and its solver stay float32.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from diffusion_lab.analytic import Gaussian
from diffusion_lab.denoiser import NetworkDenoiser
from diffusion_lab.guidance import MMPS, Guidance, Observation, TruncatedReverseSDE
from diffusion_lab.guidance.jacobian import tweedie_moments
from diffusion_lab.nn import UNet, unet
from diffusion_lab.nn.blocks import initialise
from diffusion_lab.operator import BoxInpainting, Identity, Operator
from diffusion_lab.parameterization import V
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import DDIM, EulerMaruyama
from diffusion_lab.schedule import Cosine, Linear
from diffusion_lab.tensor import broadcast

SIDE = 8


@pytest.fixture(autouse=True)
def bfloat16_is_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "emulates_bfloat16", lambda: False)


def random_network() -> UNet:
    """A U-Net with random weights in which all branches have a similar scale."""
    torch.manual_seed(0)
    network = UNet(16, (1, 2), 1, (1,), 4).eval().requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            initialise(layer)
            nn.init.normal_(layer.bias, std=0.1)
        elif isinstance(layer, nn.GroupNorm):
            layer.weight.add_(0.2 * torch.randn_like(layer.weight))
            layer.bias.add_(0.2 * torch.randn_like(layer.bias))
    return network


def reduced(network: UNet) -> UNet:
    network = copy.deepcopy(network)
    network.cast_blocks(torch.bfloat16)
    return network


class Inside(nn.Module):
    """Records the dtypes of the inputs and the output of a network."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        output = self.network(x, index)
        self.types = x.dtype, index.dtype, output.dtype
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_blocks_are_cast_to_bfloat16(dtype: torch.dtype) -> None:
    network = reduced(random_network())
    types = {name: weight.dtype for name, weight in network.named_parameters()}
    kept = {name.partition(".")[0] for name, of in types.items() if of == torch.float32}
    assert kept == {"time_embedding", "conv_in", "norm_out", "conv_out"}
    assert set(types.values()) == {torch.float32, torch.bfloat16}
    inside = Inside(network)
    denoiser = NetworkDenoiser(inside, Linear(), V())
    x_t, t = torch.randn(2, 3, 8, 8, dtype=dtype), torch.tensor(0.4, dtype=torch.float64)
    denoised, covariance = tweedie_moments(denoiser, x_t, t)
    assert inside.types == (torch.float32,) * 3
    for value in (denoised, covariance(torch.ones_like(denoised)), denoiser.score(x_t, t)):
        assert value.dtype == dtype


def test_bfloat16_blocks_change_samples_of_fifty_steps_by_few_levels() -> None:
    """The mean difference is at most 2.5 of 255 levels; under autocast it is at most 1.5."""
    network = random_network()
    x_1 = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def sample(network: UNet) -> Tensor:
        return DDIM(50, clip=True)(NetworkDenoiser(network, Linear(), V()), x_1)

    expected, actual = sample(network), sample(reduced(network))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = sample(network)
    assert 0.5 < float(expected.std()) < 0.95  # neither constant nor saturated
    for image, bound in ((actual, 2.5), (autocast, 1.5)):
        assert image.dtype == torch.float32
        assert 0.05 < float((image - expected).abs().mean()) * 127.5 < bound


def covariance() -> Tensor:
    """The covariance of smooth images, of shape (d, d)."""
    k = torch.arange(SIDE, dtype=torch.float64)
    smooth = torch.exp(-((k[:, None] - k) ** 2) / 4)
    return torch.kron(smooth, smooth) / 4 + 0.01 * torch.eye(SIDE**2, dtype=torch.float64)


@pytest.fixture(scope="module")
def trained() -> UNet:
    """A network trained on samples of a Gaussian."""
    generator, schedule, steps = torch.Generator().manual_seed(0), Cosine(), 300
    torch.manual_seed(0)
    prior = Gaussian(torch.zeros(SIDE**2, dtype=torch.float64), covariance())
    network = UNet(16, (1, 2), 1, (), 4, image_channels=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        x_0 = prior.sample(64, generator).float().reshape(-1, 1, SIDE, SIDE)
        epsilon = torch.randn(x_0.shape, generator=generator)
        t = 1 - 0.999 * torch.rand(64, generator=generator, dtype=torch.float64)
        alpha_t, sigma_t = (broadcast(c, x_0) for c in schedule(t))
        output = network(alpha_t * x_0 + sigma_t * epsilon, schedule.index(t).float())
        loss = (output - V().target(x_0, epsilon, alpha_t, sigma_t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return network.eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guidance", "operator"),
    [(TruncatedReverseSDE(), Identity()), (MMPS(), BoxInpainting((1, SIDE, SIDE)))],
    ids=["truncated", "mmps"],
)
def test_bfloat16_blocks_do_not_change_the_posterior_variance(
    trained: UNet, guidance: Guidance, operator: Operator
) -> None:
    """With equal noise, the ratio to the exact variance changes by less than its error."""
    count, sigma_y, c = 64, 0.3, covariance()
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.linalg.cholesky(c) @ torch.randn(SIDE**2, generator=generator).double()
    y = operator(x_0.float().reshape(1, 1, SIDE, SIDE))
    y = y + sigma_y * torch.randn(y.shape, generator=generator)
    a = operator(torch.eye(SIDE**2).reshape(-1, 1, SIDE, SIDE)).flatten(1).mT.double()
    noise = sigma_y**2 * torch.eye(len(a), dtype=torch.float64)
    gain = c @ a.mT @ torch.linalg.inv(a @ c @ a.mT + noise)
    mean, variance = gain @ y.flatten().double(), (c - gain @ a @ c).trace()

    def ratios(network: UNet) -> Tensor:
        samples = guidance(
            NetworkDenoiser(network, Cosine(), V()), EulerMaruyama(24),
            Observation(y.expand(count, *y.shape[1:]), sigma_y, operator),
            generator=KeyedGenerator(make_key(0, torch.arange(count))),
        )  # fmt: skip
        return (samples.flatten(1).double() - mean).square().sum(1) / variance

    expected, actual = ratios(trained), ratios(reduced(trained))
    error = float(expected.std()) / count**0.5
    print(f"{expected.mean():.4f} ± {error:.4f}, moved by {(actual - expected).mean():.5f}")
    assert 0.8 < float(expected.mean()) < 1.25  # the network is accurate enough for a posterior
    assert 0 < abs(float((actual - expected).mean())) < error
