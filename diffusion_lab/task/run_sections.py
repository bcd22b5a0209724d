"""Report sections on the evaluated run: settings, prior and configurations."""

__all__ = ["run_sections"]

import yaml

from diffusion_lab.report.page import ConfigSection, KeyValueSection
from diffusion_lab.runs import Run


def run_sections(
    run: Run, settings: dict[str, str], config: str
) -> list[KeyValueSection | ConfigSection]:
    """Returns the sections on settings, prior and configurations.

    Arguments:
        run: The run that was evaluated.
        settings: Settings of this evaluation, by name.
        config: Configuration of the evaluation, as YAML.
    """
    parameters = sum(p.numel() for p in run.denoiser.parameters())
    return [
        KeyValueSection(
            "Settings",
            {
                **settings,
                "Checkpoint": str(run.checkpoint),
                "Training": run.origin,
                "Network": f"{parameters:,} parameters",
                "Schedule": type(run.denoiser.schedule).__name__,
                "Data": f"{run.config['data']['source']}, {run.config['data']['size']} pixels",
            },
        ),
        ConfigSection("Configuration of this evaluation", config),
        ConfigSection(
            "Configuration of the training", yaml.safe_dump(run.config, sort_keys=False)
        ),
    ]
