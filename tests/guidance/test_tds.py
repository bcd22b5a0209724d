"""Twisted sequential Monte Carlo: weights, limits, and convergence."""

import math

import numpy as np
import pytest
import torch

from diffusion_lab.analytic import Gaussian, GaussianMixture
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import SamplingError
from diffusion_lab.guidance import TDS, Observation
from diffusion_lab.guidance.particles import ParticleSet, systematic
from diffusion_lab.leaderboard import PROBLEMS, Method, grade
from diffusion_lab.operator import HDR, BoxInpainting, Identity, Matrix
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import DDIM, EulerMaruyama
from diffusion_lab.sampler.time_grid import LogSNR
from diffusion_lab.schedule import EDM, VP, Cosine, Linear

SCHEDULE = EDM(sigma_min=0.02, sigma_max=30.0)
MATRIX = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def steps(count: int) -> EulerMaruyama:
    return EulerMaruyama(count, grid=LogSNR())


def test_systematic_resampling_has_the_right_counts() -> None:
    """Integer expected counts are exact.

    Others are rounded up or down, with the right mean over u.
    """
    weights = torch.tensor([[0.5, 0.25, 0.0, 0.25], [0.1, 0.37, 0.33, 0.2]], dtype=torch.float64)
    log_weights = weights.log()
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = torch.stack(
        [
            torch.stack(
                [row.bincount(minlength=4) for row in systematic(log_weights, 8, v.expand(2))]
            )
            for v in u
        ]
    ).double()
    assert bool((counts[:, 0] == torch.tensor([4.0, 2, 0, 2])).all())
    torch.testing.assert_close(counts[:, 1].mean(0), 8 * weights[1], atol=4e-3, rtol=0)
    assert float((counts[:, 1] - 8 * weights[1]).abs().max()) < 1
    everything = systematic(torch.zeros(1, 6, dtype=torch.float64), 6, torch.tensor([0.999]))
    assert everything.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_step_weights_match_dense_gaussian_densities() -> None:
    """log p(z'|z) - log proposal and the twist are compared with dense Gaussians in NumPy."""
    sigma_y, std, r, s = 0.3, 0.8, 1.7, 1.1
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 3, generator=generator, dtype=torch.float64).repeat_interleave(2, 0)
    observation = Observation(y, sigma_y, Matrix(MATRIX), group=2)
    particles = ParticleSet(observation, 4, std, generator)
    z, denoised = particles.normal(), particles.normal()
    twist, pull = particles.twist(denoised, r)
    moved, ratio = particles.move(z, denoised, pull, r, s)

    a, c = MATRIX.numpy(), std**2
    v, v_s = (x**2 * c / (x**2 + c) for x in (r, s))
    q, j = s**2 / r**2, c / (s**2 + c)
    tau2 = s**2 * (1 - q) + (1 - q) ** 2 * v
    cov_y = sigma_y**2 * np.eye(3) + v * a @ a.T

    def log_normal(x: np.ndarray, covariance: np.ndarray) -> float:
        return -0.5 * (x @ np.linalg.solve(covariance, x) + np.linalg.slogdet(covariance)[1])

    # The proposal combines N(., τ²) with the likelihood of y given z' for an estimate x̂' of slope
    # j.
    precision = np.eye(5) / tau2 + j**2 * a.T @ np.linalg.solve(
        sigma_y**2 * np.eye(3) + v_s * a @ a.T, a
    )
    covariance = np.linalg.inv(precision)
    twists, offset = [], None
    for g in range(2):
        for n in range(4):
            x, e = denoised[g, n].numpy(), y[2 * g].numpy() - a @ denoised[g, n].numpy()
            mean = q * z[g, n].numpy() + (1 - q) * x
            shifted = mean + tau2 * j * a.T @ np.linalg.solve(cov_y, e)
            new = moved[g, n].numpy()
            expected = log_normal(new - mean, tau2 * np.eye(5)) - log_normal(
                new - shifted, covariance
            )
            assert float(ratio[g, n]) == pytest.approx(expected, abs=1e-9)
            twists.append(float(twist[g, n]) - log_normal(e, cov_y))
    offset = twists[0]  # a constant from the directions that y does not depend on
    np.testing.assert_allclose(twists, offset, atol=1e-9)


@pytest.mark.parametrize(("r", "s"), [(30.0, 8.0), (1.7, 1.1), (0.5, 0.01)])
def test_weights_are_constant_if_the_twist_is_exact(r: float, s: float) -> None:
    """For p(x_0) = N(0, s² I), the proposal is p(z' | z, y) for any step size."""
    std, generator = 0.8, torch.Generator().manual_seed(1)
    y = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    particles = ParticleSet(Observation(y, 0.3, Matrix(MATRIX)), 5, std, generator)

    def denoised(z: torch.Tensor, level: float) -> torch.Tensor:
        return std**2 / (std**2 + level**2) * z

    z = r * particles.normal()
    before, pull = particles.twist(denoised(z, r), r)
    moved, ratio = particles.move(z, denoised(z, r), pull, r, s)
    after, _ = particles.twist(denoised(moved, s), s)
    torch.testing.assert_close(ratio + after, before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", [SCHEDULE, Linear(), Cosine(), VP()])
def test_tds_samples_the_exact_posterior_of_an_isotropic_gaussian(schedule) -> None:
    """For p(x_0) = N(0, s² I) it is exact with one particle per sample and any number of steps."""
    std, sigma_y = 0.6, 0.2
    prior = Gaussian(torch.zeros(5), std**2 * torch.eye(5))
    y = torch.tensor([0.7, -0.4, 0.9], dtype=torch.float64)
    exact = prior.posterior(y, MATRIX, sigma_y)
    count = 4000
    observation = Observation(y.expand(count, 3), sigma_y, Matrix(MATRIX), group=count)
    x_0 = TDS(1.0, std, sigma_max=30)(
        prior.denoiser(schedule), steps(4), observation,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    factor = torch.linalg.cholesky(exact.covariances[0])
    whitened = torch.linalg.solve_triangular(factor, (x_0 - exact.means[0]).T, upper=False)
    # 4,000 independent samples: the standard errors are 0.016 for a mean and 0.022 for a variance.
    assert float(whitened.mean(1).abs().max()) < 0.06
    assert float((whitened.cov() - torch.eye(5)).abs().max()) < 0.09


@pytest.mark.parametrize("sigma_y", [0.3, 0.5, 1.0])
def test_one_step_of_tds_samples_the_posterior_of_a_gaussian(sigma_y: float) -> None:
    """With one level, r = 0.5, the posterior comes from the last weights and the last draw.

    Without the weights, the mean would be smaller by 10 to 40%; the last draw has the variance
    v σ_y² / (σ_y² + v), with v = 0.2, also where r is above σ_y.
    """
    count, y = 4000, 2.0
    observation = Observation(
        torch.full((count, 1), y, dtype=torch.float64), sigma_y, Identity(), group=count
    )
    schedule = EDM(sigma_min=0.02, sigma_max=0.5)
    x_0 = TDS(8.0, 1.0)(
        Gaussian(torch.zeros(1), torch.eye(1)).denoiser(schedule), steps(1), observation,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    variance = sigma_y**2 / (1 + sigma_y**2)
    assert float(x_0.mean()) == pytest.approx(y / (1 + sigma_y**2), abs=0.06 * variance**0.5)
    assert float(x_0.var()) == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("r", [0.1, 1.7])  # below and above σ_y
def test_last_draw_matches_the_dense_posterior(r: float) -> None:
    """x_0 ~ N(x̂, v I) given y = A x_0 + σ_y n; r is far below and above σ_y."""
    sigma_y, std, count = 0.3, 0.8, 20_000
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    observation = Observation(y.expand(count, 3), sigma_y, Matrix(MATRIX), group=count)
    particles = ParticleSet(observation, count, std, generator)
    denoised = torch.randn(1, 1, 5, generator=generator, dtype=torch.float64)
    x_0 = particles.last(denoised.expand(1, count, 5), r)[0]
    v = r**2 * std**2 / (r**2 + std**2)
    inner = v * MATRIX @ MATRIX.T + sigma_y**2 * torch.eye(3, dtype=torch.float64)
    gain = v * MATRIX.T @ torch.linalg.inv(inner)
    mean = denoised[0, 0] + gain @ (y[0] - MATRIX @ denoised[0, 0])
    covariance = v * (torch.eye(5, dtype=torch.float64) - gain @ MATRIX)
    factor = torch.linalg.cholesky(covariance)
    whitened = torch.linalg.solve_triangular(factor, (x_0 - mean).T, upper=False)
    assert float(whitened.mean(1).abs().max()) < 0.03
    assert float((whitened.cov() - torch.eye(5)).abs().max()) < 0.04


def test_particles_are_resampled_below_the_threshold_only() -> None:
    """Groups with the effective sample sizes 6, 4.5, 3 and 1 of 6, for a threshold of 4.2."""
    weights = torch.tensor(
        [[1.0] * 6, [0.5, 0.5, 1, 1, 0.2, 0.2], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]],
        dtype=torch.float64,
    )
    log_weights = (3 * weights).log()
    observation = Observation(torch.zeros(4, 5, dtype=torch.float64), 0.3)
    particles = ParticleSet(observation, 6, 1.0, torch.Generator().manual_seed(0))
    effective = weights.sum(1) ** 2 / weights.square().sum(1)
    assert effective.tolist() == pytest.approx([6, 4.48, 3, 1], abs=0.01)
    chosen, after = TDS(threshold=0.7)._resampled(log_weights, particles)
    assert torch.equal(chosen[:2], torch.arange(6).expand(2, 6))
    assert torch.equal(after[:2], log_weights[:2])
    assert chosen[2].tolist() == [0, 0, 1, 1, 2, 2] and chosen[3].tolist() == [4] * 6
    assert not after[2:].any()


def test_error_decreases_with_the_number_of_particles() -> None:
    problem = PROBLEMS["mixture_mask"]()
    found = []
    for particles in (1.0, 8.0):
        method = Method("tds", lambda _, p=particles: TDS(p, 1.0), steps(64), SCHEDULE)
        row = grade(problem, method, n_y=8, n=64, n_coverage=0, n_ranks=2, seed=0)
        found.append(row["sw2"] / row["sw2_floor"])
        assert row["nfe"] == 64 * particles and row["vjp"] == 0
    assert found[1] < 0.85 * found[0] and found[1] < 1.35


def test_groups_are_independent_of_each_other() -> None:
    """The result does not depend on the number of particles per network call either."""
    prior = GaussianMixture(
        torch.tensor([0.4, 0.6]), torch.tensor([[1.0] * 5, [-1.0] * 5]),
        torch.stack([0.1 * torch.eye(5), 0.2 * torch.eye(5)]),
    )  # fmt: skip
    y = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keys = make_key(0, torch.arange(12))

    def run(chosen: list[int], **options) -> torch.Tensor:
        rows = torch.cat([torch.arange(4 * k, 4 * k + 4) for k in chosen])
        observation = Observation(y[chosen].repeat_interleave(4, 0), 0.3, Matrix(MATRIX), group=4)
        guidance = TDS(3.0, 1.0, sigma_max=30, **options)
        return guidance(
            prior.denoiser(SCHEDULE), steps(12), observation, generator=KeyedGenerator(keys[rows])
        )

    whole = run([0, 1, 2])
    torch.testing.assert_close(run([2, 0]), torch.cat([whole[8:], whole[:4]]))
    torch.testing.assert_close(run([0, 1, 2], batch_size=5), whole)
    assert len(whole.unique(dim=0)) == 12  # no duplicates remain


def test_samples_with_separate_particles_are_independent() -> None:
    """A group of four samples equals four single samples, unless the particles are shared."""
    denoiser = PROBLEMS["mixture_mask"]().prior.denoiser(SCHEDULE)
    problem = PROBLEMS["mixture_mask"]()
    y = problem.observe(1, torch.Generator().manual_seed(0))[1].expand(4, -1)
    keys = make_key(0, "alone", torch.arange(4))
    for shares in (False, True):
        tds = TDS(3.0, 1.0, share_particles=shares)
        observation = Observation(y, problem.sigma_y, problem.operator, group=4)
        together = tds(denoiser, steps(8), observation, generator=KeyedGenerator(keys))
        alone = [
            tds(denoiser, steps(8), Observation(y[:1], problem.sigma_y, problem.operator),
                generator=KeyedGenerator(key[None]))
            for key in keys
        ]  # fmt: skip
        assert torch.allclose(together, torch.cat(alone), atol=1e-10) is not shares


def test_tds_on_images_has_the_right_variance_and_reports_its_steps() -> None:
    shape = (3, 16, 16)
    prior = Gaussian(torch.zeros(768), 0.25 * torch.eye(768), shape=shape)
    operator = BoxInpainting(shape)
    x = prior.sample(1, torch.Generator().manual_seed(0))
    y = operator(x).repeat_interleave(2, 0)
    states = []
    x_0 = TDS(2.0, 0.5, sigma_max=30)(
        prior.denoiser(Cosine()), steps(10), Observation(y, 0.01, operator, group=2),
        generator=torch.Generator().manual_seed(1), callback=states.append,
    )  # fmt: skip
    assert x_0.shape == (2, *shape) and [s.t == 0 for s in states] == [False] * 10 + [True]
    assert all(s.x_t.shape == s.denoised.shape == (2, *shape) for s in states)
    seen = operator(x_0) - y
    assert float(seen.std()) == pytest.approx(0.01, rel=0.1)  # only the noise of the observation
    hidden = (x_0 - operator.adjoint(operator(x_0))).flatten()
    assert float(hidden[hidden != 0].std()) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"particles": 0.5}, "particles=0.5 is not allowed; it must be a number >= 1"),
     ({"data_std": 0}, "data_std=0"), ({"threshold": 0}, "threshold=0"),
     ({"batch_size": 0}, "batch_size=0"), ({"sigma_max": math.nan}, "sigma_max=nan")],
)  # fmt: skip
def test_invalid_settings_are_an_error(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TDS(**options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sw2_of_the_masked_mixture_is_within_25_percent_of_the_floor(seed: int) -> None:
    """The weights of the modes of mixture_ambiguous are accurate too."""
    method = Method("tds", lambda _: TDS(5.0, 1.0), steps(128), SCHEDULE)
    sizes = {"n_y": 8, "n": 1024, "n_coverage": 512, "n_ranks": 19, "seed": seed}
    row = grade(PROBLEMS["mixture_mask"](), method, **sizes)
    assert row["sw2"] / row["sw2_floor"] <= 1.25 and row["nfe"] == 640 and row["vjp"] == 0
    assert row["variance_ratio"] == pytest.approx(1, abs=0.08)
    assert row["coverage"] == pytest.approx(0.9, abs=0.02)
    assert grade(PROBLEMS["mixture_ambiguous"](), method, **sizes)["mode_tv"] <= 0.05


def test_tds_uses_only_the_grid_of_the_sampler() -> None:
    prior = Gaussian(torch.zeros(5), torch.eye(5))
    observation = Observation(torch.zeros(2, 3, dtype=torch.float64), 0.3, Matrix(MATRIX))
    keys = make_key(torch.arange(2))
    one, other = (
        TDS(1.0, 1.0, sigma_max=30)(
            prior.denoiser(SCHEDULE), sampler, observation, generator=KeyedGenerator(keys)
        )
        for sampler in (DDIM(8, grid=LogSNR()), steps(8))
    )  # fmt: skip
    assert torch.equal(one, other)


class _Broken(Denoiser):
    """Returns NaN below a noise level of 1."""

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x_t, math.nan) if self.schedule.ratio(t) < 1 else 0 * x_t


def test_error_for_a_non_finite_state_names_the_step() -> None:
    observation = Observation(torch.zeros(2, 3, dtype=torch.float64), 0.3, Matrix(MATRIX))
    times = steps(8).times(SCHEDULE, float(SCHEDULE.t_from_ratio(30.0)))
    first = int((SCHEDULE.ratio(times) < 1).nonzero()[0]) + 1
    with pytest.raises(SamplingError, match=f"not finite at step {first} of 8"):
        TDS(1.0, 1.0, sigma_max=30)(_Broken(SCHEDULE), steps(8), observation)


def test_unsupported_operators_and_noise_are_an_error() -> None:
    prior = Gaussian(torch.zeros(5), torch.eye(5)).denoiser(SCHEDULE)
    y = torch.zeros(2, 5, dtype=torch.float64)
    for sigma_y, operator, text in (
        (0.1, HDR(), "TDS is for linear operators"),
        (0.0, Identity(), "sigma_y=0: TDS divides by it"),
        (torch.ones(5), Identity(), "TDS is for noise of one standard deviation"),
    ):
        with pytest.raises(ValueError, match=text):
            TDS()(prior, steps(2), Observation(y, sigma_y, operator))


def test_tds_clips_the_estimate_if_the_sampler_does() -> None:
    """The prior is far outside [-1, 1], so the clipped estimate is 1 everywhere."""
    prior = Gaussian(torch.full((5,), 9.0), 0.01 * torch.eye(5)).denoiser(SCHEDULE)
    observation = Observation(torch.full((2, 5), 1.0, dtype=torch.float64), 0.1)
    states = []
    sampler = EulerMaruyama(8, grid=LogSNR(), clip=True)
    TDS(2.0, 1.0)(prior, sampler, observation, callback=states.append)
    assert all(bool((s.denoised == 1).all()) for s in states[:-1])
