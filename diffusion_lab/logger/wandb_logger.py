"""Weights & Biases: offline where there is no account, and one run id for each run directory."""

__all__ = ["close", "make_logger"]

import logging
import os
import secrets
from pathlib import Path

import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import WandbLogger

from diffusion_lab.errors import ConfigError

log = logging.getLogger(__name__)

OFFLINE = {"offline", "dryrun"}  # what WANDB_MODE may say; Lightning sets the second by itself


def make_logger(
    directory: str, project: str, name: str, job_type: str, log_model: bool | str = False
) -> WandbLogger:
    """Returns the logger of a run, whose group is the sweep that it is part of.

    Without an account (no WANDB_API_KEY and no `wandb login`) it writes to the run's directory;
    `wandb sync` uploads that later. WANDB_MODE decides if it is set.

    Arguments:
        directory: The run's directory; keeps the run's id in `wandb_id`, which a resume reuses.
        project: The project on the dashboard.
        name: The experiment or task: the run's tag, and with the directory's name its name.
        job_type: What the run does: train or eval.
        log_model: Whether the best checkpoint is uploaded at the end; "all" uploads each one.

    Raises:
        ConfigError: If checkpoints are to be uploaded without an account.
    """
    path = Path(directory)
    mode = os.environ.get("WANDB_MODE")
    offline = mode in OFFLINE or (mode is None and not wandb.login(prompt=False))
    if offline and log_model:
        raise ConfigError(
            f"logger.wandb.log_model={log_model} uploads checkpoints, and W&B is offline; log in "
            "with `wandb login` (and unset WANDB_MODE), or set logger.wandb.log_model=false"
        )
    path.mkdir(parents=True, exist_ok=True)
    identity = path / "wandb_id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    if offline:
        log.info("W&B is offline; upload later with: wandb sync %s/wandb/offline-run-*", directory)
    return WandbLogger(
        name=f"{name}/{path.name}",
        project=project,
        save_dir=directory,
        id=identity.read_text().strip(),
        group=_sweep(path),
        job_type=job_type,
        tags=[name],
        log_model=log_model,
        offline=offline,
        # Not left to WANDB_MODE, which the login above has read already.
        mode="offline" if offline else None,
        resume=None if offline else "allow",
    )


def _sweep(path: Path) -> str | None:
    """The name of the sweep's directory; of a job that is resumed alone, too."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().sweep.dir).name
    return path.parent.name if (path.parent / "multirun.yaml").exists() else None


def close(failed: bool) -> None:
    """Ends the run on the dashboard; the next job of a sweep would else log into it.

    Arguments:
        failed: Whether to mark it as failed.
    """
    if wandb.run is not None:
        wandb.finish(exit_code=int(failed))
