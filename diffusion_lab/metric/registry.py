"""List of the metrics of a restoration: to add one, write a function and add a line here."""

__all__ = ["METRICS", "Metric", "MetricFunction", "load_metrics"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from diffusion_lab.metric.calibration import crps, energy_score
from diffusion_lab.metric.lpips import MIN_SIZE, find_lpips
from diffusion_lab.metric.restoration import SSIM_WINDOW, psnr, ssim

MetricFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Metric:
    """A metric of restored images or of posterior samples, with the truth x_0 of shape (B, *).

    Attributes:
        name: The name in result files and logs.
        label: The name in charts.
        higher_is_better: Whether larger values are better.
        of: The first argument of the function: `image`, an estimate of shape (B, C, H, W);
            `samples`, posterior samples of shape (B, M, *); or `posterior`, which has no function
            here, since it depends on the prior instead of on x_0.
        load: Returns the function, or None if its weights are not available.
        min_size: The smallest side of an image, in pixels.
        estimates: The estimates whose values are drawn in charts; empty draws none.
        needs_weights: Whether the function needs weights that may be missing.
    """

    name: str
    label: str
    higher_is_better: bool
    of: Literal["image", "samples", "posterior"]
    load: Callable[[], MetricFunction | None]
    min_size: int = 1
    estimates: tuple[str, ...] = ()
    needs_weights: bool = False


# In the order of the tables.
METRICS = (
    Metric("psnr", "PSNR", True, "image", lambda: psnr, estimates=("mean", "sample")),
    Metric("ssim", "SSIM", True, "image", lambda: ssim, SSIM_WINDOW, ("sample",)),
    Metric("lpips", "LPIPS", False, "image", find_lpips, MIN_SIZE, ("sample",), True),
    Metric("crps", "CRPS", False, "samples", lambda: crps, estimates=("posterior",)),
    Metric("energy_score", "Energy score", False, "samples", lambda: energy_score),
    Metric("ksd", "Kernel Stein discrepancy", False, "posterior", lambda: None),
)


def load_metrics(of: Literal["image", "samples"], size: int) -> dict[str, MetricFunction]:
    """Returns the available functions by name.

    Arguments:
        of: The kind of metric, see `Metric`.
        size: The shorter side of the images, in pixels.
    """
    suitable = [metric for metric in METRICS if metric.of == of and size >= metric.min_size]
    functions = {metric.name: metric.load() for metric in suitable}
    return {name: function for name, function in functions.items() if function is not None}
