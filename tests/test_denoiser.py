"""Denoisers: how a network's output, an estimate of x_0 and the score belong together."""

import pytest
import torch
from gaussian import COVARIANCE, MEAN, GaussianDenoiser
from torch import Tensor, nn

from diffusion_lab.denoiser import Clipped, NetworkDenoiser, broadcast
from diffusion_lab.parameterization import Epsilon
from diffusion_lab.schedule import Cosine, Linear


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


class Recorder(nn.Module):
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, says: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.says = says

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        self.x, self.index = x, index
        return self.says.to(x.dtype) * self.weight


def test_broadcast() -> None:
    x = torch.zeros(3, 2, 4, 4)
    assert broadcast(torch.tensor(2.0).double(), x).shape == ()
    coefficient = broadcast(torch.tensor([1.0, 2.0, 3.0]).double(), x)
    assert coefficient.dtype == torch.float32
    assert (x + coefficient)[:, 1, 2, 3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.tensor([0.5, 0.1, 0.7531]).double()])
def test_a_network_that_knows_the_noise_finds_the_image(t: Tensor) -> None:
    schedule = Linear()
    x_0, epsilon = normal(3, 2, 4, 4), normal(6, 2, 4, 4)[3:]
    alpha_t, sigma_t = (broadcast(c, x_0) for c in schedule(t.double()))
    x_t = alpha_t * x_0 + sigma_t * epsilon
    network = Recorder(epsilon, torch.float64)
    denoiser = NetworkDenoiser(network, schedule, Epsilon())
    torch.testing.assert_close(denoiser(x_t, t.double()), x_0, rtol=1e-9, atol=1e-9)
    score = denoiser.score(x_t, t.double())
    torch.testing.assert_close(score, -epsilon / sigma_t, rtol=1e-8, atol=1e-8)
    expected = (t.double() * 1000 - 1).expand(3).float()  # fractional where t is
    torch.testing.assert_close(network.index, expected, rtol=1e-6, atol=0)
    target = Epsilon().target(x_0, epsilon, alpha_t, sigma_t)
    assert torch.equal(target, epsilon)


def test_the_network_runs_in_its_own_precision_and_the_estimate_does_not() -> None:
    x_t, t = normal(2, 3, dtype=torch.float32), torch.tensor(0.3)
    network = Recorder(normal(2, 3), torch.bfloat16)
    denoised = NetworkDenoiser(network, Linear(), Epsilon())(x_t, t)
    assert network.x.dtype == torch.bfloat16 and denoised.dtype == torch.float32
    alpha_t, sigma_t = Linear()(t)
    expected = (x_t - sigma_t * normal(2, 3).bfloat16().float()) / alpha_t
    torch.testing.assert_close(denoised, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
def test_the_score_is_the_gradient_of_the_log_density(t: float) -> None:
    denoiser = GaussianDenoiser(Cosine(), MEAN, COVARIANCE)
    time = torch.tensor(t, dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(*denoiser.marginal(time))
    x_t = normal(5, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(density.log_prob(x_t).sum(), x_t)
    torch.testing.assert_close(denoiser.score(x_t, time).detach(), gradient)
    each = denoiser.score(x_t, time.expand(5)).detach()  # one time for each image
    torch.testing.assert_close(each, gradient)


def test_clipped_changes_what_is_derived_too() -> None:
    denoiser = GaussianDenoiser(Linear(), 3 * MEAN, COVARIANCE)
    x_t, t = normal(64, 4), torch.tensor(0.2, dtype=torch.float64)
    plain, clipped = denoiser(x_t, t), Clipped(denoiser)(x_t, t)
    assert float(plain.abs().max()) > 1.5 and bool((plain.abs() < 1).any())
    assert torch.equal(clipped, plain.clamp(-1, 1))
    alpha_t, sigma_t = Linear()(t)
    expected = (alpha_t * plain.clamp(-1, 1) - x_t) / sigma_t**2
    torch.testing.assert_close(Clipped(denoiser).score(x_t, t), expected)
    assert Clipped(denoiser).schedule is denoiser.schedule
