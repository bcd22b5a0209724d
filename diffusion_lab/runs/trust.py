"""Trust in configurations from files: the components that a file of somebody else may name.

A checkpoint or a run directory that this user has written carries a signature (`signature`) and is
rebuilt as it is. In any other one

- every `_target_`, at any depth, must be a component that this package exports, a module of
  torch.nn, an optimizer of torch.optim, or in a module that the user allows (`allow=my_lab`, or
  the variable DIFFUSION_LAB_ALLOW);
- interpolations may refer to other keys only, since `${oc.env:...}` reads the environment;
- places (data sources, files to read, directories to write) count only if the user repeats them.

The user's own command line and conf/ are not restricted.
"""

__all__ = [
    "allowed_modules",
    "check_nodes",
    "check_source",
    "check_values",
    "compose_unsigned",
]

import inspect
import os
import pkgutil
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_lab.data.registry import GENERATED_SOURCES
from diffusion_lab.deprecated import current_target
from diffusion_lab.errors import RunError
from diffusion_lab.runs.compose import CONFIG_PATH
from diffusion_lab.runs.shell import override_parser
from diffusion_lab.runs.typed_config import REFERENCE, read_config

ALLOW = "DIFFUSION_LAB_ALLOW"  # environment variable: module prefixes, separated by commas
# Packages of this package whose exported classes compute, and neither read nor write files.
PARTS = (
    "data", "guidance", "loss", "nn", "operator", "parameterization", "sampler",
    "sampler.time_grid", "schedule", "timesteps", "training.lr_schedule",
)  # fmt: skip
# Further ones, which a command uses: loggers write to directories that `_is_place` checks.
COMMAND_PARTS = ("callback", "metric", "task")
COMMAND_NAMES = (
    "diffusion_lab.logger.csv_logger.MetricsCSV",
    "diffusion_lab.logger.tensorboard_logger.TensorBoard",
    "diffusion_lab.logger.wandb_logger.make_logger",
    "lightning.Trainer",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.callbacks.TQDMProgressBar",
    "lightning.pytorch.profilers.PyTorchProfiler",
)
TORCH = {"torch.nn": torch.nn.Module, "torch.optim": torch.optim.Optimizer}
TARGET = re.compile(r"(?:^|\.)_target_(?:\.|$)")
OPTION = re.compile(r"\w[\w-]*")  # the name of an option of a group


def allowed_modules(allow: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the modules that the user allows, by the key `allow` and by the environment.

    Arguments:
        allow: The value of the key: a module, a list of modules, or None.
    """
    own = (allow,) if isinstance(allow, str) else tuple(allow or ())
    found = (name.strip() for name in os.environ.get(ALLOW, "").split(","))
    return (*own, *filter(None, found))


def _is_component(name: str, *, command: bool) -> bool:
    """Whether a name is that of a component; imports nothing but this package and torch."""
    module, _, attribute = name.rpartition(".")
    if module in TORCH:
        found = getattr(torch.nn if module == "torch.nn" else torch.optim, attribute, None)
        return inspect.isclass(found) and issubclass(found, TORCH[module])
    if command and name in COMMAND_NAMES:
        return True
    part = module.removeprefix("diffusion_lab.")
    if part == module or part not in (*PARTS, *(COMMAND_PARTS if command else ())):
        return False
    exporting = import_module(module)
    return attribute in exporting.__all__ and inspect.isclass(getattr(exporting, attribute))


def _is_in(name: str, modules: Sequence[str]) -> bool:
    """Whether a class or function is defined in one of the modules, and not only imported."""
    prefixes = tuple(module for module in modules if f"{name}.".startswith(f"{module}."))
    if not prefixes:
        return False
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, ValueError, AttributeError) as error:
        raise RunError(f"_target_={name} cannot be found: {error}") from error
    home = f"{getattr(found, '__module__', None)}."
    return any(home.startswith(f"{module}.") for module in prefixes)


def _check_target(
    target: Any, key: str, origin: str, allow: Sequence[str], *, command: bool
) -> None:
    name = current_target(target) if isinstance(target, str) else None
    if name is not None and (_is_component(name, command=command) or _is_in(name, allow)):
        return
    module = str(name).rpartition(".")[0] or name
    raise RunError(
        f"{origin}: {key}={target} is refused. The file has no valid signature of this user, and "
        "such a file may name only components of diffusion_lab, torch.nn and torch.optim. If you "
        f"trust the file and know this module, set allow={module} (in Python, the environment "
        f"variable {ALLOW}={module})"
    )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the full keys and values of nested containers; empty containers count as values."""
    if not isinstance(value, Mapping | list | tuple) or not value:
        yield key, value
        return
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for name, inner in items:
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))


def _has_resolver(text: str) -> bool:
    """Whether a text holds more than references to keys; a lone $ may become an interpolation."""
    return "$" in REFERENCE.sub("", text)


def check_nodes(node: Any, key: str, origin: str, allow: Sequence[str], *, signed: bool) -> None:
    """Checks a node of a checkpoint's configuration, at any depth, before it is rebuilt.

    Arguments:
        node: The node as plain containers.
        key: Its full key.
        origin: The file, for error messages.
        allow: Modules that the user allows, see `allowed_modules`.
        signed: Whether this user has signed the configuration; its targets are then not checked.

    Raises:
        RunError: If a target is not allowed, or a value is an interpolation; names it. A saved
            configuration is resolved, and instantiating it must not read the environment.
    """
    for full, value in _leaves(node, key):
        if isinstance(value, str) and "${" in value:
            raise RunError(
                f"{origin}: {full}={value} is refused; the configuration in a checkpoint holds "
                "values, and no interpolations"
            )
        if TARGET.search(full) and not signed:
            _check_target(value, full, origin, allow, command=False)
        elif not isinstance(value, str | int | float | None | dict | list | tuple):
            raise RunError(f"{origin}: {full} holds a {type(value).__name__}, which is refused")


def check_source(source: Any, origin: str) -> None:
    """Checks the data source that a file of somebody else names.

    Arguments:
        source: The value of `data.source`; a node has been checked by `check_nodes`.
        origin: The file.

    Raises:
        RunError: If it is neither generated nor one of conf/data.
    """
    if isinstance(source, Mapping) or source in (*GENERATED_SOURCES, *_known_sources()):
        return
    raise RunError(
        f"{origin} names data.source={source}. The file has no valid signature of this user, and "
        "its sources are not opened without your consent; repeat the source in the command, or "
        "name another: data.source=..."
    )


def _known_sources() -> list[Any]:
    return [read_config(path).get("source") for path in Path(CONFIG_PATH, "data").glob("*.yaml")]


def _is_place(key: str, value: Any) -> bool:
    """Whether a key names something to read or upload, or where to write."""
    name = key.rpartition(".")[2]
    if value is None or (name == "weights" and not isinstance(value, str)):
        return False
    if name == "source" and isinstance(value, str) and value in GENERATED_SOURCES:
        return False
    names = (
        "source", "path", "image", "observation", "pretrained", "weights", "filename", "log_model",
    )  # fmt: skip
    return name in names or name.endswith(("dir", "directory", "dirpath"))


def compose_unsigned(
    name: str, directory: Path, old: Sequence[str], new: Sequence[str], allow: Sequence[str]
) -> DictConfig:
    """Composes the configuration of a run directory that this user has not signed.

    Arguments:
        name: "train" or "eval".
        directory: The directory.
        old: The overrides in it.
        new: The overrides of this command, which are not restricted.
        allow: Modules that the user allows, see `allowed_modules`.

    Raises:
        RunError: If the overrides in the directory name a target that is not allowed, a resolver,
            or a place that the command does not repeat.
    """
    origin = f"resume={directory}"
    for text in old:
        if not isinstance(text, str) or _has_resolver(text):
            raise RunError(
                f"{origin}: {text} in .hydra is refused. It has no valid signature of this user, "
                "and such an override may refer to other keys, but not call a resolver; replace "
                "it by a value there"
            )
    dropped = re.compile(r"[+~]*(hydra[./]|allow\b)")
    old = [text for text in old if not dropped.match(text)]
    parser = override_parser()
    try:
        before, after = parser.parse_overrides(list(old)), parser.parse_overrides(list(new))
        config = hydra.compose(name, [*old, *new])
        # The choices of groups alone: they name files of conf/, whose content is the user's. A
        # name in the directory with a dot may lead to a file elsewhere, as in ../../evil.
        named = [each for each in before if OPTION.fullmatch(str(each.value()))]
        choices = [e for e in (*named, *after) if Path(CONFIG_PATH, e.key_or_group).is_dir()]
        own = hydra.compose(name, [str(each.input_line) for each in choices])
    except (HydraException, OmegaConfBaseException) as error:
        raise RunError(f"{origin}: {error}") from error
    values, users = OmegaConf.to_container(config), OmegaConf.to_container(own)
    repeated = {
        key
        for each in after
        if each not in choices and not each.is_delete()
        for key, _ in _leaves(each.value(), each.key_or_group)
    }
    check_values(values, users, repeated, origin, allow)
    return config


def check_values(
    values: Any, users: Any, repeated: Collection[str], origin: str, allow: Sequence[str]
) -> None:
    """Checks those values of a configuration that are not the user's own.

    Arguments:
        values: The configuration as plain containers.
        users: What the user's conf/ has.
        repeated: Keys that the command sets.
        origin: The directory that the others are from, for error messages.
        allow: Modules that the user allows, see `allowed_modules`.

    Raises:
        RunError: If a target is not allowed, or a place is set.
    """
    own = dict(_leaves(users))
    for key, value in _leaves(values):
        if key in repeated or (key in own and own[key] == value):
            continue
        if TARGET.search(key):
            _check_target(value, key, origin, allow, command=True)
        elif "._args_" in key or _is_place(key, value):  # an argument without a key may be one
            raise RunError(
                f"{origin}: its overrides set {key}={value}. They have no valid signature of this "
                "user, and are not followed without your consent; repeat it in the command if "
                f"that is right: {key}=..."
            )
