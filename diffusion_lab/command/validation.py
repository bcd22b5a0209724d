"""Validation of a configuration before any data or weights are opened.

Hydra refuses unknown options and keys by itself. The arguments of every node with a `_target_` are
checked against the annotations of that class or function (see `diffusion_lab.constraints`), and
schedule, sampler and the other inexpensive parts are built, so that constraints between their
arguments hold as well. The keys of the command itself are declared here.
"""

__all__ = [
    "EVAL_KEYS",
    "TRAIN_KEYS",
    "check_eval",
    "check_train",
    "check_values",
    "constraints_by_key",
]

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast, get_args, get_origin

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from diffusion_lab.command.parts import make_sampler
from diffusion_lab.constraints import (
    Node,
    NonEmptyStr,
    NonNegative,
    NonNegativeInt,
    PositiveInt,
    UnitInterval,
    allows,
    describe,
)
from diffusion_lab.errors import ArgumentError, ConfigError
from diffusion_lab.nn.unet import UNet, check_size
from diffusion_lab.runs.compose import CONFIG_PATH
from diffusion_lab.runs.instantiate import check_node, constraints_of, find_target, instantiate
from diffusion_lab.runs.typed_config import REFERENCE
from diffusion_lab.task import Task
from diffusion_lab.training.compatibility import check_model
from diffusion_lab.training.post_hoc_ema import Width

TRAIN_KEYS: Mapping[str, Any] = {
    "name": NonEmptyStr,
    "seed": NonNegativeInt,
    "resume": NonEmptyStr | None,
    "pretrained": NonEmptyStr | None,
    "allow": NonEmptyStr | list[NonEmptyStr] | None,
    "compile": bool,
    "label_dropout": UnitInterval,
    "paths.output_dir": NonEmptyStr,
    "paths.cache_dir": NonEmptyStr,
}
EVAL_KEYS: Mapping[str, Any] = {
    "resume": NonEmptyStr | None,
    "run": NonEmptyStr | None,
    "ckpt": NonEmptyStr | None,
    "allow": NonEmptyStr | list[NonEmptyStr] | None,
    "ema": bool | Width,
    "seed": NonNegativeInt,
    "label": NonEmptyStr | NonNegativeInt | None,
    "guidance_scale": NonNegative,
    "batch_size": PositiveInt | Literal["auto"],
    "precision": Literal["float32", "bfloat16"],
    "compile": bool,
    "cuda_graphs": bool,
    "data.source": NonEmptyStr | None,
    "data.cache_dir": NonEmptyStr,
    "model.path": NonEmptyStr | None,
    "paths.output_dir": NonEmptyStr,
    "guidance": Node | None,
    "operator": Node | None,
}
MAPPINGS = (dict, Mapping)


def _is_group(node: Any) -> TypeGuard[DictConfig]:
    """Whether a node holds keys itself, and is neither null nor a reference."""
    return isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation()


def _leaves(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields full keys and unresolved values of everything that is not a group of keys."""
    for name in map(str, config):
        node = config._get_node(name)
        key = f"{prefix}{name}"
        if _is_group(node):
            yield from _leaves(node, f"{key}.")
        else:
            yield key, None if node is None else node._value()


def _references(config: DictConfig) -> dict[str, str]:
    """Keys whose value is that of another key, `${other}`, and the key where it is set."""
    found = {}
    for key, value in _leaves(config):
        match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if match:
            found[key] = match[1]
    for key in found:
        while found[key] in found:
            found[key] = found[found[key]]
    return found


def _resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers, without what Hydra alone can resolve in a command."""
    values: dict[str, Any] = {}
    for name in map(str, config):
        try:
            value = config[name]
        except InterpolationResolutionError:
            if HydraConfig.initialized():
                raise
            continue
        if isinstance(value, DictConfig):
            values[name] = _resolved(value)
        elif OmegaConf.is_config(value):
            values[name] = OmegaConf.to_container(value, resolve=True)
        else:
            values[name] = value
    return values


def check_values(config: DictConfig, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Checks every key and value of a configuration by itself; returns it as plain containers.

    Arguments:
        config: The composed configuration.
        keys: `TRAIN_KEYS` or `EVAL_KEYS`.

    Raises:
        ConfigError: If a key is unknown or a value is not allowed; names the key.
    """
    values, references = _resolved(config), _references(config)
    used = set(references.values())

    def check_group(group: Mapping[str, Any], prefix: str) -> None:
        for name, value in group.items():
            key = f"{prefix}{name}"
            if isinstance(value, Mapping) and "_target_" in value:
                check_node(value, key, references)
            elif key in keys:
                if not allows(keys[key], value):
                    raise ConfigError(str(ArgumentError(key, value, describe(keys[key]))))
            elif isinstance(value, Mapping):
                check_group(value, f"{key}.")
            elif value is not None and any(k.startswith(f"{key}.") for k in (*used, *keys)):
                raise ConfigError(
                    f"{key}={value} is not allowed; it is a group of keys: {key}.<key>=<value>"
                )

    _check_added_keys(values, keys, used)
    check_group(values, "")
    return values


def _check_added_keys(values: Mapping[str, Any], keys: Mapping[str, Any], used: set[str]) -> None:
    """Checks that keys added on the command line, `+key=value`, are used by something.

    Hydra refuses other unknown keys itself; those inside of a node are checked with the node.
    """
    if not HydraConfig.initialized():
        return
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+").partition("=")[0]
        if not override.startswith("+") or Path(CONFIG_PATH, key.partition("@")[0]).is_dir():
            continue
        group, *rest = key.split(".")
        node: Any = values.get(group)
        while rest and isinstance(node, Mapping) and "_target_" not in node:
            node = node.get(rest.pop(0))
        inside = isinstance(node, Mapping) and "_target_" in node
        if not inside and key not in keys and key not in used:
            raise ConfigError(f"{key} is not a key of this command")


def constraints_by_key(config: DictConfig, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the annotation that constrains each key; keys without one are missing.

    Arguments:
        config: The composed configuration.
        keys: `TRAIN_KEYS` or `EVAL_KEYS`.
    """
    found = dict(keys)

    def walk(group: DictConfig, prefix: str, hints: Mapping[str, Any]) -> None:
        if isinstance(group.get("_target_"), str):
            hints = constraints_of(find_target(group, prefix))
        for name in map(str, group):
            node, annotation = group._get_node(name), hints.get(name)
            if _is_group(node):
                values = get_args(annotation)[1:] if get_origin(annotation) in MAPPINGS else ()
                walk(node, f"{prefix}{name}.", {str(k): v for k in node for v in values})
            elif annotation is not None:
                found.setdefault(f"{prefix}{name}", annotation)

    walk(config, "", {})
    for key, origin in _references(config).items():
        if key in found:
            found.setdefault(origin, found[key])
    return found


def check_train(config: DictConfig) -> None:
    """Checks the configuration of a training run.

    Arguments:
        config: The composed configuration.

    Raises:
        ConfigError: If a key is unknown, a value is not allowed, or values contradict each other.
    """
    values = check_values(config, TRAIN_KEYS)
    parts = {
        key: instantiate(values[key], key)
        for key in ("schedule", "parameterization", "loss", "time", "data")
    }
    with torch.device("meta"):  # shapes without memory
        network = instantiate(values["network"], "network")
    data = parts.pop("data")
    check_model(network, **parts)
    if isinstance(network, UNet):
        try:
            check_size((data.size, data.size), len(network.down))
        except ValueError as error:
            raise ConfigError(f"data.size={data.size} does not fit network: {error}") from error
    samplers = {"sampler": values["sampler"], "fid.sampler": values["fid"]["sampler"]}
    for key, sampler in samplers.items():
        make_sampler(sampler, parts["schedule"], key)
    for name, node in values["callbacks"].items():
        check_schedule = getattr(find_target(node, f"callbacks.{name}"), "check_schedule", None)
        if check_schedule is not None:
            key = f"callbacks.{name}.sampler"
            check_schedule(
                make_sampler(node["sampler"], parts["schedule"], key), parts["schedule"]
            )
    if values["sampler"].get("variance") == "learned" and not getattr(
        network, "learn_variance", False
    ):
        raise ConfigError(
            "sampler.variance=learned, but the network learns no variance; set "
            "sampler.variance=small or large, or network.learn_variance=true loss=hybrid"
        )


def check_eval(config: DictConfig) -> None:
    """Checks the configuration of an evaluation, as far as that is possible without the run.

    Arguments:
        config: The composed configuration.

    Raises:
        ConfigError: If a key is unknown, a value is not allowed, or values contradict each other.
    """
    values = check_values(config, EVAL_KEYS)
    sources = {key: values[key] for key in ("run", "ckpt") if values[key] is not None}
    if values.get("model") is not None:
        sources["model.path"] = values["model"]["path"]
        if values["ema"] is not True:
            raise ConfigError(
                f"ema={config.ema} selects weights of a run; model=pretrained has only one set"
            )
    if len(sources) > 1:
        text = " and ".join(f"{key}={value}" for key, value in sources.items())
        raise ConfigError(f"{text} exclude each other; each names the prior")
    for key in ("schedule", "sampler", "guidance"):
        if values.get(key) is not None:
            instantiate(values[key], key)
    task = cast(type[Task], find_target(values["task"], "task"))
    task.check_keys(values["task"])
    if not task.uses_operator:
        return
    if values["operator"] is None:
        raise ConfigError("operator=none, but this task needs an operator; set operator=identity")
    if values["guidance"] is None:
        raise ConfigError(
            "guidance=none samples the prior, but this task samples a posterior; set "
            "guidance=truncated"
        )
