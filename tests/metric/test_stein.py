"""Kernel Stein discrepancy against its definition, and for posteriors in closed form."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from diffusion_lab.analytic import Gaussian, GaussianMixture
from diffusion_lab.guidance import Observation
from diffusion_lab.metric import (
    kernel_stein_discrepancy,
    posterior_score,
    sliced_wasserstein,
    stein_discrepancy,
)
from diffusion_lab.operator import Identity, Operator
from diffusion_lab.operator.matrix import Matrix
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.schedule import VE, VP

SIGMA_Y = 0.45
D = 6
EYE = torch.eye(D, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def mixture(apart: float = 0.8) -> GaussianMixture:
    """Three components whose variances span a decade."""
    axes = torch.linalg.qr(normal(3, D, D, seed=1)).Q
    eigenvalues = 0.3 * 10 ** -torch.linspace(0, 1, 3 * D, dtype=torch.float64).reshape(D, 3).T
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    covariances = (axes * eigenvalues[:, None]) @ axes.mT
    return GaussianMixture(weights, apart * normal(3, D, seed=2), covariances)


class Case:
    """A prior, one observation of one of its samples, and the posterior."""

    def __init__(self, whole: bool, prior: GaussianMixture | None = None) -> None:
        self.prior = mixture() if prior is None else prior
        self.matrix = EYE if whole else normal(3, D, seed=3) / 2
        self.operator = Identity() if whole else Matrix(self.matrix)
        x_0 = self.prior.sample(1, torch.Generator().manual_seed(4))[0]
        self.y = self.matrix @ x_0 + SIGMA_Y * normal(len(self.matrix), seed=5)

    def posterior(self, factor: float = 1.0) -> GaussianMixture:
        """The posterior for σ_y multiplied by a factor."""
        return self.prior.posterior(self.y, self.matrix, factor * SIGMA_Y)

    def observation(self, rows: int, group: int = 1) -> Observation:
        return Observation(self.y.expand(rows, -1), SIGMA_Y, self.operator, group)

    def discrepancy(self, x: Tensor, ratio: float = 0.3, group: int = 0, seed: int = 0) -> Tensor:
        """The discrepancy of samples with noise r_t = `ratio` σ_y."""
        schedule = VP()
        return stein_discrepancy(
            self.prior.denoiser(schedule), x, schedule.t_from_ratio(ratio * SIGMA_Y),
            self.observation(len(x), group or len(x)),
            generator=torch.Generator().manual_seed(seed + 100),
        )  # fmt: skip


# Estimator


def by_definition(x: Tensor, score: Tensor, h: float) -> Tensor:
    """u of all pairs, of shape (M, M), with derivatives of the kernel by autograd."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (1 + (a - b).square().sum() / h**2) ** -0.5

    result = torch.zeros(len(x), len(x), dtype=torch.float64)
    for i, (a, s) in enumerate(zip(x, score, strict=True)):
        for j, (b, r) in enumerate(zip(x, score, strict=True)):
            slope_a, slope_b = torch.autograd.functional.jacobian(kernel, (a, b))
            (_, mixed), _ = torch.autograd.functional.hessian(kernel, (a, b))
            result[i, j] = s @ r * kernel(a, b) + s @ slope_b + r @ slope_a + mixed.trace()
    return result


@pytest.mark.parametrize("h", [None, 0.7, 2.0])
def test_estimator_matches_a_double_loop(h: float | None) -> None:
    x, score = normal(2, 5, 3, seed=1), 2 * normal(2, 5, 3, seed=2)
    found = kernel_stein_discrepancy(x, score, scale=h)
    for n in range(2):
        median = torch.pdist(x[n]).sort().values[4]  # of 10 distances, the lower median
        u = by_definition(x[n], score[n], float(median) if h is None else h)
        expected = (u.sum() - u.trace()) / (5 * 4) / 3
        assert float(found[n]) == pytest.approx(float(expected), rel=1e-10)


def test_estimator_is_shift_invariant_and_accepts_one_scale_per_set() -> None:
    x, score = normal(3, 6, 2, 2, seed=1), normal(3, 6, 2, 2, seed=2)
    whole = kernel_stein_discrepancy(x, score)
    flat = kernel_stein_discrepancy(x.flatten(2), score.flatten(2))
    torch.testing.assert_close(whole, flat)
    torch.testing.assert_close(kernel_stein_discrepancy(x + 1e7, score), whole, rtol=1e-6, atol=0)
    lengths = torch.tensor([0.5, 1.0, 2.0])
    for k, length in enumerate(lengths.tolist()):
        alone = kernel_stein_discrepancy(x[k : k + 1], score[k : k + 1], scale=length)
        together = kernel_stein_discrepancy(x, score, scale=lengths)[k]
        torch.testing.assert_close(together, alone[0])


def test_discrepancy_does_not_grow_with_the_dimension() -> None:
    """The mean is shifted by 0.5 along every axis. The discrepancy is divided by d."""
    values = []
    for d in (4, 16, 64):
        x = normal(200, 16, d, seed=d) + 0.5
        values.append(float(kernel_stein_discrepancy(x, -x).mean()))
    assert max(values) < 1.25 * min(values)


def test_sets_without_a_scale_or_with_wrong_shapes_are_an_error() -> None:
    x = normal(2, 4, 3)
    same = x[:, :1].expand(-1, 4, -1)
    with pytest.raises(ValueError, match="are equal"):
        kernel_stein_discrepancy(same, same)
    assert bool(kernel_stein_discrepancy(same, same, scale=1.0).isfinite().all())
    for shapes in ((x, x[:1]), (x[0], x[0]), (x[:, :1], x[:, :1])):
        with pytest.raises(ValueError, match="both must have shape"):
            kernel_stein_discrepancy(*shapes)


# Score


@pytest.mark.parametrize("schedule", [VP(), VE()])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 1.0, 3.0])
def test_score_is_exact_for_a_noisy_image(schedule: torch.nn.Module, ratio: float) -> None:
    case = Case(whole=True)
    t = schedule.t_from_ratio(torch.tensor([ratio * SIGMA_Y, 0.5 * ratio * SIGMA_Y]))
    x_t = case.posterior().sample(2, torch.Generator().manual_seed(0)) + 0.1 * normal(2, D)
    exact = case.posterior().denoiser(schedule).score(x_t, t)
    found = posterior_score(case.prior.denoiser(schedule), x_t, t, case.observation(2))
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def noisy(case: Case, ratio: float, n: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    """x_t of exact samples, t, and the exact score of p(x_t | y)."""
    schedule = VP()
    t = schedule.t_from_ratio(ratio * SIGMA_Y)
    alpha_t, sigma_t = schedule(t)
    x_0 = case.posterior().sample(n, torch.Generator().manual_seed(0))
    x_t = alpha_t * x_0 + sigma_t * normal(n, D, seed=9)
    return x_t, t, case.posterior().denoiser(schedule).score(x_t, t)


def relative(error: Tensor, exact: Tensor) -> float:
    return float(error.square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_score_error_for_a_linear_observation_is_second_order(ratio: float) -> None:
    """The error of the likelihood score is O(r_t² / σ_y²).

    A simpler form is much less accurate.
    """
    case = Case(whole=False)
    x_t, t, exact = noisy(case, ratio)
    prior = case.prior.denoiser(VP())
    found = posterior_score(prior, x_t, t, case.observation(len(x_t)))
    error = relative(found - exact, exact)
    likelihood = relative(found - exact, exact - prior.score(x_t, t))
    assert error < 0.4 * ratio**2 and likelihood < ratio**2
    alpha_t, _ = VP()(t)
    plain = (case.y - x_t / alpha_t @ case.matrix.T) @ case.matrix / SIGMA_Y**2 / alpha_t
    assert relative(prior.score(x_t, t) + plain - exact, exact) > 5 * error


class Nonlinear(Operator):
    """The elementwise operator A(x) = x³."""

    def forward(self, x: Tensor) -> Tensor:
        return x**3

    def to_image(self, y: Tensor) -> Tensor:
        return y


def test_score_at_low_noise_matches_the_exact_score() -> None:
    """The observation is nonlinear, or has a different σ_y for each element of y."""
    prior = Gaussian(torch.zeros(D).double(), 0.5 * EYE)
    t = VP().t_from_ratio(1e-4)
    x_t, y = normal(20, D, seed=1), normal(20, D, seed=2)
    sigma_y = torch.linspace(0.2, 0.8, D, dtype=torch.float64)
    denoiser = prior.denoiser(VP())
    cubic = posterior_score(denoiser, x_t, t, Observation(y, SIGMA_Y, Nonlinear()))
    expected = -x_t / 0.5 + 3 * x_t**2 * (y - x_t**3) / SIGMA_Y**2
    torch.testing.assert_close(cubic, expected, rtol=1e-4, atol=1e-4)
    for operator in (Identity(), Matrix(EYE)):
        found = posterior_score(denoiser, x_t, t, Observation(y, sigma_y, operator))
        torch.testing.assert_close(
            found, -x_t / 0.5 + (y - x_t) / sigma_y**2, rtol=1e-4, atol=1e-4
        )


def test_score_is_independent_per_row_and_requires_no_grad() -> None:
    for whole in (True, False):
        case = Case(whole)
        denoiser, x_t = case.prior.denoiser(VP()), normal(4, D)
        denoiser.mixture.means.requires_grad_()  # like the parameters of a network
        t = torch.tensor([0.01, 0.02, 0.05, 0.1], dtype=torch.float64)
        found = posterior_score(denoiser, x_t, t, case.observation(4))
        assert not found.requires_grad and not x_t.requires_grad
        for k in range(4):
            alone = posterior_score(denoiser, x_t[k : k + 1], t[k], case.observation(1))
            torch.testing.assert_close(found[k : k + 1], alone)


def test_observation_without_noise_is_an_error() -> None:
    case = Case(whole=True)
    observation = Observation(case.y[None], 0.0)
    with pytest.raises(ValueError, match="needs sigma_y above 0"):
        posterior_score(case.prior.denoiser(VP()), normal(1, D), torch.tensor(0.1), observation)


# Discrepancies of samples


@pytest.mark.parametrize("whole", [True, False])
def test_discrepancy_of_exact_samples_has_zero_mean(whole: bool) -> None:
    """The mean is over 300 sets of 16; samples for σ_y times ½ or 2 have a positive mean."""
    case = Case(whole)
    x = case.posterior().sample(300 * 16, torch.Generator().manual_seed(6))
    found = case.discrepancy(x, group=16)
    error = float(found.std()) / 300**0.5
    assert abs(float(found.mean())) < 3.5 * error
    for factor in (0.5, 2.0):
        wrong = case.posterior(factor).sample(300 * 16, torch.Generator().manual_seed(6))
        assert float(case.discrepancy(wrong, group=16).mean()) > 5 * error


@pytest.mark.parametrize("whole", [True, False])
def test_discrepancy_ranks_samples_like_the_sliced_wasserstein_distance(whole: bool) -> None:
    """For each kind of error, the ranking is that of the distance to exact samples."""
    case, n = Case(whole), 512
    posterior = case.posterior()

    def draw(seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """Samples in which each component is scaled, and shifted by standard deviations."""
        x = posterior.sample(n, torch.Generator().manual_seed(seed))
        z, k = posterior.whitened(x)
        direction = torch.nn.functional.normalize(normal(D, seed=7), dim=0)
        z = scale * z + shift * direction
        axes, deviations = posterior.axes[k], posterior.eigenvalues[k].sqrt()
        return posterior.means[k] + torch.einsum("nij,nj->ni", axes, deviations * z)

    def other(seed: int, factor: float) -> Tensor:
        return case.posterior(factor).sample(n, torch.Generator().manual_seed(seed))

    exact = draw(10)
    kinds = {
        "narrow": [draw(10, scale=s) for s in (0.8, 0.65, 0.5, 0.3)],
        "wide": [draw(10, scale=s) for s in (1.25, 1.5, 2.0, 3.0)],
        "shift": [draw(10, shift=b) for b in (0.4, 0.7, 1.0, 1.5)],
        "σ_y too small": [other(10, f) for f in (0.7, 0.5, 0.35, 0.25)],
        "σ_y too large": [other(10, f) for f in (1.5, 2.0, 3.0, 4.0)],
    }
    reference = posterior.sample(4 * n, torch.Generator().manual_seed(11)).split(n)
    best = float(case.discrepancy(exact))
    for kind, sets in kinds.items():
        grades = [best, *(float(case.discrepancy(x)) for x in sets)]
        distances = [
            float(torch.stack([sliced_wasserstein(x, part, 64) for part in reference]).mean())
            for x in (exact, *sets)
        ]
        correlation = spearmanr(grades, distances).statistic
        assert correlation > 0.99, (kind, grades, distances)


def test_wrong_weights_of_separate_modes_need_a_large_noise_level() -> None:
    """At a larger t the modes overlap, and the discrepancy detects wrong weights."""
    shares = torch.tensor([0.9, 0.1], dtype=torch.float64)
    means = torch.stack([0.5 * torch.ones(D), -0.5 * torch.ones(D)]).double()
    covariances = (0.05**2 * EYE).expand(2, D, D)
    case = Case(whole=True, prior=GaussianMixture(shares, means, covariances))
    case.y = torch.zeros(D, dtype=torch.float64)  # y does not depend on the mode
    torch.testing.assert_close(case.posterior().weights, shares)
    equal = GaussianMixture(shares.new_full((2,), 0.5), case.posterior().means,
                            case.posterior().covariances)  # fmt: skip
    sets, n = 40, 64
    found = {}
    for name, source in (("exact", case.posterior()), ("equal", equal)):
        x = source.sample(sets * n, torch.Generator().manual_seed(1))
        for ratio in (0.1, 1.0, 3.0):
            found[name, ratio] = case.discrepancy(x, ratio, group=n)
    for ratio, seen in ((0.1, False), (1.0, False), (3.0, True)):
        error = float(found["exact", ratio].std()) / sets**0.5
        assert (float(found["equal", ratio].mean()) > 10 * error) == seen


@pytest.mark.parametrize("each", [False, True])
def test_discrepancy_does_not_depend_on_batch_size(each: bool) -> None:
    """The batches do not align with the sets; σ_y is one value or one per row."""
    case, schedule, t = Case(whole=False), VP(), torch.tensor(0.1)
    sigma_y = SIGMA_Y * (1 + torch.rand(8, 1, dtype=torch.float64)) if each else SIGMA_Y
    observation = Observation(case.y.expand(8, -1), sigma_y, case.operator, group=4)
    whole, parts = (
        stein_discrepancy(
            case.prior.denoiser(schedule), normal(8, D), t, observation,
            generator=torch.Generator().manual_seed(0), batch_size=size,
        ) for size in (None, 3)
    )  # fmt: skip
    torch.testing.assert_close(parts, whole)


def test_discrepancy_is_computed_per_group() -> None:
    """Two observations with four samples each are computed together and separately."""
    prior, schedule = mixture(), VP()
    denoiser, t = prior.denoiser(schedule), schedule.t_from_ratio(0.3 * SIGMA_Y)
    x, y = normal(8, D, seed=1), normal(2, D, seed=2).repeat_interleave(4, 0)
    index = torch.arange(8)

    def of(rows: slice) -> Tensor:
        return stein_discrepancy(
            denoiser, x[rows], t, Observation(y[rows], SIGMA_Y, group=4),
            generator=KeyedGenerator(make_key(0, index[rows])),
        )  # fmt: skip

    together = of(slice(0, 8))
    torch.testing.assert_close(together, torch.cat([of(slice(0, 4)), of(slice(4, 8))]))
    assert abs(float(together[0] - together[1])) > 1e-3
    # The discrepancy is also computed from its parts: noise, score, estimator.
    alpha_t, sigma_t = schedule(t)
    z = KeyedGenerator(make_key(0, index)).normal(D, dtype=torch.float64)
    x_t = alpha_t * x + sigma_t * z
    score = posterior_score(denoiser, x_t, t, Observation(y, SIGMA_Y))
    parts = kernel_stein_discrepancy(x_t.reshape(2, 4, D), score.reshape(2, 4, D))
    torch.testing.assert_close(together, parts)
