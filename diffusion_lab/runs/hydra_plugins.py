"""Hydra's launcher and sweeper plugins, and placeholders for those that are not installed.

A plugin is an optional dependency. With a placeholder, a configuration that names a missing plugin
can still be composed; only a sweep that would use it is refused, with the command that installs
it.
"""

__all__ = ["check_plugins", "register_placeholders"]

import re
from importlib.util import find_spec

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from diffusion_lab.errors import ConfigError

PLUGINS = {  # name in Hydra's group -> package, extra that installs it
    "hydra/launcher": {
        "joblib": ("hydra_joblib_launcher", "joblib"),
        "submitit_local": ("hydra_submitit_launcher", "slurm"),
        "submitit_slurm": ("hydra_submitit_launcher", "slurm"),
        "ray": ("hydra_ray_launcher", "ray"),
    },
    "hydra/sweeper": {"optuna": ("hydra_optuna_sweeper", "optuna")},
}


def installed(package: str) -> bool:
    """Whether a plugin is installed."""
    try:
        return find_spec(f"hydra_plugins.{package}") is not None
    except ModuleNotFoundError:  # no plugin at all
        return False


def register_placeholders() -> None:
    """Registers a placeholder for every missing plugin; must be called before composing."""
    for group, names in PLUGINS.items():
        for name, (package, _) in names.items():
            if not installed(package):
                node = {"_target_": f"hydra_plugins.{package}"}
                ConfigStore.instance().store(
                    group=group, name=name, node=node, provider="diffusion_lab"
                )


def check_plugins(hydra: DictConfig) -> None:
    """Checks the launcher and the sweeper of a sweep.

    Arguments:
        hydra: The configuration's node `hydra`.

    Raises:
        ConfigError: If one is not installed; names the extra.
    """
    for group, names in PLUGINS.items():
        kind = group.partition("/")[2]
        packages = dict(names.values())
        found = re.match(r"hydra_plugins\.(\w+)", hydra[kind]._target_)
        if found and found[1] in packages and not installed(found[1]):
            own = {"launcher": "launcher", "sweeper": "sweep"}[kind]
            choice = hydra.runtime.choices.get(own) or hydra.runtime.choices[group]
            raise ConfigError(
                f"{own}={choice} needs {found[1].replace('_', '-')}; "
                f"pip install 'diffusion-lab[{packages[found[1]]}]'"
            )
