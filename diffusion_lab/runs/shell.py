"""Overrides and commands as text that can be pasted, for paths with any characters."""

__all__ = ["override", "override_parser", "quote_paths", "shell_command"]

import os
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

# Keys that hold a path. The user's shell has removed the quotes that Hydra would need.
PATH_KEYS = (
    "resume", "run", "ckpt", "pretrained", "model.path", "data.source", "data.cache_dir",
    "paths.cache_dir", "image", "observation", "hydra.run.dir", "hydra.sweep.dir",
)  # fmt: skip


@cache
def override_parser() -> OverridesParser:
    """Returns Hydra's parser of overrides."""
    return OverridesParser.create()


def override(key: str, value: str | Path) -> str:
    """Returns `key=value` in Hydra's syntax, with quotes if the value needs them.

    Arguments:
        key: The key.
        value: The value, a text or a path.
    """
    value = str(value)
    if _is_literal(f"{key}={value}", value):
        return f"{key}={value}"
    text = value.replace("${", r"\${")  # no reference to another key
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def _is_literal(text: str, value: str) -> bool:
    """Whether an override has exactly this text as its value."""
    try:
        parsed = override_parser().parse_override(text)
    except HydraException:
        return False
    plain = "${" not in value and not parsed.is_sweep_override()
    return plain and isinstance(parsed.value(), str) and parsed.value() == value


def shell_command(name: str, **keys: str | Path) -> str:
    """Returns a command for a shell: `python train.py resume=outputs/train/a`.

    Arguments:
        name: "train" or "eval".
        keys: Values by key.
    """
    return shlex.join(["python", f"{name}.py", *(override(k, v) for k, v in keys.items())])


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of a command, with quotes around paths that Hydra cannot read.

    Arguments:
        arguments: The arguments.
    """
    return [_quoted(text) for text in arguments]


def _quoted(text: str) -> str:
    key, _, value = text.partition("=")
    if key.lstrip("+") not in PATH_KEYS or not value:
        return text
    if not os.path.exists(os.path.expanduser(value)):  # does not raise for any text
        try:
            override_parser().parse_override(text)
        except HydraException:
            return override(key, value)
        return text
    return override(key, value)
