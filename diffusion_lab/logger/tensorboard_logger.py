"""TensorBoard: the same keys as everywhere, with pictures and tables, in the run's directory."""

__all__ = ["TensorBoard"]

from argparse import Namespace
from importlib.util import find_spec
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from diffusion_lab.errors import ConfigError


class TensorBoard(TensorBoardLogger):
    """Writes event files to <directory>/tensorboard.

    Arguments:
        directory: The run's directory.

    Raises:
        ConfigError: If TensorBoard is not installed.
    """

    def __init__(self, directory: str) -> None:
        if find_spec("tensorboard") is None:
            raise ConfigError(
                "logger=tensorboard needs a package more: pip install 'diffusion-lab[tensorboard]'"
            )
        super().__init__(directory, name="", version="tensorboard", default_hp_metric=False)

    def continue_from(self, step: int) -> None:
        """Hides what an interrupted run logged from a step on, which will be logged again."""
        if step:
            self._kwargs["purge_step"] = step + 1  # what was drawn at the step stays

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Shows the configuration as a text."""
        text = yaml.safe_dump(params, sort_keys=False, allow_unicode=True)
        # A line that starts with a tab is code in Markdown.
        self.experiment.add_text("config", "\t" + text.replace("\n", "\n\t"))

    @rank_zero_only
    def log_image(self, key: str, images: list[Image.Image], step: int | None = None) -> None:
        """Shows a picture; of several the first."""
        pixels = np.asarray(images[0].convert("RGB"))
        self.experiment.add_image(key, pixels, step, dataformats="HWC")

    @rank_zero_only
    def log_table(
        self, key: str, columns: list[str], data: list[list[Any]], step: int | None = None
    ) -> None:
        """Shows a table as a text."""
        rows = [columns, ["---"] * len(columns), *data]
        lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
        self.experiment.add_text(key, "\n".join(lines), step)

    @rank_zero_only
    def save(self) -> None:
        """Brings the files up to date; the configuration has a file of its own in the run."""
        self.experiment.flush()


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
