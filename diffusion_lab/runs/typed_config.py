"""Typed wrappers of OmegaConf's functions, whose return types include lists, texts and None."""

__all__ = ["read_config", "read_overrides", "resolve_references", "to_dict", "to_list"]

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # ${other.key}


def read_config(path: Path) -> DictConfig:
    """Returns the configuration in a YAML file, which holds keys and values.

    Arguments:
        path: The file.

    Raises:
        OSError: If the file cannot be read.
    """
    return cast(DictConfig, OmegaConf.load(path))


def read_overrides(path: Path) -> list[str]:
    """Returns the overrides in a YAML file, with no interpolation resolved.

    Arguments:
        path: The file.

    Raises:
        OSError: If the file cannot be read.
    """
    return to_list(OmegaConf.load(path))


def to_dict(config: DictConfig) -> dict[str, Any]:
    """Returns a configuration as plain dictionaries and lists, with interpolations resolved.

    Arguments:
        config: The configuration.
    """
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def to_list(config: Any) -> list[str]:
    """Returns a list of texts as they are written, with no interpolation resolved.

    Arguments:
        config: The list.
    """
    return cast(list[str], OmegaConf.to_container(config, resolve=False))


def resolve_references(config: DictConfig) -> dict[str, Any]:
    """Returns a configuration as plain containers, with references to scalar keys resolved.

    No resolver is called: `${oc.env:HOME}` in a file of somebody else stays a text.

    Arguments:
        config: The configuration.
    """
    root = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))

    def scalar(text: str) -> Any:
        for _ in range(10):  # a reference to a reference, unless they form a circle
            match = REFERENCE.fullmatch(text)
            node: Any = root
            for name in match[1].split(".") if match else ():
                node = node.get(name) if isinstance(node, Mapping) else None
            if match is None or isinstance(node, Mapping | list):
                break
            if not isinstance(node, str):
                return node
            text = node
        return text

    def resolved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: resolved(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [resolved(inner) for inner in value]
        return scalar(value) if isinstance(value, str) else value

    return cast(dict[str, Any], resolved(root))
