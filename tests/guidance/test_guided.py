"""Guided methods against closed forms, their likelihood densities and published algorithms."""

from itertools import pairwise

import pytest
import torch
from gaussian import BasisNoise, moments
from torch import Tensor, nn

from diffusion_lab.analytic import Gaussian, GaussianMixture
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance import (
    DMPS,
    DPS,
    JFPS,
    MMPS,
    SDA,
    TMPD,
    Guidance,
    Guided,
    Observation,
    PiGDM,
    PrecisionWeighted,
)
from diffusion_lab.leaderboard import PROBLEMS, Method, grade
from diffusion_lab.operator import BoxInpainting, Identity, Matrix, Operator
from diffusion_lab.rng import KeyedGenerator, make_key
from diffusion_lab.sampler import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    ProbabilityFlow,
    Sampler,
    State,
    UniPC,
)
from diffusion_lab.sampler.time_grid import LogSNR, Uniform
from diffusion_lab.schedule import VE, VP, Cosine, Linear, Schedule

D, SEEN, B, SIGMA_Y = 5, 3, 4, 0.3
SCHEDULES = {"vp": VP(), "ve": VE(), "cosine": Cosine()}
RATIOS = [0.02, 0.2, 0.7, 3.0, 40.0]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
every_ratio = pytest.mark.parametrize("ratio", RATIOS)
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def covariance(count: int) -> Tensor:
    axes, _ = torch.linalg.qr(normal(count, D, D))
    return axes @ torch.diag(torch.logspace(-1.5, 0, D, dtype=torch.float64)) @ axes.mT


MEAN, COVARIANCE = normal(D) / 2, covariance(1)[0]
GAUSSIAN = Gaussian(MEAN, COVARIANCE)
MIXTURE = GaussianMixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), normal(3, D), covariance(3)
)
A = normal(SEEN, D) / 2
OPERATOR = Matrix(A)
Y = GAUSSIAN.sample(B, GENERATOR) @ A.T + SIGMA_Y * normal(B, SEEN)
Y_IMAGE = MIXTURE.sample(B, GENERATOR) + SIGMA_Y * normal(B, D)


class Saturated(Operator):
    """A nonlinear operator: tanh of the matrix product."""

    def __init__(self) -> None:
        super().__init__((D,))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ A.T)

    def to_image(self, y: Tensor) -> Tensor:
        return y


METHODS = {
    "fused": (PrecisionWeighted(), Identity(), Y_IMAGE),
    "dmps": (DMPS(), OPERATOR, Y),
    "pigdm": (PiGDM(0.7), OPERATOR, Y),
    "sda": (SDA(0.1), OPERATOR, Y),
    "sda nonlinear": (SDA(0.1), Saturated(), Y),
    "sda detached": (SDA(1.0, detach=True), Saturated(), Y),
    "tmpd": (TMPD(), OPERATOR, Y),
    "mmps": (MMPS(2), OPERATOR, Y),
    "jfps": (JFPS(0.7), OPERATOR, Y),
    "jfps full": (JFPS(covariance=COVARIANCE), OPERATOR, Y),
}
every_method = pytest.mark.parametrize(
    ("guidance", "operator", "y"), METHODS.values(), ids=METHODS.keys()
)


def noisy(prior: GaussianMixture, schedule: Schedule, ratio: float) -> tuple[Tensor, Tensor]:
    """x_t and t at a given ratio σ_t / α_t, with the same x_t / α_t under all schedules."""
    generator = torch.Generator().manual_seed(5)
    x_0 = prior.sample(B, generator)
    noise = torch.randn(B, D, generator=generator, dtype=torch.float64)
    t = schedule.t_from_ratio(ratio)
    return schedule(t)[0] * (x_0 + ratio * noise), t


def estimate(
    guidance: Guided, prior: GaussianMixture, schedule: Schedule, ratio: float,
    operator: Operator = OPERATOR, y: Tensor = Y, sigma_y: float = SIGMA_Y,
) -> Tensor:  # fmt: skip
    """The method's estimate of E[x_0 | x_t, y] at the points of `noisy`."""
    observation = Observation(y, sigma_y, operator)
    guidance.check(observation)
    posterior = guidance.denoiser(prior.denoiser(schedule), observation)
    return posterior(*noisy(prior, schedule, ratio))


def exact(
    prior: GaussianMixture, schedule: Schedule, ratio: float, matrix: Tensor = A, y: Tensor = Y,
    sigma_y: float = SIGMA_Y,
) -> Tensor:  # fmt: skip
    """E[x_0 | x_t, y] in closed form at the same points."""
    x_t, t = noisy(prior, schedule, ratio)
    rows = [
        prior.conditional_denoiser(schedule, y[k], matrix, sigma_y)(x_t[k : k + 1], t)
        for k in range(B)
    ]
    return torch.cat(rows)


def log_normal(e: Tensor, covariance: Tensor) -> Tensor:
    """log N(e; 0, covariance) of each row, up to a constant that is independent of e."""
    return -(e * torch.linalg.solve(covariance, e[..., None])[..., 0]).sum(1) / 2


def by_autograd(prior: GaussianMixture, schedule: Schedule, ratio: float, log_density) -> Tensor:
    """x̂ + σ_t² / α_t ∇ log p(y | x_t) for a density given as a function of x_t, α_t and x̂."""
    x_t, t = noisy(prior, schedule, ratio)
    x_t.requires_grad_()
    alpha_t, sigma_t = schedule(t)
    denoised = prior.denoiser(schedule)(x_t, t)
    total = log_density(x_t, alpha_t, denoised).sum()
    (score,) = torch.autograd.grad(total, x_t)
    return (denoised + sigma_t**2 / alpha_t * score).detach()


def posterior_covariance(prior: GaussianMixture, schedule: Schedule, ratio: float) -> Tensor:
    x_t, t = noisy(prior, schedule, ratio)
    return prior.covariance_t(x_t, *schedule(t))


IDENTITY = torch.eye(SEEN, dtype=torch.float64)


# --- exact cases ---------------------------------------------------------------------------------


@every_schedule
@every_ratio
def test_fused_is_exact_for_a_mixture(schedule: Schedule, ratio: float) -> None:
    matrix = torch.eye(D, dtype=torch.float64)
    for sigma_y in (0.3, 2.0, 1e-3):  # the last sigma_y needs levels below the schedule's t_min
        actual = estimate(
            PrecisionWeighted(), MIXTURE, schedule, ratio, Identity(), Y_IMAGE, sigma_y
        )
        expected = exact(MIXTURE, schedule, ratio, matrix, Y_IMAGE, sigma_y)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_fused_uses_the_combined_level_below_the_smallest_level() -> None:
    asked = []

    class Asked(Denoiser):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            asked.append(self.schedule.ratio(t))
            return x_t

    schedule = Linear()
    smallest = float(schedule.ratio(schedule.t_min))
    posterior = PrecisionWeighted().denoiser(Asked(schedule), Observation(Y_IMAGE, smallest))
    posterior(Y_IMAGE, torch.tensor(schedule.t_min, dtype=torch.float64))
    assert float(asked[0]) == pytest.approx(smallest / 2**0.5, rel=1e-9)


@every_schedule
@every_ratio
@pytest.mark.parametrize("sigma_y", [SIGMA_Y, 0.0])
@pytest.mark.parametrize(
    "guidance",
    [MMPS(SEEN), MMPS(3 * SEEN), JFPS(covariance=COVARIANCE)],
    ids=["mmps", "mmps longer", "jfps"],
)
def test_moment_matching_is_exact_for_a_gaussian(
    guidance: Guided, sigma_y: float, schedule: Schedule, ratio: float
) -> None:
    y = Y if sigma_y else exact_observation()
    actual = estimate(guidance, GAUSSIAN, schedule, ratio, y=y, sigma_y=sigma_y)
    expected = exact(GAUSSIAN, schedule, ratio, y=y, sigma_y=sigma_y)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def exact_observation() -> Tensor:
    return GAUSSIAN.sample(B, torch.Generator().manual_seed(1)) @ A.T


@every_schedule
@every_ratio
@pytest.mark.parametrize("sigma_y", [SIGMA_Y, 0.0])
@pytest.mark.parametrize("s", [0.5, 1.0])
def test_pigdm_and_jfps_are_exact_for_an_isotropic_gaussian(
    s: float, sigma_y: float, schedule: Schedule, ratio: float
) -> None:
    prior = Gaussian(MEAN, s**2 * torch.eye(D, dtype=torch.float64))
    y = Y if sigma_y else exact_observation()
    expected = exact(prior, schedule, ratio, y=y, sigma_y=sigma_y)
    for guidance in (PiGDM(s), JFPS(s)):
        actual = estimate(guidance, prior, schedule, ratio, y=y, sigma_y=sigma_y)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@every_ratio
def test_jfps_accepts_one_variance_per_component(ratio: float) -> None:
    variances = torch.logspace(-1, 0.5, D, dtype=torch.float64)
    prior = Gaussian(MEAN, variances.diag())
    for given in (variances, variances.diag()):
        actual = estimate(JFPS(covariance=given), prior, VP(), ratio)
        torch.testing.assert_close(actual, exact(prior, VP(), ratio), rtol=1e-8, atol=1e-8)


@every_ratio
def test_tmpd_is_exact_for_independent_components_and_a_mask(ratio: float) -> None:
    """Then A V Aᵀ is diagonal, and its row sums equal its diagonal."""
    prior = Gaussian(MEAN, torch.linspace(0.5, 2, D, dtype=torch.float64).diag())
    mask = torch.eye(D, dtype=torch.float64)[[0, 2, 3]]
    actual = estimate(TMPD(), prior, VP(), ratio, Matrix(mask))
    torch.testing.assert_close(actual, exact(prior, VP(), ratio, mask), rtol=1e-9, atol=1e-9)


def test_methods_with_a_flat_prior_are_exact_at_low_noise() -> None:
    """If r_t and σ_y are small relative to the standard deviation of the prior, V is r_t² I."""
    ratio = sigma_y = 1e-3
    y = exact_observation()
    expected = exact(GAUSSIAN, VP(), ratio, y=y, sigma_y=sigma_y)
    for guidance in (DMPS(), PiGDM(), MMPS(3), JFPS()):
        actual = estimate(guidance, GAUSSIAN, VP(), ratio, y=y, sigma_y=sigma_y)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


# --- likelihood densities ------------------------------------------------------------------------


@every_schedule
@every_ratio
@pytest.mark.parametrize("strength", [1.0, 1.75])
def test_dmps_matches_the_score_of_its_density(
    strength: float, schedule: Schedule, ratio: float
) -> None:
    def log_density(x_t: Tensor, alpha_t: Tensor, denoised: Tensor) -> Tensor:
        inner = SIGMA_Y**2 * IDENTITY + ratio**2 * A @ A.T
        return strength * log_normal(Y - x_t / alpha_t @ A.T, inner)

    expected = by_autograd(MIXTURE, schedule, ratio, log_density)
    actual = estimate(DMPS(strength), MIXTURE, schedule, ratio)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@every_schedule
@every_ratio
def test_pigdm_matches_the_score_of_its_density(schedule: Schedule, ratio: float) -> None:
    s = 0.7
    variance = ratio**2 * s**2 / (ratio**2 + s**2)

    def log_density(x_t: Tensor, alpha_t: Tensor, denoised: Tensor) -> Tensor:
        return log_normal(Y - denoised @ A.T, SIGMA_Y**2 * IDENTITY + variance * A @ A.T)

    expected = by_autograd(MIXTURE, schedule, ratio, log_density)
    torch.testing.assert_close(
        estimate(PiGDM(s), MIXTURE, schedule, ratio), expected, rtol=1e-8, atol=1e-8
    )


@every_schedule
@every_ratio
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("operator", [OPERATOR, Saturated()], ids=["linear", "nonlinear"])
@pytest.mark.parametrize("uneven", [False, True])
def test_sda_matches_the_score_of_its_density(
    uneven: bool, operator: Operator, detach: bool, schedule: Schedule, ratio: float
) -> None:
    """With detach, x̂ = (x_t - σ_t ε̂) / α_t with ε̂ constant.

    σ_y may differ between elements of y.
    """
    sigma_y = torch.linspace(0.1, 0.5, SEEN).double() if uneven else SIGMA_Y
    sigma_t = schedule(schedule.t_from_ratio(ratio))[1]

    def log_density(x_t: Tensor, alpha_t: Tensor, denoised: Tensor) -> Tensor:
        if detach:
            epsilon = (x_t - alpha_t * denoised) / sigma_t
            denoised = (x_t - sigma_t * epsilon.detach()) / alpha_t
        e = Y - operator(denoised)
        return -(e**2 / (sigma_y**2 + 0.1 * ratio**2)).sum(1) / 2

    expected = by_autograd(MIXTURE, schedule, ratio, log_density)
    guidance = SDA(0.1, detach)
    actual = estimate(guidance, MIXTURE, schedule, ratio, operator, sigma_y=sigma_y)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


@every_ratio
def test_mmps_matches_the_score_of_its_density(ratio: float) -> None:
    """The exact covariance of the mixture is held constant.

    σ_y may differ between elements of y.
    """
    inner = A @ posterior_covariance(MIXTURE, VP(), ratio) @ A.T
    for sigma_y in (torch.tensor(SIGMA_Y), torch.linspace(0.1, 0.5, SEEN)):
        sigma_y = sigma_y.double()

        def log_density(x_t: Tensor, alpha_t: Tensor, denoised: Tensor, s: Tensor = sigma_y):
            return log_normal(Y - denoised @ A.T, (s**2).expand(SEEN).diag() + inner)

        expected = by_autograd(MIXTURE, VP(), ratio, log_density)
        actual = estimate(MMPS(SEEN), MIXTURE, VP(), ratio, sigma_y=sigma_y)
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


@every_ratio
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_tmpd_matches_the_score_of_its_density(floor: float, ratio: float) -> None:
    """The variances are the row sums of the dense A V Aᵀ, or the floor if they are smaller.

    The second matrix has rows of opposite sign, so that some row sums are negative.
    """
    v = posterior_covariance(MIXTURE, VP(), ratio)
    reached = 0
    for matrix in (A, torch.stack([A[0], -1.5 * A[0], A[1]])):
        sums = (matrix @ v @ matrix.T).sum(2)
        least = floor * ratio**2 / (1 + ratio**2) * float(matrix.square().sum()) / SEEN
        variance = SIGMA_Y**2 + sums.clamp(min=least)
        reached += int((sums < least).sum())

        def log_density(
            x_t: Tensor, alpha_t: Tensor, denoised: Tensor, a: Tensor = matrix,
            s: Tensor = variance,
        ) -> Tensor:  # fmt: skip
            return -((Y - denoised @ a.T) ** 2 / s).sum(1) / 2

        expected = by_autograd(MIXTURE, VP(), ratio, log_density)
        actual = estimate(TMPD(floor), MIXTURE, VP(), ratio, Matrix(matrix))
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    assert reached > 0


@every_ratio
def test_jfps_matches_its_formula(ratio: float) -> None:
    v = torch.linalg.inv(
        torch.linalg.inv(COVARIANCE) + torch.eye(D, dtype=torch.float64) / ratio**2
    )
    denoised = MIXTURE.denoiser(VP())(*noisy(MIXTURE, VP(), ratio))
    gain = v @ A.T @ torch.linalg.inv(SIGMA_Y**2 * IDENTITY + A @ v @ A.T)
    expected = denoised + (Y - denoised @ A.T) @ gain.T
    actual = estimate(JFPS(covariance=COVARIANCE), MIXTURE, VP(), ratio)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


# --- all methods ---------------------------------------------------------------------------------


@every_method
@every_ratio
def test_estimate_depends_on_the_schedule_only_through_the_ratio(
    guidance: Guided, operator: Operator, y: Tensor, ratio: float
) -> None:
    estimates = [estimate(guidance, MIXTURE, s, ratio, operator, y) for s in SCHEDULES.values()]
    for other in estimates[1:]:
        torch.testing.assert_close(other, estimates[0], rtol=1e-8, atol=1e-8)


@every_method
def test_guided_denoiser_accepts_one_time_per_row(
    guidance: Guided, operator: Operator, y: Tensor
) -> None:
    schedule, t = VP(), torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)
    x_t = torch.randn(B, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    prior = MIXTURE.denoiser(schedule)
    together = guidance.denoiser(prior, Observation(y, SIGMA_Y, operator))(x_t, t)
    for k in range(B):
        posterior = guidance.denoiser(prior, Observation(y[k : k + 1], SIGMA_Y, operator))
        alone = posterior(x_t[k : k + 1], t[k])
        torch.testing.assert_close(alone[0], together[k], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("guidance", "operator", "y"),
    [*METHODS.values(), (DPS(0.1), OPERATOR, Y), (DPS(0.1, None), Saturated(), Y)],
    ids=[*METHODS.keys(), "dps", "dps nonlinear"],
)
def test_samples_do_not_depend_on_the_batch(
    guidance: Guidance, operator: Operator, y: Tensor
) -> None:
    prior = MIXTURE.denoiser(VP())

    def run(chosen: list[int]) -> Tensor:
        generator = KeyedGenerator(make_key(1, torch.tensor(chosen)))
        observation = Observation(y[chosen], SIGMA_Y, operator)
        return guidance(prior, EulerMaruyama(16), observation, generator=generator)

    whole = run([0, 1, 2, 3])
    torch.testing.assert_close(run([3, 1]), whole[[3, 1]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run([2]), whole[[2]], rtol=1e-12, atol=1e-12)


class Learned(Denoiser):
    """A fake float32 network whose parameters require gradients."""

    def __init__(self, schedule: Schedule, size: int) -> None:
        super().__init__(schedule)
        torch.manual_seed(0)
        self.linear = nn.Linear(size, size)
        self.calls = self.with_graph = 0

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        self.with_graph += torch.is_grad_enabled()
        return torch.tanh(self.linear(x_t.flatten(1))).reshape(x_t.shape)


IMAGES = [
    PrecisionWeighted(), DMPS(), PiGDM(), SDA(1.0), SDA(1.0, detach=True), TMPD(), MMPS(2), JFPS(),
    JFPS(covariance=torch.rand(3, 6, 6, generator=GENERATOR) + 0.1), DPS(0.1),
]  # fmt: skip


@pytest.mark.parametrize("guidance", IMAGES, ids=lambda g: type(g).__name__)
def test_float32_images_require_no_grad(guidance: Guidance) -> None:
    """The parameters and y require gradients; the operator is a mask that drops pixels."""
    operator = Identity() if isinstance(guidance, PrecisionWeighted) else BoxInpainting((3, 6, 6))
    x_0 = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)) - 0.5
    y = operator(x_0).detach().requires_grad_()
    denoiser = Learned(VP(), 108)
    for sigma_y in (0.1, torch.tensor(0.1)):
        observation = Observation(y, sigma_y, operator)
        result = guidance(denoiser, EulerMaruyama(6, clip=True), observation)
        assert result.shape == (2, 3, 6, 6) and result.dtype == torch.float32
        assert bool(result.isfinite().all()) and not result.requires_grad
    assert denoiser.linear.weight.grad is None
    backward = {PiGDM, SDA, TMPD, MMPS, DPS}
    needs = type(guidance) in backward and not getattr(guidance, "detach", False)
    assert denoiser.calls == 12 and denoiser.with_graph == (12 if needs else 0)


@pytest.mark.parametrize("guidance", [DMPS(), PiGDM(), MMPS(2), JFPS(), DPS()])
def test_noise_free_observations_are_satisfied(guidance: Guidance) -> None:
    """The operator is a mask; the tolerance is the noise of the last level.

    The steps of DPS are proportional to t - s, and too small on a grid of many late times.
    """
    operator = BoxInpainting((1, 4, 4))
    prior = Gaussian(
        torch.zeros(16).double(), 0.2 * torch.eye(16, dtype=torch.float64), shape=(1, 4, 4)
    )
    y = operator(prior.sample(3, torch.Generator().manual_seed(2)))
    grid = Uniform() if isinstance(guidance, DPS) else LogSNR()
    result = guidance(
        prior.denoiser(VP()), EulerMaruyama(64, grid=grid), Observation(y, 0.0, operator)
    )
    assert float((operator(result) - y).abs().max()) < 0.05


# --- samples -------------------------------------------------------------------------------------


def linear_moments(
    guidance: Guidance, sampler: Sampler, draws: int, sigma_y: float = SIGMA_Y
) -> tuple[float, float]:
    """Exact errors of the samples' mean (in deviations) and covariance, for the first y."""
    noise = BasisNoise(draws, D)
    observation = Observation(Y[:1].repeat(noise.rows, 1), sigma_y, OPERATOR)
    output = guidance(GAUSSIAN.denoiser(VP()), sampler, observation, generator=noise)
    mean, spread = moments(output)
    posterior = GAUSSIAN.posterior(Y[0], A, sigma_y)
    exact_mean, exact_spread = posterior.means[0], posterior.covariances[0]
    shift = torch.linalg.solve(torch.linalg.cholesky(exact_spread), mean - exact_mean)
    return float(shift.norm()), float((spread - exact_spread).norm() / exact_spread.norm())


class Control(Guided):
    """The exact E[x_0 | x_t, y] in closed form."""

    def denoiser(self, denoiser: Denoiser, observation: Observation) -> Denoiser:
        return GAUSSIAN.conditional_denoiser(denoiser.schedule, Y[0], A, observation.sigma_y)


@pytest.mark.parametrize("guidance", [MMPS(SEEN), JFPS(covariance=COVARIANCE)])
def test_moment_matching_samples_match_those_of_the_exact_denoiser(guidance: Guided) -> None:
    sampler = EulerMaruyama(64)
    control = linear_moments(Control(), sampler, 65)
    assert control[0] < 0.1 and control[1] < 0.1
    assert linear_moments(guidance, sampler, 65) == pytest.approx(control, rel=1e-6)


def test_langevin_corrections_reduce_the_error_of_sda() -> None:
    """The score of SDA is exact at zero noise, where Langevin steps converge from any state."""

    def run(sampler: Sampler, draws: int) -> tuple[float, float]:
        return linear_moments(SDA(0.1), sampler, draws)

    def corrected(count: int) -> Sampler:
        return PredictorCorrector(32, langevin_steps=count, snr=0.25, grid=LogSNR())

    plain = run(EulerMaruyama(32, grid=LogSNR()), 33)
    few, many = run(corrected(4), 1 + 32 * 5), run(corrected(16), 1 + 32 * 17)
    assert few[0] < 0.6 * plain[0] and many[0] < 0.6 * few[0]
    assert many[1] < few[1] < plain[1]


@pytest.mark.parametrize("sampler", [EulerMaruyama(64), DDIM(64), Heun(32), Ancestral(64)])
def test_guided_methods_work_with_every_kind_of_sampler(sampler: Sampler) -> None:
    """The output is affine in the noise, so its mean is computed exactly."""
    shift, _ = linear_moments(MMPS(SEEN), sampler, 65)
    assert shift < 0.15


def test_dmps_clips_only_the_estimate_of_the_prior() -> None:
    """The estimate of DMPS has the scale of x_t / α_t.

    Clipping it would remove y at high noise.
    """
    states: list[State] = []
    sampler = Ancestral(20, clip=True)
    prior = Gaussian(3 * MEAN, COVARIANCE).denoiser(VP())
    DMPS()(prior, sampler, Observation(Y, SIGMA_Y, OPERATOR), callback=states.append)
    assert float(states[0].denoised.abs().max()) > 5 and sampler.clip
    posterior = DMPS().denoiser(prior, Observation(Y, SIGMA_Y, OPERATOR))
    t = torch.tensor(states[3].t, dtype=torch.float64)
    unclipped = prior(states[3].x_t, t)
    expected = posterior(states[3].x_t, t) - unclipped + unclipped.clamp(-1, 1)
    torch.testing.assert_close(states[3].denoised, expected, rtol=1e-9, atol=1e-9)
    assert float((unclipped.abs() > 1).sum()) > 0


# --- DPS -----------------------------------------------------------------------------------------

STEPS = 12
SHORT = Linear(beta_max=0.4, steps=STEPS)


def written_rule(size: float | None, operator: Operator, clip: bool, zeta: float = 0.05) -> Tensor:
    """The published rule row by row, with an explicit step of `Ancestral`.

    The step size is ζ if `size` is None, and otherwise ζ N (t - s) up to a limit of at least ζ.
    """
    draws = KeyedGenerator(make_key(0, torch.arange(B)))
    x, prior, alpha_bar = draws.normal(D, dtype=torch.float64), MIXTURE.denoiser(SHORT), [1.0]
    for beta in torch.linspace(1e-4, 0.4, STEPS, dtype=torch.float64).tolist():
        alpha_bar.append(alpha_bar[-1] * (1 - beta))
    for i in reversed(range(STEPS)):
        z, rows = draws.normal(D, dtype=torch.float64), []
        last, now = alpha_bar[i], alpha_bar[i + 1]
        beta = 1 - now / last
        for k in range(B):
            x_t = x[k : k + 1].clone().requires_grad_()
            x_0 = prior(x_t, torch.tensor((i + 1) / STEPS, dtype=torch.float64))
            x_0 = x_0.clamp(-1, 1) if clip else x_0
            distance = (Y[k : k + 1] - operator(x_0)).norm()
            (slope,) = torch.autograd.grad(distance, x_t)
            mean = (last**0.5 * beta * x_0 + (1 - beta) ** 0.5 * (1 - last) * x_t) / (1 - now)
            x_s = mean + (beta * (1 - last) / (1 - now)) ** 0.5 * z[k] * (i > 0)
            step = zeta
            if size is not None:
                limit = float((distance / slope.norm() ** 2).detach())
                step = min(zeta * size / STEPS, max(zeta, limit))
            rows.append((x_s - step * slope).detach())
        x = torch.cat(rows)
    return x


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("operator", [OPERATOR, Saturated()], ids=["linear", "nonlinear"])
@pytest.mark.parametrize("reference", [None, STEPS, 4 * STEPS, 100 * STEPS])
def test_dps_matches_its_published_rule(
    reference: int | None, operator: Operator, clip: bool
) -> None:
    """The step size is per sample, as published or scaled by N; the last N reaches the limit."""
    actual = DPS(0.05, reference)(
        MIXTURE.denoiser(SHORT),
        Ancestral(STEPS, clip=clip),
        Observation(Y, SIGMA_Y, operator),
        generator=KeyedGenerator(make_key(0, torch.arange(B))),
    )
    expected = written_rule(reference, operator, clip)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    unguided = written_rule(None, operator, clip, 0.0)
    assert float((expected - unguided).abs().max()) > 1e-3


@pytest.mark.parametrize("zeta", [0.01, 0.3])
def test_dps_with_reference_steps_equal_to_steps_matches_the_paper(zeta: float) -> None:
    """Also where the steps of the paper overshoot."""
    observation = Observation(Y, SIGMA_Y, OPERATOR)
    results = [
        DPS(zeta, reference)(
            MIXTURE.denoiser(SHORT), Ancestral(STEPS), observation,
            generator=KeyedGenerator(make_key(0, torch.arange(B))),
        )
        for reference in (None, STEPS)
    ]  # fmt: skip
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_dps_residual_is_similar_for_any_number_of_steps() -> None:
    """|y - A x_0| of 40 samples is divided by its value for noise; without guidance it is 8."""
    prior, y, count = MIXTURE.denoiser(VP()), Y.repeat(10, 1), 10 * B

    def distance(steps: int, reference: int | None) -> float:
        generator = KeyedGenerator(make_key(3, torch.arange(count)))
        observation = Observation(y, SIGMA_Y, OPERATOR)
        x_0 = DPS(0.03, reference)(prior, Ancestral(steps), observation, generator=generator)
        return float((y - x_0 @ A.T).norm() / (SIGMA_Y * (count * SEEN) ** 0.5))

    for steps in (25, 100, 400):
        assert 0.1 < distance(steps, 1000) < 0.6
    assert distance(25, None) > 5 and distance(100, None) > 4


def test_dps_with_few_steps_keeps_the_spread_of_the_observed_part() -> None:
    """With a limit on all steps, the central 90% interval had 63% of the truths."""
    method = Method("dps", lambda _: DPS(), Ancestral(100), Linear())
    sizes = {"n_y": 1, "n": 8, "n_coverage": 32, "n_ranks": 19, "seed": 0}
    assert 0.75 < grade(PROBLEMS["gaussian_mask"](), method, **sizes)["coverage"] < 0.95


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [(Ancestral(5), 5), (PredictorCorrector(5, langevin_steps=2), 5 + 4 * 2), (Heun(5), 9),
     (ProbabilityFlow(5, adaptive=False), None)],
    ids=["ancestral", "predictor_corrector", "heun", "probability_flow"],
)  # fmt: skip
def test_dps_adds_no_network_calls_and_one_graph_per_step(
    sampler: Sampler, calls: int | None
) -> None:
    denoiser = Learned(VP(), D)
    DPS(0.1)(denoiser, sampler, Observation(Y.float(), SIGMA_Y, OPERATOR))
    assert denoiser.with_graph == 5
    assert calls is None or denoiser.calls == calls


def test_dps_with_an_incompatible_solver_is_an_error() -> None:
    observation = Observation(Y, SIGMA_Y, OPERATOR)
    for sampler in (UniPC(5), ProbabilityFlow()):
        with pytest.raises(ValueError, match=r"overwrites .* choose another sampler: ancestral"):
            DPS()(MIXTURE.denoiser(VP()), sampler, observation)


def test_dps_handles_zero_distance_and_zero_gradient() -> None:
    """If the distance or the gradient is zero, the step is that of the sampler, without NaN."""

    class Nothing(Saturated):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x

    def run(guidance: Guidance, y: Tensor) -> Tensor:
        generator = KeyedGenerator(make_key(0, torch.arange(B)))
        observation = Observation(y, 0.0, Nothing())
        return guidance(MIXTURE.denoiser(VP()), Ancestral(6), observation, generator=generator)

    plain = run(DPS(0.0), torch.zeros(B, D, dtype=torch.float64))
    for y in (torch.zeros_like(plain), torch.ones_like(plain)):
        for reference in (None, 1000):
            assert torch.equal(run(DPS(1.0, reference), y), plain)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: DMPS(-1.0), "data_weight=-1.0 .*>= 0"),
        (lambda: DPS(float("nan")), "step_size=nan .*>= 0"),
        (lambda: DPS(0.3, 0), "reference_steps=0 .*null or an integer >= 1"),
        (lambda: PiGDM(0.0), "data_std=0.0 .*> 0"),
        (lambda: SDA(0.0), "gamma=0.0 .*> 0"),
        (lambda: TMPD(1.5), r"floor=1.5 .*\[0, 1\]"),
        (lambda: MMPS(0), "iterations=0 .*>= 1"),
        (lambda: JFPS(-0.5), "data_std=-0.5"),
        (lambda: JFPS(iterations=0), "iterations=0"),
    ],
)
def test_invalid_settings_are_an_error(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_unsupported_operators_and_noise_are_an_error() -> None:
    nonlinear = Observation(Y, SIGMA_Y, Saturated())
    for guidance in (DMPS(), PiGDM(), TMPD(), MMPS(), JFPS()):
        with pytest.raises(ValueError, match=r"not linear; choose another guidance"):
            guidance.check(nonlinear)
    for guidance in (SDA(), DPS()):
        guidance.check(nonlinear)
    with pytest.raises(ValueError, match=r"PrecisionWeighted is for a noisy image"):
        PrecisionWeighted().check(Observation(Y, SIGMA_Y, OPERATOR))
    uneven = Observation(Y, torch.linspace(0.1, 0.5, SEEN), OPERATOR)
    for guidance in (DMPS(), PiGDM(), JFPS()):
        with pytest.raises(ValueError, match=r"one standard deviation; choose another guidance"):
            guidance.check(uneven)
    for guidance in (SDA(), TMPD(), MMPS(), DPS()):
        guidance.check(uneven)
    for guidance in (SDA(), TMPD()):
        with pytest.raises(ValueError, match="sigma_y=0"):
            guidance.check(Observation(Y, 0.0, OPERATOR))
    with pytest.raises(ValueError, match="sigma_y=0"):
        PrecisionWeighted().check(Observation(Y_IMAGE, 0.0))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (torch.ones(D + 1), r"of shape \(6,\); .*\(5,\) or \(5, 5\)"),
        (torch.ones(2, D), r"of shape \(2, 5\)"),
        (-torch.eye(D), "positive semidefinite; its smallest eigenvalue is -1"),
        (torch.tensor([1.0, 1.0, -0.5, 1.0, 1.0]), "its smallest eigenvalue is -0.5"),
    ],
)
def test_jfps_with_an_invalid_covariance_is_an_error(wrong: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        JFPS(covariance=wrong).check(Observation(Y, SIGMA_Y, OPERATOR))


def test_dps_steps_add_up_to_the_whole_time_on_an_uneven_grid() -> None:
    """The factors ζ N (t - s) add up to ζ N."""
    sampler, states = Ancestral(7, grid=LogSNR()), []
    denoiser = MIXTURE.denoiser(VP())
    observation = Observation(Y, SIGMA_Y, OPERATOR)
    DPS(1e-9)(denoiser, sampler, observation, callback=states.append)
    total = sum(t.t - s.t for t, s in pairwise(states))
    assert total == pytest.approx(1)
