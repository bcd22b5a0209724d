"""How good images are, how far two sets are apart, and whether posterior samples are calibrated."""

__all__ = [
    "WINDOW", "EfficientNetLite0", "Moments", "coverage", "crps", "energy_score",
    "expected_coverage", "frechet_distance", "nominal", "projections", "psnr", "rank_chi2",
    "rank_histogram", "ranks", "sliced_wasserstein", "spread_skill", "spread_skill_ratio", "ssim",
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
from diffusion_lab.metric.restoration import WINDOW, psnr, ssim
from diffusion_lab.metric.statistics import Moments
