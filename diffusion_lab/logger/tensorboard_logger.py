"""TensorBoard logger, with pictures and tables."""

__all__ = ["TensorBoard"]

from argparse import Namespace
from importlib.util import find_spec
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from diffusion_lab.constraints import NonEmptyStr, checked
from diffusion_lab.errors import ConfigError


class TensorBoard(TensorBoardLogger):
    """Writes event files to <directory>/tensorboard.

    Arguments:
        directory: Directory of the run.

    Raises:
        ConfigError: If TensorBoard is not installed.
    """

    @checked
    def __init__(self, directory: NonEmptyStr) -> None:
        if find_spec("tensorboard") is None:
            raise ConfigError(
                "logger=tensorboard needs TensorBoard: pip install 'diffusion-lab[tensorboard]'"
            )
        super().__init__(directory, name="", version="tensorboard", default_hp_metric=False)

    def continue_from(self, step: int) -> None:
        """Hides the events of an interrupted run from a step on; they will be logged again."""
        if step:
            self._kwargs["purge_step"] = step + 1  # pictures of the step itself stay

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Logs the configuration as text."""
        text = yaml.safe_dump(params, sort_keys=False, allow_unicode=True)
        # A line that starts with a tab is code in Markdown.
        self.experiment.add_text("config", "\t" + text.replace("\n", "\n\t"))

    @rank_zero_only
    def log_image(self, key: str, images: list[Image.Image], step: int | None = None) -> None:
        """Logs the first picture."""
        pixels = np.asarray(images[0].convert("RGB"))
        self.experiment.add_image(key, pixels, step, dataformats="HWC")

    @rank_zero_only
    def log_table(
        self, key: str, columns: list[str], data: list[list[Any]], step: int | None = None
    ) -> None:
        """Logs a table as text."""
        rows = [columns, ["---"] * len(columns), *data]
        lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
        self.experiment.add_text(key, "\n".join(lines), step)

    @rank_zero_only
    def save(self) -> None:
        """Flushes the event files; the configuration is in `.hydra`."""
        self.experiment.flush()


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
