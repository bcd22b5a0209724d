"""Parameterizations against their formulas."""

import math

import pytest
import torch
from sampler.problems import MIXTURE
from torch import Tensor, nn

from diffusion_lab.denoiser import NetworkDenoiser
from diffusion_lab.parameterization import EDM, X0, Epsilon, Flow, Parameterization, Score, V
from diffusion_lab.sampler import DDIM, EulerMaruyama, Heun, Sampler, UniPC
from diffusion_lab.sampler.time_grid import Uniform
from diffusion_lab.schedule import EDM as EDMSchedule
from diffusion_lab.schedule import VE, VP, Linear, Schedule, SubVP
from diffusion_lab.schedule import Flow as FlowSchedule
from diffusion_lab.tensor import broadcast

SIGMA_DATA = 0.3
KINDS: dict[str, Parameterization] = {
    "epsilon": Epsilon(),
    "score": Score(),
    "x0": X0(),
    "v": V(),
    "flow": Flow(),
    "edm": EDM(SIGMA_DATA),
}
SCHEDULES = {"vp": VP(), "ve": VE(), "flow": FlowSchedule()}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
times = pytest.mark.parametrize("t", [0.01, 0.3, 0.5, 0.9])


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def levels(schedule: str, t: float) -> tuple[Tensor, Tensor]:
    return SCHEDULES[schedule](number(t))


# --- formulas -----------------------------------------------------------------------------------


@every_kind
@every_schedule
@times
def test_denoised_of_the_target_is_the_image(kind: str, schedule: str, t: float) -> None:
    """The tolerance is the rounding of x_t, which is amplified by 1 / α_t."""
    x_0, epsilon = normal(2, 16, 3, 2)
    alpha_t, sigma_t = levels(schedule, t)
    x_t = alpha_t * x_0 + sigma_t * epsilon
    target = KINDS[kind].target(x_0, epsilon, alpha_t, sigma_t)
    denoised = KINDS[kind].denoised(target, x_t, alpha_t, sigma_t)
    tolerance = 1e-12 * max(1.0, float(sigma_t / alpha_t))
    torch.testing.assert_close(denoised, x_0, rtol=1e-12, atol=tolerance)


@every_kind
@every_schedule
@times
def test_gain_is_the_inverse_slope_of_denoised_in_the_output(
    kind: str, schedule: str, t: float
) -> None:
    alpha_t, sigma_t = levels(schedule, t)
    output = normal(4).requires_grad_()
    denoised = KINDS[kind].denoised(output, normal(4, seed=1), alpha_t, sigma_t)
    (slope,) = torch.autograd.grad(denoised.sum(), output)
    gain = KINDS[kind].gain(alpha_t, sigma_t)
    torch.testing.assert_close(gain.expand(4), 1 / slope.abs(), rtol=1e-12, atol=0)


@every_kind
@every_schedule
@times
def test_scaled_input_has_unit_variance(kind: str, schedule: str, t: float) -> None:
    """The data have unit variance, except for EDM, which uses σ_data²."""
    std = SIGMA_DATA if kind == "edm" else 1.0
    alpha_t, sigma_t = levels(schedule, t)
    scale = float(KINDS[kind].input_scale(alpha_t, sigma_t))
    assert scale**2 * float(alpha_t**2 * std**2 + sigma_t**2) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    "schedule", [VP(), Linear(), SubVP(), VE(), EDMSchedule(), FlowSchedule()]
)
@every_kind
def test_scales_input_is_false_exactly_if_the_factor_is_one(kind: str, schedule: Schedule) -> None:
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    one = torch.allclose(
        KINDS[kind].input_scale(*schedule(t)), torch.ones_like(t), rtol=0, atol=1e-12
    )
    assert KINDS[kind].scales_input(schedule) == (not one)


@times
def test_targets_match_the_papers(t: float) -> None:
    """The targets of one pixel are compared, with x_0 = 0.7 and ε = -1.3."""
    alpha_t, sigma_t = (float(c) for c in levels("vp", t))
    expected = {
        "epsilon": -1.3,
        "score": 1.3,  # σ_t ∇ log q(x_t | x_0) = -(x_t - α_t x_0) / σ_t
        "x0": 0.7,
        "v": alpha_t * -1.3 - sigma_t * 0.7,  # Salimans & Ho, appendix D
        "flow": -1.3 - 0.7,  # d/dt of (1 - t) x_0 + t ε
    }
    for kind, value in expected.items():
        target = KINDS[kind].target(number(0.7), number(-1.3), *levels("vp", t))
        assert float(target) == pytest.approx(value, rel=1e-12), kind


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
def test_edm_matches_table_1_of_karras_et_al(sigma: float, sigma_data: float) -> None:
    """D(x; σ) = c_skip x + c_out F(c_in x), with x = x_0 + σ ε and α = 1."""
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / math.sqrt(sigma_data**2 + sigma**2)
    c_in = 1 / math.sqrt(sigma**2 + sigma_data**2)
    edm, one, level = EDM(sigma_data), number(1.0), number(sigma)
    x, output = normal(2, 5)
    expected = c_skip * x + c_out * output
    torch.testing.assert_close(edm.denoised(output, x, one, level), expected, rtol=1e-12, atol=0)
    assert float(edm.input_scale(one, level)) == pytest.approx(c_in, rel=1e-12)
    assert float(edm.gain(one, level)) == pytest.approx(1 / c_out, rel=1e-12)
    # Eq. 8: the effective training target is (y - c_skip (y + n)) / c_out.
    y, n = x, sigma * output
    target = edm.target(y, output, one, level)
    torch.testing.assert_close(target, (y - c_skip * (y + n)) / c_out, rtol=1e-9, atol=1e-9)


@every_schedule
@times
def test_edm_target_has_unit_variance(schedule: str, t: float) -> None:
    """The target is linear in x_0 and ε: its variance is the sum of squared slopes, times σ_d² for
    x_0.

    This holds under any schedule, since D is applied to x_t / α_t at the level r = σ_t / α_t.
    """
    alpha_t, sigma_t = levels(schedule, t)
    edm, zero, one = KINDS["edm"], number(0.0), number(1.0)
    of_x_0 = float(edm.target(one, zero, alpha_t, sigma_t))
    of_epsilon = float(edm.target(zero, one, alpha_t, sigma_t))
    assert SIGMA_DATA**2 * of_x_0**2 + of_epsilon**2 == pytest.approx(1, rel=1e-9)


def test_targets_with_one_time_per_image_match_single_images() -> None:
    """α_t and σ_t have the shape (B, 1, 1, 1)."""
    schedule, t = VP(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x_0, epsilon = normal(2, 3, 2, 4, 4)
    alpha_t, sigma_t = (broadcast(c, x_0) for c in schedule(t))
    for kind in KINDS.values():
        target = kind.target(x_0, epsilon, alpha_t, sigma_t)
        for b in range(3):
            alone = kind.target(x_0[b], epsilon[b], *schedule(t[b]))
            torch.testing.assert_close(target[b], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, math.nan])
def test_edm_with_invalid_sigma_data_is_an_error(sigma_data: float) -> None:
    with pytest.raises(ValueError, match=f"sigma_data={sigma_data}"):
        EDM(sigma_data)


# --- one network, six parameterizations ---------------------------------------------------------


class Net(nn.Module):
    """A random ε-network with one hidden layer, in float64."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(d + 2, 16, seed=3) / 2)
        self.v = nn.Parameter(normal(16, d, seed=4) / 2)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        angle = index.double()[:, None] / 300
        return torch.tanh(torch.cat([x, angle.sin(), angle.cos()], 1) @ self.w) @ self.v


class Converted(nn.Module):
    """The ε-network, converted to another parameterization: the same function with another output.

    It uses only its inputs: the scaled x_t and the index, from which it computes α_t and σ_t.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, kind: str) -> None:
        super().__init__()
        self.network, self.schedule, self.kind = network, schedule, kind

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        alpha_t, sigma_t = (
            broadcast(c, x) for c in self.schedule((index.double() + 1) / self.schedule.steps)
        )
        x_t = x * (alpha_t**2 * SIGMA_DATA**2 + sigma_t**2).sqrt() if self.kind == "edm" else x
        epsilon = self.network(x_t, index)
        x_0 = (x_t - sigma_t * epsilon) / alpha_t
        if self.kind == "edm":
            r = sigma_t / alpha_t
            c_skip = SIGMA_DATA**2 / (r**2 + SIGMA_DATA**2)
            c_out = r * SIGMA_DATA / (r**2 + SIGMA_DATA**2).sqrt()
            return (x_0 - c_skip * x_t / alpha_t) / c_out
        return {
            "epsilon": epsilon,
            "score": -epsilon,
            "x0": x_0,
            "v": alpha_t * epsilon - sigma_t * x_0,
            "flow": epsilon - x_0,
        }[self.kind]


def of_kind(kind: str, schedule: Schedule) -> NetworkDenoiser:
    return NetworkDenoiser(Converted(Net(), schedule, kind), schedule, KINDS[kind])


@every_kind
def test_converted_network_gives_the_same_estimate_and_score(kind: str) -> None:
    schedule, x_t = VP(), normal(4, 6, seed=5)
    t = torch.tensor([0.001, 0.25, 0.5, 1.0], dtype=torch.float64)
    alpha_t, sigma_t = (broadcast(c, x_t) for c in schedule(t))
    epsilon = Net()(x_t, (t * 1000 - 1).float())
    expected = (x_t - sigma_t * epsilon) / alpha_t
    denoiser = of_kind(kind, schedule)
    torch.testing.assert_close(denoiser(x_t, t), expected, rtol=1e-9, atol=1e-9)
    score = denoiser.score(x_t, t)
    torch.testing.assert_close(score, -epsilon / sigma_t, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "epsilon"])
@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(20),
        Heun(20, grid=Uniform()),
        UniPC(20, grid=Uniform()),
        EulerMaruyama(20),
    ],
    ids=lambda s: type(s).__name__,
)
def test_converted_network_gives_the_same_samples(sampler: Sampler, kind: str) -> None:
    """The time grid is uniform, so that the indices are integers and exact in float32."""
    schedule, start = VP(), normal(8, 6, seed=6)
    samples = [
        sampler(of_kind(k, schedule), start, generator=torch.Generator().manual_seed(7))
        for k in ("epsilon", kind)
    ]
    scale = float(samples[0].abs().max())
    assert scale > 0.1
    torch.testing.assert_close(samples[1], samples[0], rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("schedule", [VP(), VE(), SubVP(), FlowSchedule(), Linear()])
@pytest.mark.parametrize("t", [0.02, 0.4, 1.0])
def test_score_is_the_gradient_of_the_log_density(schedule: Schedule, t: float) -> None:
    """The score of the mixture is evaluated at samples of x_t."""
    level = number(t)
    alpha_t, sigma_t = schedule(level)
    x_0 = MIXTURE.sample(32, torch.Generator().manual_seed(8))
    x_t = (alpha_t * x_0 + sigma_t * normal(*x_0.shape, seed=9)).requires_grad_()
    (expected,) = torch.autograd.grad(MIXTURE.log_prob_t(x_t, alpha_t, sigma_t).sum(), x_t)
    score = MIXTURE.denoiser(schedule).score(x_t.detach(), level)
    torch.testing.assert_close(score, expected, rtol=1e-7, atol=1e-7 / float(sigma_t))
