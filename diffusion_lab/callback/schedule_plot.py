r"""Charts of the noise schedule and of the loss weighting, drawn at the start of a run.

Three charts over t: α_t and σ_t; log SNR = -2 log σ_t/α_t, with the ends of the bins of
`train/loss_bin` and `val/loss_bin`; the density p(t) of the training's times, and the weight

    p(t) f(t) w(t)

of the squared error of the network's output in the mean over t, where f is the importance weight
of t.
"""

__all__ = ["SchedulePlot", "schedule_charts"]

import logging
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer

from diffusion_lab.callback.sample_animation import log_picture
from diffusion_lab.callback.trainer_state import diffusion_module
from diffusion_lab.constraints import NonEmptyStr, checked
from diffusion_lab.report.chart import LineChart
from diffusion_lab.report.chart_png import chart_png
from diffusion_lab.training.loss_bins import BINS, bin_name
from diffusion_lab.training.module import DiffusionModule

log = logging.getLogger(__name__)

POINTS = 200  # number of points of each curve
DRAWS = 40_000  # number of times in the histogram
COLUMNS = 50  # bins of the histogram


def schedule_charts(module: DiffusionModule) -> list[LineChart]:
    """Returns the three charts."""
    schedule = module.schedule
    t = torch.linspace(schedule.t_min, 1, POINTS, dtype=torch.float64)
    alpha, sigma = schedule(t)
    ends = torch.arange(BINS + 1, dtype=torch.float64).clamp(max=BINS - 1e-6) / BINS
    edges, _ = module.time(ends, schedule)

    u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    drawn, factor = module.time(u, schedule)
    weight = factor * module.loss.output_weight(schedule, module.parameterization, drawn)
    # The last time of a column is its own: DDPM's are multiples of 1/T, and rounded.
    column = (drawn * COLUMNS - 1e-9).ceil().long().clamp(1, COLUMNS) - 1
    density, share = (
        torch.zeros(COLUMNS, dtype=torch.float64).index_add_(0, column, each) * COLUMNS / DRAWS
        for each in (torch.ones_like(weight), weight)
    )
    middle = ((torch.arange(COLUMNS) + 0.5) / COLUMNS).tolist()
    name = type(schedule).__name__
    return [
        LineChart(
            f"{name}: signal and noise", "", "t", "",
            {"α_t": (t.tolist(), alpha.tolist()), "σ_t": (t.tolist(), sigma.tolist())},
            log_y=float(sigma.max()) > 10,
        ),
        LineChart(
            "log SNR", "", "t", "",
            {
                "log SNR": (t.tolist(), (-2 * schedule.ratio(t).log()).tolist()),
                "ends of the loss bins": (
                    edges.tolist(), (-2 * schedule.ratio(edges).log()).tolist()
                ),
            },
            dots=["ends of the loss bins"],
        ),
        LineChart(
            "Training times and weights", "", "t", "",
            {
                "density of t": (middle, density.tolist()),
                "weight of the output's error": (middle, share.tolist()),
            },
            log_y=bool(share.max() > 10 * share[share > 0].min()),
        ),
    ]  # fmt: skip


class SchedulePlot(Callback):
    """Draws the charts as a PNG file, and as `schedule/plot` for the loggers.

    Arguments:
        directory: Directory of the PNG file.
    """

    @checked
    def __init__(self, directory: NonEmptyStr) -> None:
        self.path = Path(directory) / "schedule-0000000.png"  # of step 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step == 0:
            charts = schedule_charts(diffusion_module(module))
            _, ends = charts[1].series["ends of the loss bins"]
            log.info(
                "the bins train/loss_bin/%s to %s end at log SNR %s",
                bin_name(0), bin_name(BINS - 1), ", ".join(f"{end:.3g}" for end in ends[1:]),
            )  # fmt: skip
            picture = chart_png(charts)
            log_picture(trainer, "schedule/plot", picture, self.path)
