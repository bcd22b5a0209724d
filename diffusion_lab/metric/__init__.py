"""How good images are, how far sets are apart, and whether posterior samples are calibrated."""

__all__ = [
    "LEAST", "LPIPS", "WINDOW", "EfficientNetLite0", "Moments", "coverage", "crps", "energy_score",
    "expected_coverage", "find_lpips", "frechet_distance", "kernel_stein_discrepancy", "nominal",
    "posterior_score", "projections", "psnr", "rank_chi2", "rank_histogram", "ranks",
    "sliced_wasserstein", "spread_skill", "spread_skill_ratio", "ssim", "stein_discrepancy",
    "tarp", "tarp_ranks", "total_variation",
]  # fmt: skip

from diffusion_lab.metric.calibration import (
    coverage,
    crps,
    energy_score,
    expected_coverage,
    nominal,
    projections,
    rank_chi2,
    rank_histogram,
    ranks,
    spread_skill,
    spread_skill_ratio,
    tarp,
    tarp_ranks,
)
from diffusion_lab.metric.distance import sliced_wasserstein, total_variation
from diffusion_lab.metric.efficientnet import EfficientNetLite0
from diffusion_lab.metric.frechet import frechet_distance
from diffusion_lab.metric.lpips import LEAST, LPIPS, find_lpips
from diffusion_lab.metric.restoration import WINDOW, psnr, ssim
from diffusion_lab.metric.statistics import Moments
from diffusion_lab.metric.stein import (
    kernel_stein_discrepancy,
    posterior_score,
    stein_discrepancy,
)
