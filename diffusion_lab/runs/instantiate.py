"""Conversion of configuration nodes to objects; the only place that calls `_target_`."""

__all__ = ["check_node", "constraints_of", "find_target", "instantiate"]

import functools
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, cast, get_args, get_origin

import hydra
from hydra.errors import InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.constraints import allows, annotations, converted, describe, unpacked_keywords
from diffusion_lab.deprecated import current_target
from diffusion_lab.errors import ArgumentError, ConfigError
from diffusion_lab.runs.external import EXTERNAL
from diffusion_lab.runs.typed_config import to_dict

RESERVED = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")

Node = DictConfig | Mapping[str, Any]


def _plain(node: Node) -> dict[str, Any]:
    if OmegaConf.is_config(node):
        return to_dict(cast(DictConfig, node))
    return dict(node)


def find_target(node: Node, key: str) -> Callable[..., Any]:
    """Returns the class or function that `_target_` names.

    Arguments:
        node: The node.
        key: Its full key, for error messages.

    Raises:
        ConfigError: If the node has no `_target_`, or there is nothing of that name.
    """
    name = node.get("_target_")
    if not isinstance(name, str):
        raise ConfigError(f"{key} needs a _target_, the name of a class or function")
    name = current_target(name)
    try:
        target: Callable[..., Any] = pkgutil.resolve_name(name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"{key}._target_={name} cannot be found: {error}") from error
    return target


def constraints_of(target: Callable[..., Any]) -> Mapping[str, Any]:
    """Returns the annotations of a target: its own, or those kept here for other libraries."""
    name = f"{target.__module__}.{getattr(target, '__qualname__', '')}"
    return EXTERNAL.get(name) or annotations(target)


def check_node(node: Node, key: str, names: Mapping[str, str] | None = None) -> None:
    """Checks the arguments of a node and of all nodes inside it, without calling anything.

    Arguments:
        node: The node, with a `_target_`.
        key: Its full key.
        names: Full keys to name in errors in place of a node's own, for values that refer to them.

    Raises:
        ConfigError: If the target does not exist, has no such argument, or refuses a value; names
            the full key, the value and what is allowed.
    """
    names = names or {}
    target = find_target(node, key)
    parameters = _parameters(target)
    hints = constraints_of(target)
    for name, value in cast(Mapping[str, Any], node).items():  # its keys are strings
        if name in RESERVED:
            continue
        full = names.get(f"{key}.{name}", f"{key}.{name}")
        if parameters is not None and name not in parameters:
            owner, options = getattr(target, "__name__", target), ", ".join(parameters)
            raise ConfigError(f"{full} is not a key of {owner}; its keys: {options or 'none'}")
        if isinstance(value, Mapping) and "_target_" in value:
            check_node(value, full, names)
        elif name in hints:
            _check_value(hints[name], full, value)


def _check_value(annotation: Any, key: str, value: Any) -> None:
    """Checks one value; of a mapping each value by itself, so that its own key is named."""
    if isinstance(value, Mapping) and get_origin(annotation) in (dict, Mapping):
        for name, inner in value.items():
            _check_value(get_args(annotation)[1], f"{key}.{name}", inner)
    elif not allows(annotation, value):
        raise ConfigError(str(ArgumentError(key, value, describe(annotation))))


def _parameters(target: Callable[..., Any]) -> list[str] | None:
    """The names of a target's arguments; None if it takes any."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    names = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            more = unpacked_keywords(target, parameter.name)
            if more is None:
                return None
            names += more
        else:
            names.append(parameter.name)
    return names


def instantiate(node: Node, key: str, **arguments: Any) -> Any:
    """Returns the object that a node of the configuration describes by `_target_`.

    Nodes inside it become objects as well; lists and dictionaries arrive as Python's own. A node
    with `_partial_: true` becomes a function of the arguments that are missing.

    Arguments:
        node: The node.
        key: Its full key, for error messages.
        arguments: Further arguments, passed on untouched.

    Raises:
        ConfigError: If the target does not exist, has no such argument, or refuses a value; names
            the full key, the value and what is allowed.
    """
    values = _plain(node)
    check_node(values, key)
    return _build(values, key, arguments)


def _build(values: Mapping[str, Any], key: str, arguments: Mapping[str, Any]) -> Any:
    inner = {name: v for name, v in values.items() if isinstance(v, Mapping) and "_target_" in v}
    objects = {name: _build(v, f"{key}.{name}", {}) for name, v in inner.items()}
    plain = {k: v for k, v in values.items() if k not in objects and k != "_partial_"}
    hints = constraints_of(find_target(values, key))
    plain = {k: converted(hints[k], v) if k in hints else v for k, v in plain.items()}
    plain["_target_"] = current_target(values["_target_"])
    try:
        # Hydra refuses targets that are known to be dangerous.
        made = hydra.utils.instantiate(plain, _convert_="all", _partial_=True)
        if values.get("_partial_"):
            return functools.partial(made, **objects, **arguments)
        return made(**objects, **arguments)
    except ArgumentError as error:
        raise ConfigError(
            str(ArgumentError(f"{key}.{error.name}", error.value, error.allowed))
        ) from error
    except InstantiationException as error:
        reason = str(error) if error.__cause__ is None else str(error.__cause__)
        raise ConfigError(f"{key} ({values['_target_']}): {reason}") from error
    except ConfigError:
        raise
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(f"{key} ({values['_target_']}): {error}") from error
