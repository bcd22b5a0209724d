"""What the commands tell every logger: the configuration, and the results of an evaluation.

A logger takes numbers; pictures and tables too if it has `log_image` and `log_table`, as W&B's
and TensorBoard's have. The keys are the same everywhere.
"""

__all__ = ["close_loggers", "dashboard_config", "log_config", "log_results", "make_loggers"]

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from diffusion_lab.runs.instantiate import instantiate

HERE = {"paths", "logger", "resume"}  # keys that say where a command ran, not what it did


def make_loggers(config: DictConfig, but: str | None = None) -> list[Logger]:
    """Makes the loggers of the configuration, all `but` one."""
    nodes = (config.logger or {}).items()
    return [instantiate(node, f"logger.{key}") for key, node in nodes if key != but]


def close_loggers(config: DictConfig, failed: bool) -> None:
    """Ends what outlives a command, as failed or not."""
    if "wandb" in (config.logger or {}):
        from diffusion_lab.logger.wandb_logger import close  # its import costs a second

        close(failed)


def dashboard_config(config: DictConfig) -> dict[str, Any]:
    """Returns the resolved configuration without this machine's directories.

    They differ between runs that are the same, and are nobody else's business.
    """

    def kept(node: dict[str, Any]) -> dict[str, Any]:
        return {
            key: kept(value) if isinstance(value, dict) else value
            for key, value in node.items()
            if key not in HERE and not key.endswith(("dir", "directory", "dirpath"))
        }

    return kept(OmegaConf.to_container(config, resolve=True))


def log_config(loggers: Iterable[Logger], config: DictConfig) -> None:
    """Shows the configuration of a command beside its figures."""
    for logger in loggers:
        logger.log_hyperparams(dashboard_config(config))


def log_results(loggers: Iterable[Logger], directory: Path) -> None:
    """Shows what an evaluation has written: its table and its pictures.

    Each row of results.csv is the number eval/<estimate>_<metric>, and all of them the table
    eval/results; samples/<name>.png is the picture eval/<name>.

    Arguments:
        loggers: Where to.
        directory: The evaluation's directory.
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
