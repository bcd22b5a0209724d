"""Metrics of images, of sets of images, and of the calibration of posterior samples."""

__all__ = [
    "LPIPS", "METRICS", "SSIM_WINDOW", "DINOv2", "EfficientNetLite0", "Extractor", "Inception",
    "Metric", "Moments", "coverage", "crps", "energy_score", "expected_coverage", "extract",
    "find_lpips", "frechet_distance", "kernel_distance", "kernel_stein_discrepancy",
    "load_metrics", "nominal_coverage", "posterior_score", "precision_recall", "projections",
    "psnr", "rank_chi2", "rank_histogram", "ranks", "sliced_wasserstein", "spread_skill",
    "spread_skill_ratio", "ssim", "stein_discrepancy", "tarp_ranks", "total_variation",
]  # fmt: skip

from diffusion_lab.metric.calibration import (
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
from diffusion_lab.metric.dinov2 import DINOv2
from diffusion_lab.metric.distance import sliced_wasserstein, total_variation
from diffusion_lab.metric.efficientnet import EfficientNetLite0
from diffusion_lab.metric.feature_statistics import Moments
from diffusion_lab.metric.features import Extractor, extract
from diffusion_lab.metric.frechet import frechet_distance
from diffusion_lab.metric.inception import Inception
from diffusion_lab.metric.kid import kernel_distance
from diffusion_lab.metric.lpips import LPIPS, find_lpips
from diffusion_lab.metric.precision_recall import precision_recall
from diffusion_lab.metric.registry import METRICS, Metric, load_metrics
from diffusion_lab.metric.restoration import SSIM_WINDOW, psnr, ssim
from diffusion_lab.metric.stein import (
    kernel_stein_discrepancy,
    posterior_score,
    stein_discrepancy,
)
