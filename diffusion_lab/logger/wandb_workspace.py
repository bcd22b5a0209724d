"""The W&B dashboard as code: one view of a project, with the sections of this file.

    python -m diffusion_lab.logger.wandb_workspace entity=<team or user> project=diffusion_lab

Runs of training and of evaluation share the project; a panel shows those that have its key. Making
the view needs `wandb login`, and `pip install 'diffusion-lab[workspace]'`.
"""

__all__ = ["SECTIONS", "Choices", "Lines", "Pictures", "Values", "build", "main"]

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_lab.errors import ConfigError, LabError, RunError

STEP = "trainer/global_step"  # the horizontal axis: what was logged at the same step
BINS = [f"{k / 10:.1f}" for k in range(1, 11)]  # noise levels, as the training names them
VIEW = "diffusion_lab"  # the view's name if none is given


@dataclass(frozen=True)
class Lines:
    """A chart over the steps of the keys, or of those that match a pattern."""

    title: str
    keys: Sequence[str] = ()
    log: bool = False
    pattern: str | None = None


@dataclass(frozen=True)
class Values:
    """Bars of the last value of keys, run by run."""

    title: str
    keys: Sequence[str]


@dataclass(frozen=True)
class Pictures:
    """Pictures, with a slider over the steps."""

    title: str
    keys: Sequence[str]


@dataclass(frozen=True)
class Choices:
    """Runs as lines through their choices and the figure that those led to.

    Arguments:
        title: The heading.
        choices: Keys of the configuration.
        figure: The key of the figure; the parameters' importance is with respect to it.
    """

    title: str
    choices: Sequence[str]
    figure: str


Panel = Lines | Values | Pictures | Choices

SECTIONS: dict[str, list[Panel]] = {
    "Training": [
        Lines("Loss", ["train/loss"], log=True),
        Lines("Loss by noise level", [f"train/loss_bin/{k}" for k in BINS], log=True),
        Lines("Norm of the gradient", ["train/grad_norm"], log=True),
        Lines("Learning rate", ["train/lr"]),
        Lines("Images seen", ["train/images"]),
        Lines("Steps left out", ["train/skipped"]),
    ],
    "Validation": [
        Lines("Loss of raw and averaged weights", ["val/loss", "val/loss_ema"], log=True),
        Lines("Loss by noise level", [f"val/loss_bin/{k}" for k in BINS], log=True),
    ],
    "Samples": [
        Pictures("Samples of the prior", ["samples/grid"]),
        Pictures("From noise to images", ["samples/progressive"]),
        Pictures("E[x_0 | x_t] at several noise levels", ["samples/levels"]),
        Pictures("Noisy images and what is made of them", ["samples/denoise"]),
        Pictures("Samples and the training images nearest to them", ["samples/nearest"]),
        Pictures("The schedule", ["schedule/plot"]),
    ],
    "Quality": [
        Lines("Distance of samples, in training", pattern="val/(frechet|fid)_.*"),
        Lines("Distances of samples, task=fid", pattern="eval/mean_(frechet|fid|kernel|kid)_.*"),
        Lines("Precision and recall, task=fid", pattern="eval/mean_(precision|recall)_.*"),
    ],
    "Restoration": [
        Values("PSNR of the mean", ["eval/mean_psnr"]),
        Values("PSNR of a sample", ["eval/sample_psnr"]),
        Values("SSIM of a sample", ["eval/sample_ssim"]),
        Values("CRPS", ["eval/posterior_crps"]),
        Values("Coverage of the 90 % intervals", ["eval/posterior_coverage_90"]),
        Values("Spread over error", ["eval/posterior_spread_skill"]),
        Pictures("Images", ["eval/grid"]),
        Pictures("Denoising", ["eval/denoising"]),
    ],
    "Sweep": [
        Choices(
            "What decides the validation loss",
            ["schedule._target_", "parameterization._target_", "loss._target_", "optimizer.lr",
             "ema.decay", "data.batch_size"],
            "val/loss_ema",
        ),
        Choices(
            "What decides a restoration",
            ["task._target_", "guidance._target_", "sampler._target_", "sampler.steps", "sigma_y"],
            "eval/mean_psnr",
        ),
    ],
    "System": [
        Lines("Images a second", ["perf/images_per_second"]),
        Lines("TFLOP/s", ["perf/tflops"]),
        Lines("Share of the device's peak", ["perf/mfu"]),
        Lines("Memory in GB", ["perf/memory_gb"]),
    ],
}  # fmt: skip


def build(entity: str, project: str, name: str = VIEW) -> Any:
    """Returns the workspace; its `save` makes the view on the server.

    Raises:
        ConfigError: If wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ConfigError(
            "the dashboard needs a package more: pip install 'diffusion-lab[workspace]'"
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

    if isinstance(panel, Lines):
        keys = {"metric_regex": panel.pattern} if panel.pattern else {"y": list(panel.keys)}
        return [wr.LinePlot(title=panel.title, x=STEP, log_y=panel.log, **keys)]
    if isinstance(panel, Values):
        return [wr.BarPlot(title=panel.title, metrics=list(panel.keys))]
    if isinstance(panel, Pictures):
        return [wr.MediaBrowser(title=panel.title, media_keys=list(panel.keys), num_columns=1)]
    columns = [wr.Config(key) for key in panel.choices] + [wr.SummaryMetric(panel.figure)]
    parallel = [wr.ParallelCoordinatesPlotColumn(metric=column) for column in columns]
    return [
        wr.ParallelCoordinatesPlot(title=panel.title, columns=parallel),
        wr.ParameterImportancePlot(with_respect_to=panel.figure),
    ]


def main(arguments: list[str]) -> int:
    """Makes the view and prints its address; returns the exit code."""
    known = {"entity", "project", "name"}
    given = dict(text.partition("=")[::2] for text in arguments)
    try:
        if unknown := sorted(given.keys() - known):
            raise ConfigError(f"{unknown[0]} is no key; choose from {', '.join(sorted(known))}")
        if missing := [key for key in ("entity", "project") if not given.get(key)]:
            raise ConfigError(f"{missing[0]}=... is missing\n\n{__doc__}")
        workspace = build(**given)
        try:
            print(workspace.save().url)
        except Exception as error:  # of the server or the client, of many kinds
            raise RunError(
                f"the view is not made: {error}; log in with: wandb login, and see whether "
                f"entity={given['entity']} is yours and holds project={given['project']}"
            ) from error
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
