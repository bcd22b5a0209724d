r"""Calibration of posterior samples: ranks, coverage, TARP, CRPS, energy score, spread and skill.

The M samples x_m ~ p(x_0 | y) of an observation and the truth x_0 behind it are draws of one
distribution. Hence the rank of the truth among them is uniform on 0..M, and the error of their
mean is as large as their spread implies. All functions take the samples of N observations, of
shape (N, M, *), and the truths, of shape (N, *), and are exact for any finite M. All but
`tarp_ranks` with its default box treat observations independently. torchmetrics has only the CRPS,
in the biased form with M² in place of M (M - 1).

Uniform ranks do not imply an exact sampler: samples of the prior have them too. The scores (CRPS,
energy) detect it, since their means are minimal for the posterior only.

Sources:
    Gneiting, Raftery, "Strictly proper scoring rules, prediction, and estimation", 2007.
    Ferro, "Fair scores for ensemble forecasts", 2014.
    Hamill, "Interpretation of rank histograms for verifying ensemble forecasts", 2001.
    Talts et al., "Validating Bayesian inference algorithms with simulation-based calibration",
    2018.
    Lemos et al., "Sampling-based accuracy testing of posterior estimators for general inference",
    2023 (TARP).
    Fortin et al., "Why should ensemble spread match the RMSE of the ensemble mean?", 2014.
"""

__all__ = [
    "coverage", "crps", "energy_score", "expected_coverage", "nominal_coverage", "projections",
    "rank_chi2", "rank_histogram", "ranks", "spread_skill", "spread_skill_ratio", "tarp_ranks",
]  # fmt: skip

import math
from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.metric.distance import unit_vectors
from diffusion_lab.rng import KeyedGenerator, make_key


def crps(samples: Tensor, truth: Tensor) -> Tensor:
    """Returns the fair continuous ranked probability score, a mean over pixels, of shape (N,).

    1/M Σ_m |x_m - x_0| - 1 / (2 M (M - 1)) Σ_{m,m'} |x_m - x_m'|, which is unbiased: its mean is
    the score of infinitely many samples. With M² in place of M (M - 1), few samples with too small
    a spread would score best. The second sum is that of (2 m - M - 1) x_(m) over sorted samples.

    Arguments:
        samples: x_m, of shape (N, M, *), M at least 2.
        truth: x_0, of shape (N, *).

    Raises:
        ValueError: If the shapes do not match, or M < 2.
    """
    m = _check(samples, truth, minimum=2)
    deviations = samples - truth[:, None]  # their sums round less than sums of the samples
    error = deviations.abs().mean(1)
    factors = torch.arange(1 - m, m, 2).to(deviations) / (m * (m - 1))
    spread = torch.einsum("nm...,m->n...", deviations.sort(1).values, factors)
    score: Tensor = (error - spread).flatten(1).mean(1)
    return score


def energy_score(samples: Tensor, truth: Tensor) -> Tensor:
    """Returns the fair energy score of whole images, of shape (N,).

    1/M Σ_m ‖x_m - x_0‖ - 1 / (2 M (M - 1)) Σ_{m,m'} ‖x_m - x_m'‖ with ‖x‖ = |x|_2 / √d, the root
    mean square over the d pixels of an image, so that values do not depend on the size of images.
    Unlike CRPS it depends on the correlation of pixels.

    Arguments:
        samples: x_m, of shape (N, M, *), M at least 2.
        truth: x_0, of shape (N, *).

    Raises:
        ValueError: If the shapes do not match, or M < 2.
    """
    m = _check(samples, truth, minimum=2)
    deviations = (samples - truth[:, None]).flatten(2)
    # By differences: |a|² + |b|² - 2 ab loses the digits of samples that are nearly equal.
    pairs = torch.cdist(deviations, deviations, compute_mode="donot_use_mm_for_euclid_dist")
    score = deviations.norm(dim=2).mean(1) - pairs.sum((1, 2)) / (2 * m * (m - 1))
    result: Tensor = score / math.sqrt(deviations.shape[2])
    return result


def ranks(
    samples: Tensor, truth: Tensor, generator: KeyedGenerator | torch.Generator | None = None
) -> Tensor:
    """Returns how many samples are below the truth, int64 in 0..M, of shape (N, *).

    Ties, for example between clipped images, are broken uniformly at random: ranks stay uniform.

    Arguments:
        samples: x_m, of shape (N, M, *).
        truth: x_0, of shape (N, *).
        generator: N keyed streams, a generator of torch, or None for the global generator.

    Raises:
        ValueError: If the shapes do not match.
    """
    _check(samples, truth)
    below = (samples < truth[:, None]).sum(1)
    ties = (samples == truth[:, None]).sum(1)
    if isinstance(generator, KeyedGenerator):
        u = generator.uniform(*truth.shape[1:]).to(truth.device)
    else:
        device = truth.device if generator is None else generator.device
        u = torch.rand(truth.shape, generator=generator, device=device).to(truth.device)
    return below + (u * (ties + 1)).long()


def projections(
    x: Tensor, kind: Literal["pixels", "patches", "random"], count: int = 64, seed: int = 0, *,
    patch: int = 8, batch_dims: int = 1,
) -> Tensor:  # fmt: skip
    """Returns projections of each image, a function of the seed, of shape (..., count).

    Ranks of pixels depend on their marginal spread only, those of patches and of random directions
    also on correlations. Use the same arguments for the truths as for the samples.

    Arguments:
        x: Images, of shape (B, *), or (N, M, *) with `batch_dims` 2.
        kind: `pixels`, at random positions; `patches`, means over random squares and over
            channels, of images (C, H, W); `random`, products with random unit vectors.
        count: The number of projections.
        seed: Seed of the positions or directions.
        patch: The side of a patch, in pixels.
        batch_dims: The number of dimensions before those of an image: 1 for truths, 2 for samples.

    Raises:
        ValueError: If the kind is unknown, or the images are too small.
    """
    batch, shape = x.shape[:batch_dims], tuple(x.shape[batch_dims:])
    flat = x.flatten(batch_dims)
    stream = KeyedGenerator(make_key(seed, kind)[None])
    if kind == "random":
        return flat @ unit_vectors(count, flat.shape[-1], seed).to(flat).T
    if kind == "pixels":
        sites = flat.shape[-1]
    elif kind == "patches":
        if len(shape) != 3 or min(shape[1:]) < patch:
            raise ValueError(f"images of shape {shape} have no patches of {patch} x {patch}")
        columns = shape[2] - patch + 1
        sites = (shape[1] - patch + 1) * columns
    else:
        raise ValueError(f"kind={kind!r} is unknown; choose pixels, patches or random")
    if count > sites:
        raise ValueError(f"count={count} is not allowed; images of shape {shape} have {sites}")
    chosen = stream.uniform(sites, dtype=torch.float64)[0].argsort()[:count]
    if kind == "pixels":
        return flat[..., chosen.to(x.device)]
    x = x.flatten(0, batch_dims - 1).mean(1)
    corners = [divmod(int(site), columns) for site in chosen]
    means = [x[:, i : i + patch, j : j + patch].mean((1, 2)) for i, j in corners]
    return torch.stack(means, 1).reshape(*batch, count)


def rank_histogram(ranks: Tensor, samples_count: int) -> Tensor:
    """Returns the number of occurrences of each rank 0..M, int64, of shape (M + 1,).

    Arguments:
        ranks: Ranks, of any shape.
        samples_count: M.
    """
    return ranks.flatten().bincount(minlength=samples_count + 1)


def rank_chi2(histogram: Tensor) -> Tensor:
    """Returns χ² over its M degrees of freedom: 1 in the mean for ranks that are uniform.

    χ² = Σ_k (h_k - n / (M + 1))² / (n / (M + 1)). It has a χ² distribution only for independent
    ranks. With many pixels per image it is larger, and only comparisons are meaningful.

    Arguments:
        histogram: h_k, of shape (..., M + 1), with n ranks in total.

    Raises:
        ValueError: If a histogram is empty.
    """
    expected = histogram.double().mean(-1, keepdim=True)
    if not bool((expected > 0).all()):
        raise ValueError("the histogram holds no ranks")
    chi2 = ((histogram - expected) ** 2 / expected).sum(-1)
    return chi2 / (histogram.shape[-1] - 1)


def coverage(ranks: Tensor, samples_count: int, level: float) -> Tensor:
    """Returns the fraction of truths in the central interval of the samples, of shape (N,).

    The interval is between two of the sorted samples. For exact samples the mean is
    `nominal_coverage`; a smaller value indicates too small a spread or a bias.

    Arguments:
        ranks: Ranks of the truths, of shape (N, *).
        samples_count: M, at least 2.
        level: The requested level, in (0, 1).

    Raises:
        ValueError: See `nominal_coverage`.
    """
    tail = _tail(samples_count, level)
    inside = (ranks >= tail) & (ranks <= samples_count - tail)
    return inside.double().reshape(len(ranks), -1).mean(1)


def nominal_coverage(samples_count: int, level: float) -> float:
    """Returns the mean of `coverage` for exact samples, (M + 1 - 2k) / (M + 1).

    The interval excludes k >= 1 ranks on each side, the integer nearest to the requested level.
    For level=0.9 M = 19 gives 0.9, M = 31 gives 0.875, and M = 8 gives 0.78, its widest interval.

    Arguments:
        samples_count: M, at least 2.
        level: The requested level, in (0, 1).

    Raises:
        ValueError: If M < 2 or the level is outside (0, 1).
    """
    return 1 - 2 * _tail(samples_count, level) / (samples_count + 1)


def tarp_ranks(
    samples: Tensor,
    truth: Tensor,
    seed: int = 0,
    *,
    index: Tensor | None = None,
    box: tuple[Tensor | float, Tensor | float] | None = None,
    references: Tensor | None = None,
) -> Tensor:
    """Returns the number of samples nearer to a random point than the truth, int64, (N,).

    A ball around a reference point that contains a fraction of the samples is a credible region of
    that level, so it contains the truth with this probability. Ranks of distances test the joint
    distribution of all pixels. To distinguish the prior from the posterior, reference points must
    depend on y (`references`). The test is not sensitive to shifts; ranks of pixels are.

    Arguments:
        samples: x_m, of shape (N, M, *).
        truth: x_0, of shape (N, *).
        seed: Seed of the reference points.
        index: Numbers of the observations, int64, of shape (N,), so that an image has the same
            point in any batch; 0..N - 1 by default.
        box: Bounds of the uniform distribution of reference points, numbers or tensors of shape *;
            by default the minimum and maximum of all samples and truths.
        references: The reference points, of shape (N, *), in place of random ones.

    Raises:
        ValueError: If the shapes do not match.
    """
    _check(samples, truth)
    index = torch.arange(len(truth)) if index is None else index
    stream = KeyedGenerator(make_key(seed, "reference", index))
    if references is None:
        if box is None:
            low = torch.minimum(samples.amin((0, 1)), truth.amin(0))
            high = torch.maximum(samples.amax((0, 1)), truth.amax(0))
        else:
            low, high = (torch.as_tensor(edge).to(truth) for edge in box)
        references = torch.lerp(
            low.expand(truth.shape), high.expand(truth.shape),
            stream.uniform(*truth.shape[1:]).to(truth),
        )  # fmt: skip
    if references.shape != truth.shape:
        raise ValueError(
            f"references of shape {tuple(references.shape)} for truths of {tuple(truth.shape)}"
        )
    distances = (samples - references[:, None]).flatten(2).norm(dim=2)
    return ranks(distances, (truth - references).flatten(1).norm(dim=1), stream)


def expected_coverage(ranks: Tensor, samples_count: int) -> tuple[Tensor, Tensor]:
    """Returns levels k / (M + 1), k = 0..M + 1, and the fraction of ranks below k, both float64.

    The second is the expected coverage of balls of that level (ECP). For exact samples the two
    agree up to about 1.6 / √N (Kolmogorov-Smirnov, 1%). At high levels, too small a spread gives
    less than the level, and too large a spread more.

    Arguments:
        ranks: The result of `tarp_ranks`, of shape (N,).
        samples_count: M.
    """
    histogram = rank_histogram(ranks, samples_count).double()
    below = torch.cat([histogram.new_zeros(1), histogram.cumsum(0)])
    levels = torch.arange(samples_count + 2).to(below) / (samples_count + 1)
    return levels, below / below[-1]


def spread_skill(samples: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the variance of the samples and the squared error of their mean, (N,) each.

    Both are means over pixels; 1 / (M - 1) Σ_m (x_m - x̄)² and (x̄ - x_0)² with x̄ = 1/M Σ_m x_m.

    Arguments:
        samples: x_m, of shape (N, M, *), M at least 2.
        truth: x_0, of shape (N, *).

    Raises:
        ValueError: If the shapes do not match, or M < 2.
    """
    _check(samples, truth, minimum=2)
    variance, mean = torch.var_mean(samples, 1)
    return variance.flatten(1).mean(1), (mean - truth).square().flatten(1).mean(1)


def spread_skill_ratio(variance: Tensor, squared_error: Tensor, samples_count: int) -> Tensor:
    """Returns √((M + 1) / M · mean variance / mean squared error): 1 for exact samples.

    The factor accounts for the error of a mean of M samples. Variances and errors are averaged
    first, since the mean of the ratios of observations is not 1.

    Source:
        Fortin et al., "Why should ensemble spread match the RMSE of the ensemble mean?", 2014.

    Arguments:
        variance: The variances of all observations, see `spread_skill`, of any shape.
        squared_error: The squared errors, of the same shape.
        samples_count: M.
    """
    ratio = variance.double().mean() / squared_error.double().mean()
    return ((samples_count + 1) / samples_count * ratio).sqrt()


def _tail(samples_count: int, level: float) -> int:
    """The number k of ranks on each side of a central interval."""
    if samples_count < 2 or not 0 < level < 1:
        raise ValueError(
            f"samples_count={samples_count} and level={level} are not allowed; an interval needs "
            "at least 2 samples and a level between 0 and 1"
        )
    # k = 0 would include every truth, and k > M / 2 none.
    return min(max(round((1 - level) / 2 * (samples_count + 1)), 1), samples_count // 2)


def _check(samples: Tensor, truth: Tensor, minimum: int = 1) -> int:
    """Returns M; raises ValueError if it is too small or the shapes do not match."""
    shape, expected = tuple(samples.shape), tuple(truth.shape)
    if len(shape) < 2 or shape[:1] + shape[2:] != expected:
        raise ValueError(
            f"samples of shape {shape} and truths of {expected} are not allowed; the shapes must "
            "be (N, M, *) and (N, *)"
        )
    if shape[1] < minimum:
        raise ValueError(f"{shape[1]} samples of an observation; at least {minimum} are needed")
    return shape[1]
