"""The only place that turns configuration into objects."""

__all__ = ["instantiate"]

from typing import Any

import hydra
from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from diffusion_lab.errors import ConfigError


def instantiate(node: DictConfig | dict[str, Any], key: str, **arguments: Any) -> Any:
    """Makes the object that a node of the configuration describes by `_target_`.

    Nodes inside it become objects as well; lists and dictionaries arrive as Python's own.

    Arguments:
        node: The node.
        key: Its name, for error messages.
        arguments: Further arguments, passed on untouched: Hydra would take dictionaries among
            them for configuration.

    Raises:
        ConfigError: If the target does not exist or refuses an argument.
    """
    target = node.get("_target_", "no _target_")
    try:
        return hydra.utils.instantiate(node, _convert_="all", _partial_=True)(**arguments)
    except InstantiationException as error:
        reason = str(error) if error.__cause__ is None else str(error.__cause__)
        raise ConfigError(f"{key} ({target}): {reason}") from error
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(f"{key} ({target}): {error}") from error
