"""Composing a configuration with Hydra, and the resolvers that conf/ uses."""

__all__ = ["CONFIG_PATH", "compose", "register_resolvers"]

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.runs.hydra_plugins import register_stand_ins
from diffusion_lab.runs.ranks import agree, gpus, is_first

PACKAGE = Path(__file__).parents[1]
# In a wheel the configuration lies inside the package, in a checkout beside it.
CONFIG_PATH = str(next(p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir()))


def _run_dir(resume: str | None, new: str) -> str:
    # A resolver must not raise: main checks. Naming the new path for a directory that does not
    # exist keeps Hydra from creating the misspelt one.
    return resume if resume and Path(resume).is_dir() else agree(new)


def _output_subdir(resume: str | None, directory: str) -> str | None:
    if not is_first():
        return None  # rank 0 writes it
    if not resume or not Path(resume).is_dir():
        # Hydra writes before the command is refused: not over the record of the run that is there.
        taken = Path(directory, "checkpoints", "last.ckpt").exists()
        return ".hydra/refused" if taken else ".hydra"
    count = len(list(Path(resume).glob(".hydra/resumed-*")))
    return f".hydra/resumed-{count + 1}"


def register_resolvers() -> None:
    """Registers the resolvers of conf/, and stand-ins for missing plugins.

    Must precede `hydra.main`.
    """
    register_stand_ins()
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
    OmegaConf.register_new_resolver("output_subdir", _output_subdir, replace=True)
    OmegaConf.register_new_resolver("gpus", gpus, replace=True)


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Composes a configuration outside `hydra.main`, for notebooks and tests.

    Arguments:
        config_name: "train" or "eval".
        overrides: As on the command line.
    """
    register_resolvers()
    with hydra.initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return hydra.compose(config_name, overrides)
