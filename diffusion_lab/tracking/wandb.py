"""Weights & Biases: offline where there is no account, and one run id for each run directory."""

__all__ = ["close", "make_logger"]

import logging
import os
import secrets
from pathlib import Path

import wandb
from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)


def make_logger(directory: str, project: str, name: str) -> WandbLogger:
    """Returns the logger of a run.

    Without an account (no WANDB_API_KEY and no `wandb login`) it writes to the run's directory;
    `wandb sync` uploads that later. WANDB_MODE decides if it is set.

    Arguments:
        directory: The run's directory; keeps the run's id in `wandb_id`, which a resume reuses.
        project: The project on the dashboard.
        name: The run's name on the dashboard.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    identity = path / "wandb_id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    mode = os.environ.get("WANDB_MODE")
    offline = mode == "offline" or (mode is None and not wandb.login(prompt=False))
    if offline:
        log.info("W&B is offline; upload later with: wandb sync %s/wandb/offline-run-*", directory)
    return WandbLogger(
        name=name,
        project=project,
        save_dir=directory,
        id=identity.read_text().strip(),
        offline=offline,
        resume=None if offline else "allow",
    )


def close(failed: bool) -> None:
    """Ends the run on the dashboard; the next job of a sweep would else log into it.

    Arguments:
        failed: Whether to mark it as failed.
    """
    if wandb.run is not None:
        wandb.finish(exit_code=int(failed))
