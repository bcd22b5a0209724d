"""Weights & Biases logger: offline without an account, one run id per run directory."""

__all__ = ["close", "make_logger"]

import logging
import os
import secrets
from pathlib import Path
from typing import Literal

import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import WandbLogger

from diffusion_lab.constraints import NonEmptyStr, checked
from diffusion_lab.errors import ConfigError

log = logging.getLogger(__name__)

OFFLINE = {"offline", "dryrun"}  # values of WANDB_MODE; Lightning sets the second one


@checked
def make_logger(
    directory: NonEmptyStr,
    project: NonEmptyStr,
    name: NonEmptyStr,
    job_type: NonEmptyStr,
    log_model: Literal[False, True, "all"] = False,
) -> WandbLogger:
    """Returns the W&B logger of a run, whose group is its sweep.

    Without an account (no WANDB_API_KEY and no `wandb login`) the records stay in the run's
    directory, from where `wandb sync` uploads them. WANDB_MODE overrides this choice.

    Arguments:
        directory: Directory of the run; its file `wandb_id` keeps the run's id for a resume.
        project: W&B project.
        name: Experiment or task: the run's tag, and a part of the run's name.
        job_type: Type of the run: train or eval.
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
        # Explicit, because the login above has already read WANDB_MODE.
        mode="offline" if offline else None,
        resume=None if offline else "allow",
    )


def _sweep(path: Path) -> str | None:
    """Returns the name of the sweep's directory, also for a job that is resumed alone."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().sweep.dir).name
    return path.parent.name if (path.parent / "multirun.yaml").exists() else None


def close(failed: bool) -> None:
    """Finishes the W&B run; otherwise the next job of a sweep would log into it.

    Arguments:
        failed: Whether the run is marked as failed.
    """
    if wandb.run is not None:
        wandb.finish(exit_code=int(failed))
