"""Typed wrappers of OmegaConf's functions, whose return types include lists, texts and None."""

__all__ = ["read_config", "read_overrides", "to_dict"]

from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf


def read_config(path: Path) -> DictConfig:
    """Returns the configuration in a YAML file, which holds keys and values.

    Arguments:
        path: The file.

    Raises:
        OSError: If the file cannot be read.
    """
    return cast(DictConfig, OmegaConf.load(path))


def read_overrides(path: Path) -> list[str]:
    """Returns the overrides in a YAML file, which holds a list of texts.

    Arguments:
        path: The file.

    Raises:
        OSError: If the file cannot be read.
    """
    return cast(list[str], list(OmegaConf.load(path)))


def to_dict(config: DictConfig) -> dict[str, Any]:
    """Returns a configuration as plain dictionaries and lists, with interpolations resolved.

    Arguments:
        config: The configuration.
    """
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
