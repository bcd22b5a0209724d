"""Composing a configuration with Hydra, and the resolvers that conf/ uses."""

__all__ = ["CONFIG_PATH", "compose", "compose_groups", "register_resolvers"]

from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.deprecated import current_overrides
from diffusion_lab.redact import refuse_secrets
from diffusion_lab.runs.hydra_plugins import register_placeholders
from diffusion_lab.runs.ranks import broadcast_from_rank_zero, gpus, is_rank_zero

PACKAGE = Path(__file__).parents[1]
# conf/ is inside the package in a wheel, and beside it in a checkout.
CONFIG_PATH = str(next(p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir()))


def _run_dir(resume: str | None, new: str) -> str:
    # A resolver must not raise; the command checks `resume`. The new path is returned for a
    # directory that does not exist, so that Hydra does not create a misspelled one.
    return resume if resume and Path(resume).is_dir() else broadcast_from_rank_zero(new)


def _output_subdir(resume: str | None, directory: str) -> str | None:
    if not is_rank_zero():
        return None  # rank 0 writes it
    if not resume or not Path(resume).is_dir():
        # Hydra writes before the command can refuse; the record of an existing run is kept.
        taken = Path(directory, "checkpoints", "last.ckpt").exists()
        return ".hydra/refused" if taken else ".hydra"
    count = len(list(Path(resume).glob(".hydra/resumed-*")))
    return f".hydra/resumed-{count + 1}"


def register_resolvers() -> None:
    """Registers the resolvers of conf/, and placeholders for plugins that are not installed.

    Must be called before `hydra.main`.
    """
    register_placeholders()
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
    OmegaConf.register_new_resolver("output_subdir", _output_subdir, replace=True)
    OmegaConf.register_new_resolver("gpus", gpus, replace=True)


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Composes a configuration outside `hydra.main`, for notebooks and tests.

    Arguments:
        config_name: "train" or "eval".
        overrides: Overrides, as on the command line.

    Raises:
        ConfigError: If one holds a secret in an address.
    """
    refuse_secrets("\n".join(overrides))
    register_resolvers()
    with hydra.initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return hydra.compose(config_name, current_overrides(overrides))


def compose_groups(*overrides: str) -> DictConfig:
    """Composes single groups of conf/, without the rest of a command's configuration.

    Arguments:
        overrides: `+group=option` for each group, then settings of them.
    """
    register_resolvers()
    instance = GlobalHydra.instance()
    running = instance.hydra  # that of the command; Hydra refuses a second one
    instance.clear()
    try:
        with hydra.initialize_config_dir(CONFIG_PATH, version_base="1.3"):
            return hydra.compose(overrides=list(overrides))
    finally:
        instance.hydra = running
