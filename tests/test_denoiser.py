"""Denoisers: the relation between network output, estimate of x_0 and score."""

import pytest
import torch
from gaussian import COVARIANCE, MEAN, GaussianDenoiser
from torch import Tensor, nn

from diffusion_lab.denoiser import Clipped, NetworkDenoiser, Rescheduled
from diffusion_lab.parameterization import EDM as EDMParameterization
from diffusion_lab.parameterization import X0, Epsilon, Parameterization, Score, V
from diffusion_lab.parameterization import Flow as FlowParameterization
from diffusion_lab.schedule import EDM, VE, VP, Cosine, Flow, Linear, Schedule, SubVP
from diffusion_lab.tensor import broadcast

SCHEDULES = [Linear(), Cosine(), VP(), SubVP(), VE(), EDM(), Flow()]
PARAMETERIZATIONS = [
    Epsilon(),
    Score(),
    X0(),
    V(),
    FlowParameterization(),
    EDMParameterization(0.4),
]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


class Recorder(nn.Module):
    """Returns a given output and records its inputs."""

    def __init__(self, output: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.output = output

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        self.x, self.index = x, index
        return self.output.to(x.dtype) * self.weight


def test_broadcast() -> None:
    x = torch.zeros(3, 2, 4, 4)
    assert broadcast(torch.tensor(2.0).double(), x).shape == ()
    coefficient = broadcast(torch.tensor([1.0, 2.0, 3.0]).double(), x)
    assert coefficient.dtype == torch.float32
    assert (x + coefficient)[:, 1, 2, 3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.tensor([0.5, 0.1, 0.7531]).double()])
def test_network_that_returns_the_noise_gives_x_0_and_the_score(t: Tensor) -> None:
    schedule = Linear()
    x_0, epsilon = normal(3, 2, 4, 4), normal(6, 2, 4, 4)[3:]
    alpha_t, sigma_t = (broadcast(c, x_0) for c in schedule(t.double()))
    x_t = alpha_t * x_0 + sigma_t * epsilon
    network = Recorder(epsilon, torch.float64)
    denoiser = NetworkDenoiser(network, schedule, Epsilon())
    torch.testing.assert_close(denoiser(x_t, t.double()), x_0, rtol=1e-9, atol=1e-9)
    score = denoiser.score(x_t, t.double())
    torch.testing.assert_close(score, -epsilon / sigma_t, rtol=1e-8, atol=1e-8)
    expected = (t.double() * 1000 - 1).expand(3).float()  # fractional if t is between indices
    torch.testing.assert_close(network.index, expected, rtol=1e-6, atol=0)
    target = Epsilon().target(x_0, epsilon, alpha_t, sigma_t)
    assert torch.equal(target, epsilon)


@every_schedule
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=lambda p: type(p).__name__)
def test_network_that_returns_its_target_gives_x_0_and_the_score(
    parameterization: Parameterization, schedule: Schedule
) -> None:
    """The network receives x_t scaled to a variance of about one, and the schedule's index."""
    x_0, epsilon = normal(3, 2, 4, 4), normal(6, 2, 4, 4)[3:]
    t = torch.tensor([0.5, 0.1, 0.7531], dtype=torch.float64)
    alpha_t, sigma_t = (broadcast(c, x_0) for c in schedule(t))
    x_t = alpha_t * x_0 + sigma_t * epsilon
    network = Recorder(parameterization.target(x_0, epsilon, alpha_t, sigma_t), torch.float64)
    denoiser = NetworkDenoiser(network, schedule, parameterization)
    torch.testing.assert_close(denoiser(x_t, t), x_0, rtol=1e-6, atol=1e-6)
    score = denoiser.score(x_t, t)
    torch.testing.assert_close(score, -epsilon / sigma_t, rtol=1e-6, atol=1e-6)
    variance = sigma_t**2 + alpha_t**2 * (
        0.4**2 if type(parameterization) is EDMParameterization else 1
    )
    torch.testing.assert_close(network.x, x_t / variance.sqrt(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(network.index, schedule.index(t).float())


@every_schedule
def test_index_below_t_min_is_clamped_to_zero(schedule: Schedule) -> None:
    network = Recorder(torch.zeros(2, 3), torch.float64)
    denoiser = NetworkDenoiser(network, schedule, X0())
    for t in (schedule.t_min / 2, 1e-9):
        denoiser(normal(2, 3), torch.tensor(t, dtype=torch.float64))
        expected = schedule.t_min / 2 * 1000 - 1 if type(schedule) is VE and t > 1e-9 else 0
        torch.testing.assert_close(network.index, torch.full((2,), float(expected)))


def test_network_uses_its_own_dtype_and_the_estimate_that_of_x_t() -> None:
    x_t, t = normal(2, 3, dtype=torch.float32), torch.tensor(0.3)
    network = Recorder(normal(2, 3), torch.bfloat16)
    denoised = NetworkDenoiser(network, Linear(), Epsilon())(x_t, t)
    assert network.x.dtype == torch.bfloat16 and denoised.dtype == torch.float32
    alpha_t, sigma_t = Linear()(t)
    expected = (x_t - sigma_t * normal(2, 3).bfloat16().float()) / alpha_t
    torch.testing.assert_close(denoised, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
def test_score_is_the_gradient_of_the_log_density(t: float) -> None:
    denoiser = GaussianDenoiser(Cosine(), MEAN, COVARIANCE)
    time = torch.tensor(t, dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(*denoiser.marginal(time))
    x_t = normal(5, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(density.log_prob(x_t).sum(), x_t)
    torch.testing.assert_close(denoiser.score(x_t, time).detach(), gradient)
    each = denoiser.score(x_t, time.expand(5)).detach()  # one time for each image
    torch.testing.assert_close(each, gradient)


@every_schedule
@pytest.mark.parametrize("own", [Linear(), VE(), SubVP(), Flow()], ids=lambda s: type(s).__name__)
def test_rescheduled_gaussian_denoiser_matches_the_closed_form(
    schedule: Schedule, own: Schedule
) -> None:
    """The levels σ_t / α_t are 0.05 to 50, with one t per image and with one t for all images."""
    expected = GaussianDenoiser(schedule, MEAN, COVARIANCE)
    denoiser = Rescheduled(GaussianDenoiser(own, MEAN, COVARIANCE), schedule)
    assert denoiser.schedule is schedule
    t = schedule.t_from_ratio(torch.tensor([0.05, 0.3, 1.0, 7.0, 50.0]))
    x_t = normal(5, 4)
    torch.testing.assert_close(denoiser(x_t, t), expected(x_t, t), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(denoiser(x_t, t[2]), expected(x_t, t[2]), rtol=1e-7, atol=1e-7)
    score = expected.score(x_t, t)
    torch.testing.assert_close(denoiser.score(x_t, t), score, rtol=1e-6, atol=1e-6)


def test_rescheduled_denoiser_raises_outside_its_own_schedule() -> None:
    denoiser = Rescheduled(GaussianDenoiser(EDM(sigma_max=20.0)), VE())
    x_t, edge = normal(2, 4), VE().t_from_ratio(20.0)
    assert bool(denoiser(x_t, edge).isfinite().all())
    with pytest.raises(ValueError, match="outside the schedule EDM, whose range is 0 to 20"):
        denoiser(x_t, edge + 1e-3)


def test_clipped_changes_the_estimate_and_the_score() -> None:
    denoiser = GaussianDenoiser(Linear(), 3 * MEAN, COVARIANCE)
    x_t, t = normal(64, 4), torch.tensor(0.2, dtype=torch.float64)
    plain, clipped = denoiser(x_t, t), Clipped(denoiser)(x_t, t)
    assert float(plain.abs().max()) > 1.5 and bool((plain.abs() < 1).any())
    assert torch.equal(clipped, plain.clamp(-1, 1))
    alpha_t, sigma_t = Linear()(t)
    expected = (alpha_t * plain.clamp(-1, 1) - x_t) / sigma_t**2
    torch.testing.assert_close(Clipped(denoiser).score(x_t, t), expected)
    assert Clipped(denoiser).schedule is denoiser.schedule
