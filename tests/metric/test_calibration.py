"""Scores and ranks against brute force, closed forms, and samples that are exact or known to be
wrong.

The truths and the samples are independent draws of one distribution, or the samples are draws of
another one. Seeds are fixed; comments state the tolerance where a test depends on chance.
"""

import math

import pytest
import torch
from scipy.stats import chi2, norm
from torch import Tensor

from diffusion_lab.metric import (
    coverage,
    crps,
    energy_score,
    expected_coverage,
    nominal_coverage,
    projections,
    rank_chi2,
    rank_histogram,
    ranks,
    spread_skill,
    spread_skill_ratio,
    tarp_ranks,
)
from diffusion_lab.rng import KeyedGenerator, make_key


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def ensemble(
    n: int, m: int, *shape: int, spread: float = 1.0, shift: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Samples N(c + shift, spread²) and truths N(c, 1), with another c for each observation."""
    centre = 2 * normal(n, 1, *shape, seed=seed + 1000)
    noise = normal(n, m + 1, *shape, seed=seed)
    return centre + shift + spread * noise[:, 1:], centre[:, 0] + noise[:, 0]


def streams(n: int, seed: int = 0) -> KeyedGenerator:
    return KeyedGenerator(make_key(seed, torch.arange(n)))


def uniform(histogram: Tensor, mass: float = 0.999) -> bool:
    """Whether χ² of independent ranks is in its central interval with the given mass."""
    m = len(histogram) - 1
    low, high = (chi2.ppf(q, m) / m for q in ((1 - mass) / 2, (1 + mass) / 2))
    return low < float(rank_chi2(histogram)) < high


# Scores


@pytest.mark.parametrize("m", [2, 3, 8])
def test_crps_matches_a_double_sum(m: int) -> None:
    samples, truth = ensemble(4, m, 2, 3)
    samples[0, 0] = samples[0, 1]  # equal samples
    expected = torch.zeros(4, dtype=torch.float64)
    for n in range(4):
        error = (samples[n] - truth[n]).abs().mean()
        pairs = sum((a - b).abs().mean() for a in samples[n] for b in samples[n])
        expected[n] = error - pairs / (2 * m * (m - 1))
    torch.testing.assert_close(crps(samples, truth), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("m", [2, 5])
@pytest.mark.parametrize("spread", [0.6, 1.0, 1.5])
def test_crps_is_unbiased_for_any_number_of_samples(m: int, spread: float) -> None:
    """Gneiting and Raftery, 2007, eq. 21: for N(μ, s²) at x, s (z (2Φ(z) - 1) + 2φ(z) - 1/√π)."""
    samples, truth = ensemble(20_000, m, 1, spread=spread)
    centre = truth - normal(20_000, m + 1, 1)[:, 0]
    z = ((truth - centre) / spread)[:, 0].numpy()
    closed = spread * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / math.sqrt(math.pi))
    difference = crps(samples, truth).numpy() - closed
    # A biased score is too large by 0.56 s / m, which is more than 10 standard errors.
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(20_000)
    assert 0.56 * spread / m > 10 * difference.std() / math.sqrt(20_000)


@pytest.mark.parametrize("score", [crps, energy_score])
def test_scores_are_minimal_for_the_correct_spread_and_mean(score: object) -> None:
    """This holds with three samples; a biased score would prefer a smaller spread."""
    values = {
        key: score(*ensemble(10_000, 3, 4, spread=key[0], shift=key[1])).mean()
        for key in ((1.0, 0.0), (0.8, 0.0), (1.25, 0.0), (1.0, 0.3))
    }
    assert min(values, key=values.get) == (1.0, 0.0)


def test_energy_score_matches_a_double_sum() -> None:
    samples, truth = ensemble(3, 5, 2, 4)
    expected = []
    for x, x_0 in zip(samples, truth, strict=True):
        error = sum(float((a - x_0).square().mean().sqrt()) for a in x) / 5
        pairs = sum(float((a - b).square().mean().sqrt()) for a in x for b in x)
        expected.append(error - pairs / (2 * 5 * 4))
    assert energy_score(samples, truth).tolist() == pytest.approx(expected, rel=1e-12)


def test_energy_score_of_copies_of_one_number_equals_crps() -> None:
    """‖x‖ is a root mean square, so copies of a pixel do not change it."""
    samples, truth = ensemble(5, 6, 1)
    torch.testing.assert_close(energy_score(samples, truth), crps(samples, truth))
    copies = energy_score(samples.repeat(1, 1, 9), truth.repeat(1, 9))
    torch.testing.assert_close(copies, crps(samples, truth))


def test_energy_score_depends_on_the_joint_distribution_but_crps_does_not() -> None:
    """The pixels are shuffled between samples: the marginals are correct, but the joint is not."""
    shared, own = normal(5000, 21, 1), 0.1 * normal(5000, 21, 8, seed=1)
    x = shared + own
    truth, samples = x[:, 0], x[:, 1:]
    torn = torch.stack([samples[:, :, k].roll(k, 1) for k in range(8)], 2)
    torch.testing.assert_close(crps(torn, truth), crps(samples, truth))
    difference = energy_score(torn, truth) - energy_score(samples, truth)
    assert float(difference.mean()) > 5 * float(difference.std()) / 5000**0.5


def test_scores_in_float32_are_accurate_for_a_large_offset() -> None:
    samples, truth = ensemble(4, 8, 3)
    for score in (crps, energy_score):
        shifted = score((samples + 1024).float(), (truth + 1024).float())
        torch.testing.assert_close(shifted.double(), score(samples, truth), rtol=1e-3, atol=1e-3)


# Ranks


def test_ranks_count_the_samples_below() -> None:
    samples = torch.tensor([[[1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]])
    for truth, expected in (([0.0, 8.0], [0, 3]), ([1.5, 6.5], [1, 2])):
        assert ranks(samples, torch.tensor([truth])).tolist() == [expected]


@pytest.mark.parametrize("m", [1, 4, 19])
def test_ranks_of_exact_samples_are_uniform(m: int) -> None:
    samples, truth = ensemble(5000, m, 2)
    for k in range(2):
        assert uniform(rank_histogram(ranks(samples, truth)[:, k], m))


@pytest.mark.parametrize("spread, shift", [(0.8, 0.0), (1.25, 0.0), (1.0, 0.2)])
def test_ranks_of_inexact_samples_are_not_uniform(spread: float, shift: float) -> None:
    samples, truth = ensemble(5000, 9, 1, spread=spread, shift=shift)
    histogram = rank_histogram(ranks(samples, truth), 9).double()
    assert not uniform(histogram)
    ends, middle = (histogram[0] + histogram[9]) / 2, (histogram[4] + histogram[5]) / 2
    if spread < 1:
        assert ends > 1.2 * middle  # U-shaped
    elif spread > 1:
        assert middle > 1.2 * ends  # peaked in the middle
    else:
        assert histogram[0] > 1.2 * histogram[9]  # the samples are too large


@pytest.mark.parametrize("keyed", [True, False])
def test_ties_are_broken_at_random(keyed: bool) -> None:
    """The images are clipped and rounded, so that most truths are equal to some samples."""
    samples, truth = (x.clamp(-1, 1).mul(2).round() / 2 for x in ensemble(5000, 9, 1))
    assert float((samples == truth[:, None]).any(1).double().mean()) > 0.7
    generator = streams(5000) if keyed else torch.Generator().manual_seed(0)
    assert uniform(rank_histogram(ranks(samples, truth, generator), 9))
    below = (samples < truth[:, None]).sum(1)
    for rule in (below, (samples <= truth[:, None]).sum(1)):
        assert not uniform(rank_histogram(rule, 9))


def test_ties_are_broken_uniformly_over_all_places() -> None:
    """Two samples below, three equal to the truth and one above: rank 2 to 5, a quarter each."""
    samples = torch.tensor([-1.0, 0.5, 0.0, 0.5, 0.5, 2.0]).expand(8000, 6)[..., None]
    found = ranks(samples, torch.full((8000, 1), 0.5), streams(8000))
    shares = rank_histogram(found, 6).double() / 8000
    expected = torch.tensor([0, 0, 0.25, 0.25, 0.25, 0.25, 0], dtype=torch.float64)
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)


def test_ranks_are_uniform_if_all_samples_are_tied() -> None:
    found = ranks(torch.ones(2000, 4, 3), torch.ones(2000, 3), streams(2000))
    assert uniform(rank_histogram(found[:, 1], 4))
    assert not torch.equal(found[:, 0], found[:, 1])  # ties are broken independently per pixel


def test_histogram_includes_empty_ranks() -> None:
    assert rank_histogram(torch.tensor([[0, 2], [2, 2]]), 4).tolist() == [1, 0, 3, 0, 0]


def test_chi2_matches_its_formula() -> None:
    histograms = torch.tensor([[10, 10, 10], [30, 0, 0], [12, 9, 9]])
    assert rank_chi2(histograms).tolist() == pytest.approx([0, 30, (4 + 1 + 1) / 10 / 2])
    with pytest.raises(ValueError, match="no ranks"):
        rank_chi2(torch.zeros(5))


# Coverage


@pytest.mark.parametrize(
    "m, level, share",
    [(19, 0.9, 0.9), (31, 0.9, 0.875), (8, 0.9, 7 / 9), (99, 0.5, 0.5), (9, 0.8, 0.8),
     (2, 0.01, 1 / 3), (3, 0.01, 0.5)],
)  # fmt: skip
def test_coverage_of_uniform_ranks_is_nominal(m: int, level: float, share: float) -> None:
    assert nominal_coverage(m, level) == pytest.approx(share)
    every_rank = torch.arange(m + 1)[None]
    assert float(coverage(every_rank, m, level)[0]) == pytest.approx(share)
    outermost = torch.tensor([[0, m]])
    assert float(coverage(outermost, m, level)[0]) == 0


def test_coverage_excludes_the_extreme_ranks_per_observation() -> None:
    found = torch.tensor([[0, 1, 18, 19], [1, 2, 17, 18], [0, 0, 19, 19]])
    assert coverage(found, 19, 0.9).tolist() == [0.5, 1, 0]


@pytest.mark.parametrize("spread", [0.7, 1.0, 1.4])
def test_coverage_of_samples_matches_numerical_integration(spread: float) -> None:
    """The reference is the probability that the truth is between the order statistics."""
    m, n = 19, 20_000
    samples, truth = ensemble(n, m, 1, spread=spread)
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64).numpy()
    below = norm.cdf(z / spread)
    inside = 1 - below**m - (1 - below) ** m  # all samples below, or all above
    expected = float((inside * norm.pdf(z)).sum() * (z[1] - z[0]))
    share = float(coverage(ranks(samples, truth), m, 0.9).mean())
    assert share == pytest.approx(expected, abs=4 * 0.5 / n**0.5)
    assert (spread == 1) == (abs(expected - 0.9) < 1e-6)


@pytest.mark.parametrize("m, level", [(1, 0.9), (9, 0.0), (9, 1.0), (9, 90.0)])
def test_invalid_coverage_levels_are_an_error(m: int, level: float) -> None:
    with pytest.raises(ValueError, match=f"samples_count={m} and level={level}"):
        nominal_coverage(m, level)


# Projections


def test_pixel_projections_are_distinct_pixels() -> None:
    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    chosen = projections(x, "pixels", count=48)
    assert torch.equal(chosen.sort(1).values, x.flatten(1))
    assert torch.equal(projections(x, "pixels", count=5), chosen[:, :5])
    assert not torch.equal(chosen, x.flatten(1))


def test_patch_projections_are_means_over_patches_and_channels() -> None:
    x = normal(2, 3, 6, 5)
    found = projections(x, "patches", count=12, patch=3)
    expected = torch.nn.functional.avg_pool2d(x, 3, stride=1).mean(1).flatten(1)
    assert expected.shape == (2, 12)
    torch.testing.assert_close(found.sort(1).values, expected.sort(1).values)


def test_random_projections_use_unit_vectors() -> None:
    x = torch.eye(12, dtype=torch.float64).reshape(12, 3, 2, 2)
    v = projections(x, "random", count=500)
    torch.testing.assert_close(v.square().sum(0), torch.ones(500, dtype=torch.float64))
    torch.testing.assert_close(v.square().mean(1), torch.full((12,), 1 / 12).double(), rtol=0.3,
                               atol=0)  # fmt: skip
    torch.testing.assert_close(projections(3 * x[:1] + x[1:2], "random", 500)[0], 3 * v[0] + v[1])


@pytest.mark.parametrize("kind", ["pixels", "patches", "random"])
def test_projections_are_equal_for_samples_and_truths(kind: str) -> None:
    x = normal(2, 5, 3, 16, 16)
    together = projections(x, kind, 7, seed=3, batch_dims=2)
    for n in range(2):
        torch.testing.assert_close(together[n], projections(x[n], kind, 7, seed=3))
    torch.testing.assert_close(together[0, 0], projections(x[0, :1], kind, 7, seed=3)[0])
    assert not torch.allclose(together, projections(x, kind, 7, seed=4, batch_dims=2))


def test_patch_projections_detect_wrong_correlations_of_pixels() -> None:
    """The samples have the correct marginals, but lack the component shared by all pixels."""
    shared = normal(4000, 1, 1, 1) + 0.3 * normal(4000, 3, 8, 8, seed=1)
    samples = 1.09**0.5 * normal(4000, 9, 3, 8, 8, seed=2).float()
    truth = shared.float()
    found = {}
    for kind in ("pixels", "patches"):
        sides = (
            projections(x, kind, 1, patch=4, batch_dims=k) for x, k in ((samples, 2), (truth, 1))
        )
        found[kind] = rank_histogram(ranks(*sides), 9)
    assert uniform(found["pixels"])
    assert float(rank_chi2(found["patches"])) > 100


def test_invalid_projections_are_an_error() -> None:
    x = torch.zeros(2, 3, 8, 8)
    for arguments, message in (
        (("faces",), "kind='faces' is unknown"),
        (("pixels", 193), "count=193 is not allowed"),
        (("patches", 2), "count=2 is not allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            projections(x, *arguments)
    with pytest.raises(ValueError, match="no patches of 9 x 9"):
        projections(x, "patches", 1, patch=9)
    with pytest.raises(ValueError, match="no patches"):
        projections(x.flatten(1), "patches", 1)


# TARP: random reference points

N = 3000
BAND = 1.95 / math.sqrt(N)  # Kolmogorov-Smirnov, with probability 1 in 1000


def tarp(
    samples: Tensor, truth: Tensor, references: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Credibility levels and expected coverage."""
    found = tarp_ranks(samples, truth, references=references)
    return expected_coverage(found, samples.shape[1])


def departure(levels: Tensor, found: Tensor) -> float:
    return float((found - levels).abs().max())


@pytest.mark.parametrize("d", [1, 4, 64])
def test_tarp_coverage_of_exact_samples_is_the_diagonal(d: int) -> None:
    levels, found = tarp(*ensemble(N, 19, d))
    assert levels.tolist() == pytest.approx([k / 20 for k in range(21)])
    assert (float(found[0]), float(found[-1])) == (0, 1)
    assert departure(levels, found) < BAND


@pytest.mark.parametrize("d", [1, 4, 64])
def test_tarp_coverage_of_samples_with_a_wrong_spread(d: int) -> None:
    """At high levels it is below the diagonal for a small spread and above for a large one."""
    levels, small = tarp(*ensemble(N, 19, d, spread=0.7))
    _, large = tarp(*ensemble(N, 19, d, spread=1.4))
    high = 18  # level 0.9
    assert float(small[high]) < 0.9 - 2 * BAND / 1.95 and departure(levels, small) > 2 * BAND
    assert float(large[high]) > 0.9 + 2 * BAND / 1.95 and departure(levels, large) > BAND


def test_tarp_detects_a_shift_and_wrong_correlations() -> None:
    assert departure(*tarp(*ensemble(N, 19, 4, shift=1.0))) > 2 * BAND
    shared = normal(N, 20, 1) + 0.3 * normal(N, 20, 8, seed=1)
    samples = 1.09**0.5 * normal(N, 19, 8, seed=2)  # equal marginals, but independent
    assert departure(*tarp(shared[:, 1:], shared[:, 0])) < BAND
    assert departure(*tarp(samples, shared[:, 0])) > 2 * BAND


def test_tarp_needs_references_from_y_to_reject_the_prior() -> None:
    """x_0 ~ N(0, 1), y = x_0 + n: without such references, ranks of prior samples are uniform."""
    prior = normal(N, 20, 2)
    truth, samples = prior[:, 0], prior[:, 1:]
    y = truth + normal(N, 2, seed=1)
    assert departure(*tarp(samples, truth)) < BAND
    assert departure(*tarp(samples, truth, references=y)) > 4 * BAND
    posterior = (y / 2)[:, None] + normal(N, 19, 2, seed=2) / 2**0.5
    assert departure(*tarp(posterior, truth, references=y)) < BAND


def test_tarp_ranks_count_the_samples_nearer_to_the_reference() -> None:
    samples = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, -4.0]]])
    origin = torch.zeros(1, 2)
    for truth, expected in (([0.5, 0.5], 0), ([2.0, 0.0], 1), ([0.0, 3.5], 2), ([9.0, 0.0], 3)):
        found = tarp_ranks(samples, torch.tensor([truth]), references=origin)
        assert found.tolist() == [expected]


def test_reference_points_are_uniform_in_the_box() -> None:
    """One sample is at 0 and the truth at 1, so half of the points in [0, 1] are nearer to each.

    If the box is beyond the truth, all points are nearer to the truth.
    """
    samples, truth = torch.zeros(2000, 1, 1), torch.ones(2000, 1)
    assert float(tarp_ranks(samples, truth).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(tarp_ranks(samples, truth, box=(0.2, 0.7)).double().mean()) == pytest.approx(
        0.6, abs=0.05
    )
    assert bool((tarp_ranks(samples, truth, box=(1, torch.full((1,), 3.0))) == 0).all())


def test_expected_coverage_is_the_fraction_of_smaller_ranks() -> None:
    levels, found = expected_coverage(torch.tensor([0, 0, 1, 3]), 3)
    assert levels.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.tolist() == [0, 0.5, 0.75, 0.75, 1]


# Spread and skill


@pytest.mark.parametrize("m", [2, 8])
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0])
def test_spread_skill_of_a_known_spread(m: int, spread: float) -> None:
    """With variance s² and error 1 + s²/M, the ratio is √((M + 1) / M · s² / (1 + s² / M))."""
    variance, error = spread_skill(*ensemble(20_000, m, 3, spread=spread))
    ratio = float(spread_skill_ratio(variance, error, m))
    expected = math.sqrt((m + 1) / m * spread**2 / (1 + spread**2 / m))
    assert ratio == pytest.approx(expected, rel=0.02)  # at least 3 standard errors
    assert (spread == 1) == (abs(expected - 1) < 1e-12)


def test_spread_skill_is_computed_per_observation() -> None:
    samples = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[5.0, 1.0], [5.0, 2.0]]])
    variance, error = spread_skill(samples, torch.tensor([[0.0, 0.0], [5.0, 2.5]]))
    assert variance.tolist() == [1.0, 0.25]
    assert error.tolist() == [2.0, 0.5]
    ratio = float(spread_skill_ratio(variance, error, 2))
    assert ratio == pytest.approx(math.sqrt(3 / 2 * 1.25 / 2.5))


# All metrics


def test_results_do_not_depend_on_the_batch() -> None:
    """Each observation alone, with its own keyed stream, gives the same results."""
    samples, truth = (x.clamp(-1, 1) for x in ensemble(6, 5, 3, 4))
    index = torch.arange(6)

    def all_of(rows: Tensor) -> list[Tensor]:
        x, x_0 = samples[rows], truth[rows]
        found = ranks(x, x_0, KeyedGenerator(make_key(0, rows)))
        balls = tarp_ranks(x, x_0, index=rows, box=(-1.0, 1.0))
        return [crps(x, x_0), energy_score(x, x_0), *spread_skill(x, x_0), found, balls,
                coverage(found, 5, 0.6)]  # fmt: skip

    whole, flipped = all_of(index), all_of(index.flip(0))
    alone = [torch.cat(parts) for parts in zip(*(all_of(index[k : k + 1]) for k in range(6)),
                                               strict=True)]  # fmt: skip
    for a, b, c in zip(whole, flipped, alone, strict=True):
        torch.testing.assert_close(a, b.flip(0))
        torch.testing.assert_close(a, c)
    assert len(set(whole[0].tolist())) == 6


def test_mismatched_shapes_are_an_error() -> None:
    for function in (crps, energy_score, ranks, spread_skill, tarp):
        with pytest.raises(ValueError, match="the shapes must be"):
            function(torch.zeros(3, 5, 2), torch.zeros(3, 4))
        with pytest.raises(ValueError, match="the shapes must be"):
            function(torch.zeros(3, 5, 2), torch.zeros(5, 2))
    for function in (crps, energy_score, spread_skill):
        with pytest.raises(ValueError, match="at least 2"):
            function(torch.zeros(3, 1, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="references of shape"):
        tarp_ranks(torch.zeros(3, 5, 2), torch.zeros(3, 2), references=torch.zeros(2))
