"""Logging of configurations and evaluation results to all loggers.

Every logger takes numbers. Loggers with `log_image` and `log_table` (W&B, TensorBoard) also take
pictures and tables. All loggers use the same keys.
"""

__all__ = ["close_loggers", "dashboard_config", "log_config", "log_results", "make_loggers"]

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig
from PIL import Image

from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.runs.typed_config import to_dict

LOCAL_KEYS = {"paths", "logger", "resume"}  # not part of the experiment


def make_loggers(config: DictConfig, but: str | None = None) -> list[Logger]:
    """Returns the loggers of the configuration, except the one named `but`."""
    nodes = (config.logger or {}).items()
    return [instantiate(node, f"logger.{key}") for key, node in nodes if key != but]


def close_loggers(config: DictConfig, failed: bool) -> None:
    """Finishes the W&B run of a command."""
    if "wandb" in (config.logger or {}):
        from diffusion_lab.logger.wandb_logger import close  # its import takes a second

        close(failed)


def dashboard_config(config: DictConfig) -> dict[str, Any]:
    """Returns the resolved configuration without directories.

    Directories differ between equal runs, and can be private.
    """

    def kept(node: dict[str, Any]) -> dict[str, Any]:
        return {
            key: kept(value) if isinstance(value, dict) else value
            for key, value in node.items()
            if key not in LOCAL_KEYS and not key.endswith(("dir", "directory", "dirpath"))
        }

    return kept(to_dict(config))


def log_config(loggers: Iterable[Logger], config: DictConfig) -> None:
    """Logs the configuration of a command."""
    for logger in loggers:
        logger.log_hyperparams(dashboard_config(config))


def log_results(loggers: Iterable[Logger], directory: Path) -> None:
    """Logs the table and the pictures of an evaluation.

    Each row of results.csv is logged as the number eval/<estimate>_<metric>, the whole file as
    the table eval/results, and samples/<name>.png as the picture eval/<name>.

    Arguments:
        loggers: The loggers.
        directory: Directory of the evaluation.
    """
    rows: list[list[Any]] = []
    if (path := directory / "results.csv").exists():
        with open(path, newline="") as file:
            rows = [
                [row["estimate"], row["metric"], float(row["mean"]), float(row["stderr"]),
                 int(row["n"])] for row in csv.DictReader(file)
            ]  # fmt: skip
    for logger in loggers:
        if rows:
            figures = {f"eval/{estimate}_{metric}": mean for estimate, metric, mean, *_ in rows}
            logger.log_metrics(figures, step=0)
        if rows and hasattr(logger, "log_table"):
            columns = ["estimate", "metric", "mean", "stderr", "n"]
            logger.log_table("eval/results", columns, rows, step=0)
        if hasattr(logger, "log_image"):
            for picture in sorted((directory / "samples").glob("*.png")):
                with Image.open(picture) as image:
                    logger.log_image(f"eval/{picture.stem}", [image], step=0)
        logger.save()
