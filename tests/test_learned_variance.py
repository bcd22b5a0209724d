"""Tests of the learned variance against closed forms, explicit bounds and the fixed variances.

For x_0 ~ N(m, c I), x_s given x_t is normal with variance Σ = V_s v / V_t, where V_t = α_t² c +
σ_t² is the variance of x_t. Since Σ = v (σ_s² / σ_t²)^{1 - share}, the variance fraction `share`
is

    share = 1 - log (V_t / V_s) / log (σ_t² / σ_s²).
"""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, Command, Trained
from gaussian import MEAN, GaussianDenoiser, sampler_moments
from omegaconf import OmegaConf
from scipy.stats import norm
from torch import Tensor, nn

from diffusion_lab import load_run
from diffusion_lab import parameterization as kinds
from diffusion_lab.command.validation import check_train
from diffusion_lab.denoiser import ClassifierFree, Clipped, Denoiser, NetworkDenoiser, Rescheduled
from diffusion_lab.errors import ConfigError, RunError
from diffusion_lab.interop import load_schedule, load_unet, save_unet
from diffusion_lab.likelihood import bound
from diffusion_lab.loss import Hybrid, Loss, Simple
from diffusion_lab.nn import UNet
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.runs import compose
from diffusion_lab.sampler import DDIM, Ancestral, State
from diffusion_lab.schedule import VP, Cosine, DiscreteSchedule, Linear
from diffusion_lab.tensor import broadcast
from diffusion_lab.training.module import DiffusionModule
from diffusion_lab.transition import (
    discretized_gaussian_nll,
    final_step_variance,
    kl_term,
    transition,
)

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
TWENTY = Linear(1e-4, 0.6, steps=20)  # its last step, which adds no noise, is small


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def levels(*shape: int, seed: int = 0) -> Tensor:
    """8-bit images in [-1, 1], float32, which contain both ends of the range."""
    p = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))
    p.flatten()[:2] = torch.tensor([0, 255])
    return p.float() / 127.5 - 1


def exact_fraction(schedule: DiscreteSchedule, t: Tensor, c: float) -> Tensor:
    """The exact variance fraction for x_0 of variance c and steps of 1 / T, of t's shape.

    It is 1 for the last step.
    """
    s = t - 1 / schedule.steps
    last = s < 0.5 / schedule.steps
    step = transition(schedule, t, torch.where(last, t / 2, s))
    ratios = [schedule(u.double()) for u in (t, torch.where(last, t / 2, s))]
    v_t, v_s = (alpha**2 * c + sigma**2 for alpha, sigma in ratios)
    share = 1 - torch.log(v_t / v_s) / torch.log(step.sigma_t**2 / step.sigma_s**2)
    return torch.where(last, 1.0, share)


class WithFraction(Denoiser):
    """A given denoiser with a variance fraction that is a function of t."""

    def __init__(self, denoiser: Denoiser, share) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser, self.share = denoiser, share

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.denoiser(x_t, t).to(x_t.dtype)

    def with_variance(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        share = broadcast(torch.as_tensor(self.share(t)), x_t)
        return self(x_t, t), share.expand(x_t.shape)


class Gaussians(GaussianDenoiser):
    """The denoiser of x_0 ~ N(m, c I) with its exact variance fraction."""

    def __init__(self, schedule: DiscreteSchedule, c: float) -> None:
        super().__init__(schedule, MEAN, c * torch.eye(4, dtype=torch.float64))
        self.c = c

    def with_variance(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self(x_t, t), exact_fraction(self.schedule, t, self.c).expand(x_t.shape)


# --- the variance of a step ---------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.05, 0.25, 0.9])
def test_kl_is_minimal_at_the_exact_variance_of_the_step(c: float) -> None:
    """At each step of the chain, the minimal KL divergence is ½ log (Σ / β̃)."""
    t = torch.arange(2, 21, dtype=torch.float64) / 20
    share = exact_fraction(TWENTY, t, c).requires_grad_()
    assert bool(((share > 0) & (share < 1)).all())
    s = t - 1 / 20
    step = transition(TWENTY, t, s)
    sigma_s, alpha_t, sigma_t, v = step[1:]
    v_t, v_s = (alpha**2 * c + sigma**2 for alpha, sigma in (TWENTY(t), TWENTY(s)))
    variance = step.reverse_variance(share)
    torch.testing.assert_close(variance, v * v_s / v_t, rtol=1e-12, atol=0)
    # The covariance of x_s and x_t gives the same variance.
    covariance = alpha_t / TWENTY(s)[0] * v_s
    torch.testing.assert_close(variance, v_s - covariance**2 / v_t, rtol=1e-9, atol=0)

    square = c * sigma_t**2 / v_t  # E (x_0 - x̂)²
    arguments = TWENTY.ratio(s) ** -2 - TWENTY.ratio(t) ** -2, torch.log(sigma_t**2 / sigma_s**2)
    nats = kl_term(square, share, *arguments)
    small = v * sigma_s**2 / sigma_t**2
    torch.testing.assert_close(nats, torch.log(variance / small) / 2, rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(nats.sum(), share)
    torch.testing.assert_close(gradient, torch.zeros_like(t), rtol=0, atol=1e-12)
    for away in (-0.05, 0.05, -share, 1 - share):
        assert bool((kl_term(square, share + away, *arguments) > nats).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("share", "variance"), [(0.0, "small"), (1.0, "large")])
@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_fractions_zero_and_one_give_the_fixed_variances(
    schedule: DiscreteSchedule, share: float, variance: str, dtype: torch.dtype
) -> None:
    """The samples are bitwise equal on a grid of 50 steps."""
    prior, start = GaussianDenoiser(schedule), normal(16, 4, dtype=dtype)
    learned, fixed = (
        Ancestral(50, name)(
            WithFraction(prior, lambda t: share), start, generator=torch.Generator().manual_seed(1)
        )
        for name in ("learned", variance)
    )
    assert learned.dtype == dtype and torch.equal(learned, fixed)
    other = Ancestral(50, "learned")(
        WithFraction(prior, lambda t: 0.5), start, generator=torch.Generator().manual_seed(1)
    )
    assert not torch.equal(other, fixed)


@pytest.mark.parametrize("c", [0.05, 0.25])
def test_exact_fraction_preserves_the_data_variance_in_twenty_steps(c: float) -> None:
    """The variance is exact to rounding before the last step, which adds no noise.

    The output of the last step is E[x_0 | x_t], whose variance is known. The fixed variances
    differ from the data's by more than 10%.
    """
    denoiser, found = Gaussians(TWENTY, c), {}
    start = denoiser.marginal(1.0)
    for variance in ("small", "large", "learned"):
        mean, covariance = sampler_moments(Ancestral(20, variance), denoiser, *start)
        torch.testing.assert_close(mean, MEAN, rtol=0, atol=1e-9)
        found[variance] = covariance
    alpha, sigma = TWENTY(torch.tensor(1 / 20, dtype=torch.float64))
    last = c * alpha**2 * c / (alpha**2 * c + sigma**2)
    assert 0.997 < float(last / c) < 1
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(found["learned"], last * identity, rtol=1e-9, atol=1e-12)
    assert float(found["small"][0, 0]) < 0.7 * c
    assert float(found["large"][0, 0]) > 1.1 * c


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_fraction_interpolates_the_variances_of_the_actual_step_t_to_s(steps: int) -> None:
    """Both interpolation ends are the variances of the step from t to s, not of DDPM's single
    step.

    The prior mean is zero, so that each step is a known multiple of x_t and the noise.
    """
    schedule, states = Cosine(), list[State]()
    still = WithFraction(GaussianDenoiser(schedule, 0 * MEAN), lambda t: 0.3 + 0.4 * t)
    start = normal(1, 4)
    Ancestral(steps, "learned")(
        still, start, generator=torch.Generator().manual_seed(0), callback=states.append
    )
    generator = torch.Generator().manual_seed(0)
    for now, then in pairwise(states[:-1]):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            map(float, schedule(torch.tensor(u, dtype=torch.float64))) for u in (now.t, then.t)
        )
        v = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
        share, small = 0.3 + 0.4 * now.t, v * sigma_s**2 / sigma_t**2
        std = math.exp((share * math.log(v) + (1 - share) * math.log(small)) / 2)
        mean = alpha_t / alpha_s * sigma_s**2 * now.x_t + alpha_s * v * now.denoised
        z = torch.randn(1, 4, dtype=torch.float64, generator=generator)
        expected = mean / sigma_t**2 + std * z
        torch.testing.assert_close(then.x_t, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("index", [999, 412, 1, 0])
def test_step_with_learned_variance_matches_diffusers(index: int) -> None:
    """The grid has every index.

    On a coarser grid diffusers uses β of a single index as the larger variance.
    """
    import diffusers

    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.betas, scheduler.alphas_cumprod = beta, (1 - beta).cumprod(0)
    scheduler.set_timesteps(1000)
    x_t, output = normal(2, 3, 4, 4), normal(2, 6, 4, 4, seed=1)
    expected = scheduler.step(
        output, index, x_t, generator=torch.Generator().manual_seed(3)
    ).prev_sample
    schedule = Linear()
    denoiser = NetworkDenoiser(FixedOutput(output), schedule, kinds.Epsilon())
    t, s = (torch.tensor(i / 1000, dtype=torch.float64) for i in (index + 1, index))
    denoised, share = denoiser.with_variance(x_t, t)
    state = State(float(t), x_t, denoised, variance_fraction=share)
    z = normal(2, 3, 4, 4, seed=3)
    actual = Ancestral(variance="learned").step(denoiser, state, s, lambda x: z)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# --- denoisers ----------------------------------------------------------------------------------


class FixedOutput(nn.Module):
    """A network with learned variance that returns a given output and counts its calls."""

    learn_variance = True

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output, self.calls = output, 0

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        self.calls += 1
        return self.output


def test_second_half_of_the_output_is_the_variance_fraction() -> None:
    output, x_t, t = normal(2, 6, 4, 4), normal(2, 3, 4, 4, seed=1), torch.tensor(0.3).double()
    network = FixedOutput(output)
    denoiser = NetworkDenoiser(network, Cosine(), kinds.X0())
    denoised, share = denoiser.with_variance(x_t, t)
    assert network.calls == 1
    assert torch.equal(denoised, output[:, :3]) and torch.equal(share, (output[:, 3:] + 1) / 2)
    assert torch.equal(denoiser(x_t, t), denoised)
    assert torch.equal(denoiser.outputs(x_t, t)[0], output[:, :3])
    clipped, kept = Clipped(denoiser).with_variance(x_t, t)
    assert torch.equal(clipped, denoised.clamp(-1, 1)) and torch.equal(kept, share)

    other = NetworkDenoiser(FixedOutput(normal(2, 6, 4, 4, seed=2)), Cosine(), kinds.X0())
    for strength in (1.0, 2.0):
        guided, kept = ClassifierFree(denoiser, other, strength).with_variance(x_t, t)
        expected = other(x_t, t) + strength * (denoised - other(x_t, t))
        torch.testing.assert_close(guided, expected)
        assert torch.equal(kept, share)
    assert Rescheduled(denoiser, VP()).with_variance(x_t, t)[1] is None
    assert GaussianDenoiser(Cosine()).with_variance(normal(2, 4), t)[1] is None


def test_sampler_calls_the_network_once_per_step_and_ddim_ignores_variance() -> None:
    network = FixedOutput(0.5 * normal(2, 6, 4, 4))
    denoiser, states = NetworkDenoiser(network, Linear(), kinds.X0()), list[State]()
    start = normal(2, 3, 4, 4)
    Ancestral(5, "learned", clip=True)(denoiser, start, callback=states.append)
    assert network.calls == 5
    fraction = (network.output[:, 3:] + 1) / 2
    assert all(torch.equal(s.variance_fraction, fraction) for s in states[:-1])
    plain = WithFraction(denoiser, lambda t: 9.9)
    assert torch.equal(DDIM(5)(denoiser, start), DDIM(5)(plain, start))


def test_error_without_learned_variance_names_the_alternatives() -> None:
    with pytest.raises(ConfigError) as caught:
        Ancestral(3, "learned")(GaussianDenoiser(Linear()), normal(2, 4))
    for text in (
        "sampler.variance=learned", "sampler.variance=small or large",
        "network.learn_variance=true loss=hybrid",
    ):  # fmt: skip
        assert text in str(caught.value)


def test_learn_variance_changes_only_the_last_layer_of_the_unet() -> None:
    """The names and initial values are equal; only the last layer has twice as many channels."""
    arguments = {"channels": 8, "multipliers": (1, 1), "attention_levels": (), "groups": 4}
    torch.manual_seed(0)
    plain = UNet(**arguments, blocks=1).state_dict()
    torch.manual_seed(0)
    learned = UNet(**arguments, blocks=1, learn_variance=True).state_dict()
    assert plain.keys() == learned.keys()
    assert plain["conv_out.weight"].shape == (3, 8, 3, 3)
    assert learned["conv_out.weight"].shape == (6, 8, 3, 3)
    assert learned["conv_out.bias"].shape == (6,)
    assert all(torch.equal(plain[k], learned[k]) for k in plain if "conv_out" not in k)


# --- the loss -----------------------------------------------------------------------------------

PARAMETERIZATIONS = {
    "epsilon": kinds.Epsilon(),
    "score": kinds.Score(),
    "x0": kinds.X0(),
    "v": kinds.V(),
    "flow": kinds.Flow(),
    "edm": kinds.EDM(0.4),
}
EIGHT = torch.tensor([1, 2, 3, 50, 300, 600, 999, 1000], dtype=torch.float64) / 1000


def drawn(kind: str, schedule: DiscreteSchedule, t: Tensor) -> tuple[Tensor, ...]:
    """x_0, the output, its target and the estimate x̂ for 3 x 4 x 4 images, and the fraction."""
    x_0, epsilon = levels(len(t), 3, 4, 4), normal(len(t), 3, 4, 4).float()
    alpha_t, sigma_t = (broadcast(c, x_0) for c in schedule(t))
    target = PARAMETERIZATIONS[kind].target(x_0, epsilon, alpha_t, sigma_t)
    # The error of x̂ is about half of the noise, as for a trained network.
    gain = PARAMETERIZATIONS[kind].gain(alpha_t, sigma_t)
    away = 0.5 * sigma_t / torch.hypot(alpha_t, sigma_t)
    output = target + gain * away * normal(*x_0.shape, seed=1).float()
    x_t = (alpha_t * x_0 + sigma_t * epsilon).double()
    alpha_t, sigma_t = (broadcast(c, x_t) for c in schedule(t))
    denoised = PARAMETERIZATIONS[kind].denoised(output.double(), x_t, alpha_t, sigma_t)
    share = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(2))
    return x_0, output, target, denoised, share


def term_by_hand(x_0: Tensor, denoised: Tensor, share: Tensor, t: float) -> Tensor:
    """The term of one image in bits, from DDPM's β alone.

    It is the KL divergence of two normals or, for the last step, the probability of a pixel's
    level.
    """
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - beta).cumprod(0)
    i = round(t * 1000) - 1
    x_0 = x_0.double()

    def posterior_variance(i: int) -> Tensor:
        return beta[i] * (1 - bar[i - 1]) / (1 - bar[i])

    low = posterior_variance(max(i, 1))
    std = torch.exp((share * torch.log(beta[i]) + (1 - share) * torch.log(low)) / 2)
    if i == 0:
        p = torch.distributions.Normal(denoised, std)
        above, below = p.cdf(x_0 + 1 / 255), p.cdf(x_0 - 1 / 255)
        above, below = torch.where(x_0 == 1, 1, above), torch.where(x_0 == -1, 0, below)
        return -torch.log2(above - below).mean()
    # The term in x_t is the same in both means.
    of_x_0 = bar[i - 1].sqrt() * beta[i] / (1 - bar[i])
    q = torch.distributions.Normal(of_x_0 * x_0, low.sqrt())
    p = torch.distributions.Normal(of_x_0 * denoised, std)
    return torch.distributions.kl_divergence(q, p).mean() / math.log(2)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_hybrid_loss_and_gradients_match_nichol_and_dhariwal(kind: str) -> None:
    """The gradient of the mean equals that of L_simple bitwise.

    The gradient of the variance fraction equals that of the bound.
    """
    schedule, t = Linear(), EIGHT
    x_0, output, target, denoised, share = drawn(kind, schedule, t)
    arguments = target, schedule, PARAMETERIZATIONS[kind], t
    output.requires_grad_()
    share.requires_grad_()
    hybrid = Hybrid(0.002)(output, *arguments, share, x_0)
    of_mean, of_share = torch.autograd.grad(hybrid.sum(), (output, share))
    simple = Simple()(output, *arguments)
    assert torch.equal(of_mean, torch.autograd.grad(simple.sum(), output)[0])

    exact = share.detach().double().requires_grad_()
    terms = torch.stack(
        [
            term_by_hand(*row, float(time))
            for *row, time in zip(x_0, denoised, exact, t, strict=True)
        ]
    )
    assert bool((terms > 1e-7).all())
    (expected,) = torch.autograd.grad(0.002 * 1000 * terms.sum(), exact)
    torch.testing.assert_close(
        (hybrid - simple).detach().double() / 2, terms.detach(), rtol=2e-4, atol=2e-6
    )
    for got, wanted in zip(of_share.double(), expected, strict=True):
        # In float32 the gain and the KL divergence cancel to rounding if a step changes little.
        atol = max(1e-12, 1e-3 * float(wanted.abs().max()))
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=atol)


def test_hybrid_loss_and_gradients_are_finite_for_large_errors() -> None:
    """The output of the network is far from the target, also at the first index."""
    x_0, t = levels(8, 3, 4, 4), EIGHT
    share = torch.full_like(x_0, 0.5).requires_grad_()
    output = (30 * normal(8, 3, 4, 4).float()).requires_grad_()
    for name in ("epsilon", "x0", "v"):
        loss = Hybrid()(
            output, torch.zeros_like(output), Cosine(), PARAMETERIZATIONS[name], t, share, x_0
        )
        assert bool(loss.isfinite().all())
        gradients = torch.autograd.grad(loss.sum(), (output, share))
        assert all(bool(g.isfinite().all()) for g in gradients)


def test_module_computes_gradients_for_the_mean_and_the_variance() -> None:
    """The loss of one batch is L_simple plus T / 1000 times the variational terms."""

    class Half(nn.Module):
        learn_variance = True

        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.tensor(0.7))
            self.o = nn.Parameter(torch.tensor(0.2))

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return torch.cat([self.mean * x, self.o.expand(x.shape)], 1)

    def loss(network: nn.Module, kind: Loss) -> Tensor:
        module = DiffusionModule(
            network, Linear(), kinds.Epsilon(), kind, lambda p: None, lambda o, n: None
        )
        t, x_0 = EIGHT, levels(8, 3, 4, 4)
        return module._losses(x_0, t, normal(8, 3, 4, 4).float(), ema=False).sum()

    network = Half()
    whole = loss(network, Hybrid())
    whole.backward()

    class Mean(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return network.mean * x

    simple = loss(Mean(), Simple())
    (gradient,) = torch.autograd.grad(simple, network.mean)
    assert float(network.mean.grad) == pytest.approx(float(gradient), rel=1e-6)
    assert float(network.o.grad.abs()) > 1e-5

    x_0, epsilon = levels(8, 3, 4, 4), normal(8, 3, 4, 4).float()
    alpha_t, sigma_t = (broadcast(c, x_0.double()) for c in Linear()(EIGHT))
    x_t = alpha_t * x_0 + sigma_t * epsilon
    denoised = (x_t - sigma_t * 0.7 * x_t) / alpha_t
    share = torch.full(x_0.shape, 0.6, dtype=torch.float64)
    rows = zip(x_0, denoised, share, EIGHT, strict=True)
    terms = [term_by_hand(*row, float(t)) for *row, t in rows]
    expected = float(simple.detach()) + float(sum(terms))
    assert float(whole.detach()) == pytest.approx(expected, rel=1e-4)


# --- the last step ------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [-1.02, -0.4, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("std", [0.002, 0.01, 0.4])
def test_probabilities_of_all_levels_sum_to_one(mean: float, std: float) -> None:
    variance = torch.tensor(std**2, dtype=torch.float64)
    nats = discretized_gaussian_nll(LEVELS, torch.full_like(LEVELS, mean), variance)
    assert float(torch.exp(-nats).sum()) == pytest.approx(1, abs=1e-12)
    edges = np.concatenate([[-np.inf], (LEVELS[:-1] + 1 / 255).numpy(), [np.inf]])
    near = np.abs(LEVELS.numpy() - mean) < 5 * std
    expected = np.diff(norm.cdf(edges, mean, std))[near]
    np.testing.assert_allclose(np.exp(-nats.numpy())[near], expected, rtol=1e-7)
    assert bool(nats.isfinite().all())


def test_final_step_variance_interpolates_posterior_variance_and_beta_0() -> None:
    beta = np.linspace(1e-4, 0.02, 1000)
    before = beta[1] * beta[0] / (1 - (1 - beta[0]) * (1 - beta[1]))
    for share, expected in ((0.0, before), (1.0, beta[0]), (0.5, math.sqrt(before * beta[0]))):
        actual = final_step_variance(Linear(), 0.001, 0.002, torch.tensor(share).double())
        assert float(actual) == pytest.approx(expected, rel=1e-9)


# --- the variational bound ----------------------------------------------------------------------


class FixedUniform(KeyedGenerator):
    """A generator that returns the same uniform number for every image, and zeros as noise."""

    def __init__(self, count: int, u: float) -> None:
        super().__init__(make_key(0, torch.arange(count)))
        self.u = u

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((len(self.key), *shape), self.u, dtype=dtype)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(len(self.key), *shape, dtype=dtype)


class Shrink(Denoiser):
    """The denoiser x̂ = 0.9 x_t / α_t."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha_t, _ = (broadcast(c, x_t) for c in self.schedule(t))
        return 0.9 * x_t / alpha_t


def cumulative_probabilities(schedule: DiscreteSchedule) -> Tensor:
    """Cumulative probabilities, from 0 to 1, with which the bound draws the T - 1 steps."""
    t = torch.arange(1, schedule.steps + 1, dtype=torch.float64) / schedule.steps
    snr = schedule.ratio(t) ** -2
    mass = ((snr[:-1] - snr[1:]) / (1 + snr[1:])).cumsum(0)
    return torch.cat([mass.new_zeros(1), mass / mass[-1]])


@pytest.mark.parametrize("schedule", [TWENTY, Cosine(steps=12)], ids=["linear", "cosine"])
def test_terms_of_the_hybrid_loss_equal_the_terms_of_the_bound(schedule: DiscreteSchedule) -> None:
    """Each term is drawn alone; their sum with KL(q(x_1 | x_0) ‖ p) equals the bound."""
    p = torch.randint(256, (3, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    x_0 = p.double() / 127.5 - 1
    denoiser = WithFraction(Shrink(schedule), lambda t: 0.2 + 0.6 * t)
    mass, steps = cumulative_probabilities(schedule), schedule.steps

    def term(k: int) -> Tensor:
        """The loss term of the step at t = (k + 1) / T for x_t without noise."""
        t = torch.full((3,), (k + 1) / steps, dtype=torch.float64)
        alpha_t, _ = (broadcast(c, x_0) for c in schedule(t))
        denoised, share = denoiser.with_variance(alpha_t * x_0, t)
        return Hybrid.term(denoised - x_0, share, x_0, schedule, t)

    alpha, sigma = (float(c) for c in schedule(torch.ones((), dtype=torch.float64)))
    prior = 0.5 * (alpha**2 * x_0**2 + sigma**2 - 1 - 2 * math.log(sigma))
    rest = prior.flatten(1).mean(1) / math.log(2) + term(0)
    total = rest.clone()
    for k in range(1, steps):
        probability = float(mass[k] - mass[k - 1])
        middle = float(mass[k] + mass[k - 1]) / 2
        found = (bound(denoiser, p, FixedUniform(3, middle), terms=1) - rest) * probability
        torch.testing.assert_close(found, term(k), rtol=1e-5, atol=1e-7)
        total += found
    expected = rest + sum(term(k) for k in range(1, steps))
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)


def test_bound_with_zero_fraction_equals_the_bound_with_fixed_variance() -> None:
    """The bounds differ only in the last step, where a learned variance is used if present."""
    p = torch.randint(256, (4, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    x_0, schedule = p.double() / 127.5 - 1, Linear()
    plain, key = Shrink(schedule), make_key(0, torch.arange(4))
    learned = WithFraction(plain, lambda t: 0.0)
    with_variance, without = (bound(d, p, KeyedGenerator(key), terms=20) for d in (learned, plain))
    generator = KeyedGenerator(key)
    for _ in range(20):
        generator.uniform(dtype=torch.float64)
        generator.normal(3, 4, 4, dtype=torch.float64)
    r = float(schedule.ratio(0.001))
    v = x_0 + r * generator.normal(3, 4, 4, dtype=torch.float64)
    logits = -((v[..., None] - LEVELS) ** 2) / (2 * r**2)
    of_levels = -logits.log_softmax(-1).gather(-1, p.long()[..., None])[..., 0]
    variance = float(final_step_variance(schedule, 0.001, 0.002, torch.zeros(()).double()))
    of_network = discretized_gaussian_nll(
        x_0, 0.9 * v.float().double(), torch.tensor(variance).double()
    )
    difference = (of_network - of_levels).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(with_variance - without, difference, rtol=1e-4, atol=1e-5)


def test_exact_fraction_lowers_the_bound_by_the_closed_form() -> None:
    """With the exact fraction, E KL = ½ log (Σ / β̃) at every step.

    The bound is 0.64 bits lower in total.
    """
    mu, tau, schedule = -0.05, 0.25, Linear()

    class Pixels(Denoiser):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            alpha_t, sigma_t = (broadcast(c, x_t) for c in self.schedule(t.double()))
            gain = alpha_t * tau**2 / (alpha_t**2 * tau**2 + sigma_t**2)
            return mu + gain * (x_t - alpha_t * mu)

    level = mu + tau * normal(256, 3, 4, 4)
    p = ((level + 1) * 127.5).round().clamp(0, 255).byte()
    key, plain = make_key(0, torch.arange(256)), Pixels(schedule)
    learned = WithFraction(plain, lambda t: exact_fraction(schedule, t, tau**2))
    shorter = bound(learned, p, KeyedGenerator(key), terms=50)
    longer = bound(plain, p, KeyedGenerator(key), terms=50)

    t = torch.arange(2, 1001, dtype=torch.float64) / 1000
    r = schedule.ratio(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    square = tau**2 / (1 + tau**2 / r[1:] ** 2)
    small = ((r[:-1] ** -2 - r[1:] ** -2) / 2 * square).sum()
    sigma = schedule(torch.arange(1, 1001, dtype=torch.float64) / 1000)[1]
    gain = exact_fraction(schedule, t, tau**2) * torch.log(sigma[1:] ** 2 / sigma[:-1] ** 2)
    # The pixel term: the network uses N(x̂, β_0), the other bound a softmax over levels around x_t
    # / α_t.
    first = float(r[0])
    n = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-(n**2) / 2) / torch.exp(-(n**2) / 2).sum()
    off = n * tau * first / math.hypot(tau, first)
    variance = schedule(torch.tensor(0.001).double())[1] ** 2
    own = discretized_gaussian_nll(torch.zeros_like(off), off, variance)
    j = torch.arange(-40, 41, dtype=torch.float64) / 127.5
    logits = -((n[:, None] * first - j) ** 2) / (2 * first**2)
    levels_ = -logits.log_softmax(1)[:, 40]
    expected = (gain.sum() / 2 - small + (weight * (own - levels_)).sum()) / math.log(2)

    difference = shorter - longer
    error = float(difference.std()) / 16
    assert float(expected) < -0.6 and error < 0.01
    assert abs(float(difference.mean() - expected)) < 4 * error


# --- diffusers ----------------------------------------------------------------------------------


def test_diffusers_network_with_learned_variance_round_trips(tmp_path: Path) -> None:
    """It loads with equal outputs, returns its variance fraction, and is saved bit for bit."""
    from diffusers import UNet2DModel

    d, u = "DownBlock2D", "UpBlock2D"
    config = {
        "in_channels": 3, "out_channels": 6, "block_out_channels": [16, 16],
        "down_block_types": [d, d], "up_block_types": [u, u], "layers_per_block": 1,
        "norm_num_groups": 4, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
        "norm_eps": 1e-6, "attention_head_dim": None,
    }  # fmt: skip
    torch.manual_seed(0)
    theirs = UNet2DModel(**config).eval()
    theirs.save_pretrained(tmp_path / "a")
    ours = load_unet(tmp_path / "a")
    assert ours.learn_variance and ours.image_channels == 3
    x = normal(2, 3, 8, 8).float()
    with torch.no_grad():
        expected = theirs(x, torch.tensor([499, 499])).sample
        output, share = NetworkDenoiser(ours, Linear(), kinds.Epsilon()).outputs(
            x, torch.tensor(0.5)
        )
    torch.testing.assert_close(output, expected[:, :3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(share, (expected[:, 3:] + 1) / 2, rtol=1e-4, atol=1e-5)

    save_unet(ours, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["out_channels"] == 6
    again = UNet2DModel.from_pretrained(tmp_path / "b").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict().items())
    plain = UNet(16, (1, 1), 1, (), 4)
    save_unet(plain, tmp_path / "c")
    assert not load_unet(tmp_path / "c").learn_variance


def test_unsupported_variance_type_of_diffusers_is_an_error(tmp_path: Path) -> None:
    settings = {
        "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
        "num_train_timesteps": 1000,
    }  # fmt: skip
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(settings | {"variance_type": "learned_range"}))
    assert load_schedule(tmp_path).steps == 1000
    path.write_text(json.dumps(settings | {"variance_type": "learned"}))
    with pytest.raises(RunError, match=r'variance_type="learned" is not supported.*learned_range'):
        load_schedule(tmp_path)


# --- invalid configurations ---------------------------------------------------------------------

LEARNED = ["loss=hybrid", "network.learn_variance=true"]


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (["loss=hybrid"], ["loss=hybrid", "network.learn_variance=true", "loss=simple"]),
        (LEARNED[1:], ["network.learn_variance=true", "loss=hybrid"]),
        (["loss=min_snr", LEARNED[1]], ["network.learn_variance=true", "loss=hybrid"]),
        ([*LEARNED, "schedule=vp"], ["schedule=VP", "schedule=linear", "loss=hybrid"]),
        ([*LEARNED, "time=importance"], ["time=Importance", "set time=uniform"]),
        (
            ["sampler.variance=learned"],
            ["sampler.variance=learned", "sampler.variance=small", "network.learn_variance=true"],
        ),
        ([*LEARNED, "loss.vlb_weight=0"], ["loss.vlb_weight=0"]),
        ([LEARNED[0], "network.learn_variance=1"], ["network.learn_variance=1", "true or false"]),
        (["sampler.variance=big"], ["sampler.variance=big", "learned"]),
    ],
)
def test_incompatible_options_are_an_error(overrides: list[str], texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_train(compose("train", [*overrides, "++paths.output_dir=out"]))
    assert all(text in str(caught.value) for text in texts), caught.value


def test_compatible_options_are_accepted() -> None:
    for more in ([], ["time.stratified=true"], ["sampler.variance=learned"], ["schedule=cosine"]):
        check_train(compose("train", [*LEARNED, *more, "++paths.output_dir=out"]))


def test_module_and_loss_raise_errors_without_the_command_line() -> None:
    parts = (Linear(), kinds.Epsilon())
    for network, loss in ((nn.Identity(), Hybrid()), (FixedOutput(torch.zeros(1)), Simple())):
        with pytest.raises(ConfigError, match=r"loss=hybrid"):
            DiffusionModule(network, *parts, loss, lambda p: None, lambda o, n: None)
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"VP is continuous; choose schedule=linear"):
        Hybrid()(x, x, VP(), kinds.Epsilon(), torch.tensor([0.5]).double(), x, x)
    with pytest.raises(ValueError, match=r"vlb_weight=0"):
        Hybrid(0.0)


# --- command line -------------------------------------------------------------------------------


def test_run_trains_and_samples_with_learned_variance(lab: Command, tiny: Command) -> None:
    result = tiny(
        *LEARNED, "sampler.variance=learned", "trainer.max_steps=3", "hydra.run.dir=a",
        "optimizer.lr=0.01",
    )  # fmt: skip
    assert result.code == 0, result.text
    assert Path("a/samples/grid-0000003.png").is_file()
    network = load_run("a", ema=False).network
    assert network.learn_variance
    # The variance half of the output was trained.
    assert float(network.conv_out.weight[3:].abs().max()) > 1e-4

    common = ["sampler.steps=3", "num_samples=2", "trainer.accelerator=cpu", "task=generate"]
    images = []
    for variance in ("learned", "small"):
        where = f"hydra.run.dir={variance}"
        result = lab("eval", "run=a", f"sampler.variance={variance}", where, *common)
        assert result.code == 0, result.text
        images.append(np.load(f"{variance}/samples.npy").astype(int))
    assert np.abs(images[0] - images[1]).max() > 3
    refused = lab("eval", "run=a", "sampler.variance=learned", "schedule=vp", *common)
    assert refused.code == 1 and "sampler.variance=small or large" in refused.text
    assert "Traceback" not in refused.text

    result = lab(
        "eval", "run=a", "task=likelihood", "num_images=1", "task.terms=3", "sampler.rtol=0.1",
        "sampler.atol=0.1", "trainer.accelerator=cpu", "hydra.run.dir=l",
    )  # fmt: skip
    assert result.code == 0, result.text
    assert "bound" in result.text


@pytest.mark.slow
def test_old_run_without_learn_variance_loads_and_resumes(
    lab: Command, tiny: Command, trained: Trained
) -> None:
    """The configuration and the checkpoint of an old run lack `network.learn_variance`."""
    trained("a", "trainer.max_steps=2")
    file = Path("a/.hydra/config.yaml")
    config = OmegaConf.load(file)
    del config.network["learn_variance"]
    OmegaConf.save(config, file)
    last = Path("a/checkpoints/last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["diffusion_lab"]["config"]["network"]["learn_variance"]
    torch.save(checkpoint, last)
    assert load_run("a").with_variance(torch.zeros(1, 3, 16, 16), torch.tensor(0.5))[1] is None
    result = tiny("resume=a", "trainer.max_steps=3")
    assert result.code == 0, result.text
    result = tiny("resume=a", "trainer.max_steps=4", *LEARNED)
    assert result.code == 1 and "network.learn_variance: None -> True" in result.text
    common = ["sampler.steps=2", "num_samples=2", "trainer.accelerator=cpu", "task=generate"]
    refused = lab("eval", "run=a", "sampler.variance=learned", *common)
    assert refused.code == 1 and "network.learn_variance=true loss=hybrid" in refused.text
    assert TINY[0] == "network=unet_tiny"
