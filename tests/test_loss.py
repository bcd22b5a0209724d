"""Losses: the weighting of each paper, and independence of the parameterization."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion_lab import parameterization as kinds
from diffusion_lab.loss import EDM, P2, SNR, Likelihood, Loss, MinSNR, Simple
from diffusion_lab.schedule import EDM as EDMSchedule
from diffusion_lab.schedule import VE, VP, Cosine, Flow, Linear, Schedule, SubVP
from diffusion_lab.tensor import broadcast

KINDS: dict[str, kinds.Parameterization] = {
    "epsilon": kinds.Epsilon(),
    "score": kinds.Score(),
    "x0": kinds.X0(),
    "v": kinds.V(),
    "flow": kinds.Flow(),
    "edm": kinds.EDM(0.4),
}
SCHEDULES = {
    "linear": Linear(),
    "cosine": Cosine(),
    "vp": VP(),
    "subvp": SubVP(),
    "ve": VE(),
    "edm": EDMSchedule(),
    "flow": Flow(),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
TIMES = torch.linspace(0.0114, 0.9914, 50, dtype=torch.float64)  # within the intervals of a table


def snr(schedule: Schedule) -> Tensor:
    alpha_t, sigma_t = schedule(TIMES)
    return (alpha_t / sigma_t) ** 2


# --- weights ------------------------------------------------------------------------------------

ROWS: dict[str, tuple[Loss, str, Callable[[Tensor], Tensor]]] = {  # on the error of the output
    "min-SNR of x_0": (MinSNR(5.0), "x0", lambda s: torch.minimum(s, torch.tensor(5.0))),
    "min-SNR of ε": (MinSNR(5.0), "epsilon", lambda s: torch.minimum(s, torch.tensor(5.0)) / s),
    "min-SNR of v": (MinSNR(5.0), "v", lambda s: torch.minimum(s, torch.tensor(5.0)) / (s + 1)),
    "min-SNR, γ = 1": (MinSNR(1.0), "epsilon", lambda s: torch.minimum(s, torch.tensor(1.0)) / s),
    "P2": (P2(), "epsilon", lambda s: 1 / (1 + s)),
    "P2, γ = ½, k = 2": (P2(0.5, 2.0), "epsilon", lambda s: 1 / (2 + s).sqrt()),
    "P2, γ = 0": (P2(0.0), "epsilon", torch.ones_like),
    "SNR of x_0": (SNR(), "x0", lambda s: s),
    "SNR of ε": (SNR(), "epsilon", torch.ones_like),
    "truncated SNR": (SNR(truncated=True), "x0", lambda s: torch.maximum(s, torch.tensor(1.0))),
    "EDM": (EDM(0.4), "edm", torch.ones_like),  # λ(σ) = 1 / c_out²
    "EDM of x_0": (EDM(0.4), "x0", lambda s: (1 / s + 0.4**2) / (1 / s * 0.4**2)),
    "simple": (Simple(), "epsilon", torch.ones_like),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp"])
def test_weights_match_the_papers(row: str, schedule: str) -> None:
    loss, kind, expected = ROWS[row]
    weight = loss.output_weight(SCHEDULES[schedule], KINDS[kind], TIMES)
    expected = expected(snr(SCHEDULES[schedule]))
    assert weight.dtype == torch.float64
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=0)


@every_schedule
def test_edm_weight_of_the_network_output_is_one(schedule: str) -> None:
    weight = EDM(0.4).output_weight(SCHEDULES[schedule], KINDS["edm"], TIMES)
    torch.testing.assert_close(weight, torch.ones_like(TIMES), rtol=1e-9, atol=0)


@every_schedule
def test_likelihood_weights_the_score_error_by_g_squared(schedule: str) -> None:
    """|ŝ - s|² = |ε̂ - ε|² / σ_t², and a `Score` network returns σ_t s."""
    sigma_t = SCHEDULES[schedule](TIMES)[1]
    expected = SCHEDULES[schedule].diffusion(TIMES) ** 2 / sigma_t**2
    for kind in ("epsilon", "score"):
        weight = Likelihood().output_weight(SCHEDULES[schedule], KINDS[kind], TIMES)
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=0)


@every_schedule
def test_likelihood_weight_is_minus_the_derivative_of_the_snr(schedule: str) -> None:
    """w = -d SNR / dt on |x̂ - x_0|² (Kingma et al., 2021, eq. 17), by central differences."""
    h = 1e-6
    ahead, behind = (SCHEDULES[schedule].ratio(TIMES + step) ** -2 for step in (h, -h))
    weight = Likelihood().weight(SCHEDULES[schedule], TIMES)
    torch.testing.assert_close(weight, (behind - ahead) / (2 * h), rtol=1e-5, atol=0)


# --- the loss -----------------------------------------------------------------------------------


def batch(schedule: Schedule) -> tuple[Tensor, ...]:
    """t, α_t, σ_t, x_0, ε and an estimate x̂ of x_0, for images of 3 x 4 x 4."""
    generator = torch.Generator().manual_seed(0)
    x_0, epsilon, error = torch.randn(3, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95], dtype=torch.float64)
    alpha_t, sigma_t = (broadcast(c, x_0) for c in schedule(t))
    return t, alpha_t, sigma_t, x_0, epsilon, x_0 + error * sigma_t / alpha_t


@pytest.mark.parametrize("loss", [SNR(), MinSNR(), P2(), EDM(), Likelihood()])
@pytest.mark.parametrize("schedule", ["linear", "ve", "flow"])
def test_weighted_loss_is_independent_of_the_parameterization(loss: Loss, schedule: str) -> None:
    """The loss of an estimate x̂ is w(t) |x̂ - x_0|² for every parameterization."""
    schedule = SCHEDULES[schedule]
    t, alpha_t, sigma_t, x_0, epsilon, denoised = batch(schedule)
    x_t = alpha_t * x_0 + sigma_t * epsilon
    expected = loss.weight(schedule, t) * (denoised - x_0).square().mean((1, 2, 3))
    assert expected.shape == (6,) and float(expected.min()) > 0
    for name, kind in KINDS.items():
        # The output for an estimate x̂ is the target for x̂ and the corresponding noise.
        output = kind.target(denoised, (x_t - alpha_t * denoised) / sigma_t, alpha_t, sigma_t)
        target = kind.target(x_0, epsilon, alpha_t, sigma_t)
        actual = loss(output, target, schedule, kind, t)
        torch.testing.assert_close(
            actual, expected, rtol=1e-4, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_simple_loss_is_the_mean_squared_error(kind: str) -> None:
    schedule = SCHEDULES["vp"]
    t, _, _, target, output, _ = batch(schedule)
    actual = Simple()(output, target, schedule, KINDS[kind], t)
    expected = [float(((o - y) ** 2).mean()) for o, y in zip(output, target, strict=True)]
    assert actual.tolist() == pytest.approx(expected, rel=1e-6)


def test_simple_loss_of_v_weights_the_x_0_error_by_snr_plus_one() -> None:
    """Salimans & Ho, section 4: |v̂ - v|² = (1 + SNR) |x̂ - x_0|²."""
    schedule = SCHEDULES["cosine"]
    t, alpha_t, sigma_t, x_0, epsilon, denoised = batch(schedule)
    x_t, v = alpha_t * x_0 + sigma_t * epsilon, KINDS["v"]
    output = v.target(denoised, (x_t - alpha_t * denoised) / sigma_t, alpha_t, sigma_t)
    actual = Simple()(output, v.target(x_0, epsilon, alpha_t, sigma_t), schedule, v, t)
    expected = (1 + schedule.ratio(t) ** -2) * (denoised - x_0).square().mean((1, 2, 3))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("schedule", ["vp", "subvp", "flow"])
def test_likelihood_loss_of_a_gaussian_is_the_mutual_information(schedule: str) -> None:
    """½ ∫ w E|x̂ - x_0|² dt = ½ log (1 + τ² SNR) between both ends (Guo et al., 2005, eq. 18).

    For x_0 ~ N(0, τ²), the exact estimate has the error E|x̂ - x_0|² = τ² / (1 + τ² SNR).
    """
    schedule, tau = SCHEDULES[schedule], 0.5
    r = torch.logspace(-2, 1.5, 4001, dtype=torch.float64)
    t = schedule.t_from_ratio(r)
    error = tau**2 / (1 + tau**2 / r**2)
    actual = torch.trapezoid(Likelihood().weight(schedule, t) * error, t) / 2
    expected = 0.5 * math.log((1 + tau**2 / 1e-4) / (1 + tau**2 / 1e3))
    assert float(actual) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: MinSNR(0.0), r"gamma=0\.0"),
        (lambda: MinSNR(math.nan), "gamma=nan"),
        (lambda: P2(gamma=-0.1), r"gamma=-0\.1"),
        (lambda: P2(k=0.0), r"k=0\.0"),
        (lambda: EDM(0.0), r"sigma_data=0\.0"),
    ],
)
def test_invalid_arguments_are_an_error(make: Callable[[], Loss], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
