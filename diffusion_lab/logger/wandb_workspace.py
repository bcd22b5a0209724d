"""W&B workspace: the panels of a project's dashboard as code.

    python -m diffusion_lab.logger.wandb_workspace --entity=<team or user> --project=diffusion_lab

Training and evaluation runs share the project; a panel shows the runs that log its key. Creating
the view needs `wandb login`, and `pip install 'diffusion-lab[workspace]'`.
"""

__all__ = [
    "SECTIONS", "BarPanel", "ImagePanel", "LinePanel", "ParallelCoordinatesPanel", "build", "main",
]  # fmt: skip

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_lab.errors import ConfigError, LabError, RunError
from diffusion_lab.metric import METRICS

STEP = "trainer/global_step"  # horizontal axis
BINS = [f"{k / 10:.1f}" for k in range(1, 11)]  # names of the noise levels in the metrics
ESTIMATES = {"mean": " of the mean", "sample": " of a sample", "posterior": ""}  # in titles
VIEW = "diffusion_lab"  # default name of the view


@dataclass(frozen=True)
class LinePanel:
    """Line chart over the steps, of the keys or of all keys that match a pattern."""

    title: str
    keys: Sequence[str] = ()
    log: bool = False
    pattern: str | None = None


@dataclass(frozen=True)
class BarPanel:
    """Bar chart of the last value of the keys in each run."""

    title: str
    keys: Sequence[str]


@dataclass(frozen=True)
class ImagePanel:
    """Pictures with a slider over the steps."""

    title: str
    keys: Sequence[str]


@dataclass(frozen=True)
class ParallelCoordinatesPanel:
    """Parallel coordinates of configuration keys and a metric, and the keys' importance for it.

    Arguments:
        title: Heading.
        keys: Keys of the configuration.
        metric: Key of the metric.
    """

    title: str
    keys: Sequence[str]
    metric: str


Panel = LinePanel | BarPanel | ImagePanel | ParallelCoordinatesPanel

SECTIONS: dict[str, list[Panel]] = {
    "Training": [
        LinePanel("Loss", ["train/loss"], log=True),
        LinePanel("Loss by noise level", [f"train/loss_bin/{k}" for k in BINS], log=True),
        LinePanel("Gradient norm", ["train/grad_norm"], log=True),
        LinePanel("Learning rate", ["train/lr"]),
        LinePanel("Images seen", ["train/images"]),
        LinePanel("Skipped steps", ["train/skipped"]),
    ],
    "Validation": [
        LinePanel("Loss of raw and averaged weights", ["val/loss", "val/loss_ema"], log=True),
        LinePanel("Loss by noise level", [f"val/loss_bin/{k}" for k in BINS], log=True),
    ],
    "Samples": [
        ImagePanel("Samples of the prior", ["samples/grid"]),
        ImagePanel("Sampling trajectories", ["samples/progressive"]),
        ImagePanel("E[x_0 | x_t] at several noise levels", ["samples/levels"]),
        ImagePanel("Denoised validation images", ["samples/denoise"]),
        ImagePanel("Samples and their nearest training images", ["samples/nearest"]),
        ImagePanel("Noise schedule", ["schedule/plot"]),
    ],
    "Quality": [
        LinePanel("Distances, in training", pattern="val/(frechet|fid)_.*"),
        LinePanel("Distances, task=fid", pattern="eval/mean_(frechet|fid|kernel|kid)_.*"),
        LinePanel("Precision and recall, task=fid", pattern="eval/mean_(precision|recall)_.*"),
    ],
    "Restoration": [
        *(
            BarPanel(metric.label + ESTIMATES[estimate], [f"eval/{estimate}_{metric.name}"])
            for metric in METRICS
            for estimate in metric.estimates
            if not metric.needs_weights
        ),
        BarPanel("Coverage of the 90 % intervals", ["eval/posterior_coverage_90"]),
        BarPanel("Spread-skill ratio", ["eval/posterior_spread_skill"]),
        ImagePanel("Images", ["eval/grid"]),
        ImagePanel("Denoising", ["eval/denoising"]),
    ],
    "Sweep": [
        ParallelCoordinatesPanel(
            "Configuration and validation loss",
            ["schedule._target_", "parameterization._target_", "loss._target_", "optimizer.lr",
             "ema.decay", "data.batch_size"],
            "val/loss_ema",
        ),
        ParallelCoordinatesPanel(
            "Configuration and PSNR of a restoration",
            ["task._target_", "guidance._target_", "sampler._target_", "sampler.steps", "sigma_y"],
            "eval/mean_psnr",
        ),
    ],
    "System": [
        LinePanel("Images per second", ["perf/images_per_second"]),
        LinePanel("TFLOP/s", ["perf/tflops"]),
        LinePanel("Fraction of the device's peak (MFU)", ["perf/mfu"]),
        LinePanel("Memory in GB", ["perf/memory_gb"]),
    ],
}  # fmt: skip


def build(entity: str, project: str, name: str = VIEW) -> Any:
    """Returns the workspace; its `save` method creates the view on the server.

    Raises:
        ConfigError: If wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ConfigError(
            "the W&B workspace needs wandb-workspaces: pip install 'diffusion-lab[workspace]'"
        ) from error
    sections = [
        ws.Section(name=title, panels=[p for panel in panels for p in _panels(panel)],
                   is_open=title in ("Training", "Validation", "Samples"))
        for title, panels in SECTIONS.items()
    ]  # fmt: skip
    settings = ws.WorkspaceSettings(x_axis=STEP)
    return ws.Workspace(entity, project, name=name, sections=sections, settings=settings)


def _panels(panel: Panel) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    if isinstance(panel, LinePanel):
        keys = {"metric_regex": panel.pattern} if panel.pattern else {"y": list(panel.keys)}
        return [wr.LinePlot(title=panel.title, x=STEP, log_y=panel.log, **keys)]
    if isinstance(panel, BarPanel):
        return [wr.BarPlot(title=panel.title, metrics=list(panel.keys))]
    if isinstance(panel, ImagePanel):
        return [wr.MediaBrowser(title=panel.title, media_keys=list(panel.keys), num_columns=1)]
    columns = [wr.Config(key) for key in panel.keys] + [wr.SummaryMetric(panel.metric)]
    parallel = [wr.ParallelCoordinatesPlotColumn(metric=column) for column in columns]
    return [
        wr.ParallelCoordinatesPlot(title=panel.title, columns=parallel),
        wr.ParameterImportancePlot(with_respect_to=panel.metric),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Creates the view and prints its address; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_lab.logger.wandb_workspace",
        description="Create a view with all panels in a W&B project.",
    )
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", required=True, help="W&B project")
    parser.add_argument("--name", default=VIEW, help="name of the view; default: %(default)s")
    # The previous release took entity=... for --entity=...
    given = sys.argv[1:] if arguments is None else arguments
    given = [text if text.startswith("-") else f"--{text}" for text in given]
    options = parser.parse_args(given)
    try:
        workspace = build(options.entity, options.project, options.name)
        try:
            print(workspace.save().url)
        except Exception as error:  # the client and the server raise many types
            raise RunError(
                f"the view is not created: {error}; log in with `wandb login`, and check that "
                f"--entity={options.entity} is yours and has --project={options.project}"
            ) from error
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
