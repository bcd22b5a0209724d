"""Configuration reference, generated from the comments in conf/ and the constructors' annotations.

Every file becomes a table with key, default, meaning and allowed values. `make reference` writes
docs/configuration.md, which is part of the repository.
"""

__all__ = ["Entry", "allowed", "api", "configuration", "entries", "files"]

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import diffusion_lab
from diffusion_lab.command import validation
from diffusion_lab.constraints import Node, describe
from diffusion_lab.errors import ConfigError
from diffusion_lab.runs.compose import CONFIG_PATH
from diffusion_lab.runs.instantiate import constraints_of, find_target

CONF = Path(CONFIG_PATH)
ONLY_EVAL = {"benchmark", "guidance", "model", "operator", "task"}
SAME = {"model.data.": "data.", "fid.sampler.": "sampler."}  # groups that are used twice
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
LINE = re.compile(r"^(?P<indent> *)(?P<name>\w+):(?P<value>[^#]*?)(?: +# (?P<comment>.*))?$")


@dataclass(frozen=True)
class Entry:
    """A key of a file in conf/.

    Attributes:
        group: The node of the composed configuration that has the key, for example "task".
        target: The `_target_` of this node; empty if it has none.
        name: The last part of the key.
        value: The value in the file.
        comment: The comment in the file.
    """

    group: str
    target: str
    name: str
    value: Any
    comment: str

    @property
    def key(self) -> str:
        return f"{self.group}.{self.name}" if self.group else self.name


def files() -> list[Path]:
    """Returns the files in conf/, starting with train.yaml and eval.yaml."""
    options = sorted(p for p in CONF.rglob("*.yaml") if "local" not in p.parts)
    return sorted(options, key=lambda path: path.parent != CONF)


def entries(path: Path) -> Iterator[Entry]:
    """Yields the keys of a file that have a value, except those of Hydra."""
    text = path.read_text()
    config = OmegaConf.load(path)
    package = ".".join(path.parent.relative_to(CONF).parts)
    if "# @package _global_" in text:
        package = ""
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = LINE.match(line)
        if not match:
            continue
        indent, name = len(match["indent"]), match["name"]
        stack = [(i, n) for i, n in stack if i < indent] + [(indent, name)]
        names = [n for _, n in stack]
        if names[0] in ("defaults", "hydra"):
            continue
        node = OmegaConf.select(config, ".".join(names[:-1])) if len(names) > 1 else config
        value = OmegaConf.to_container(node, resolve=False)[name]
        if name == "_target_" or isinstance(value, dict):
            continue
        group = ".".join(filter(None, [package, *names[:-1]]))
        yield Entry(group, node.get("_target_") or "", name, value, match["comment"] or "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _shown(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _about(path: Path) -> str:
    """Returns the comment at the top of a file."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line[1:].strip())
    return _cell(" ".join(lines))


def _annotation(entry: Entry) -> Any:
    """Returns the annotation of the argument that a key sets; None if there is none."""
    if not entry.target:
        return None
    try:
        hints = constraints_of(find_target({"_target_": entry.target}, entry.group))
    except ConfigError:  # an optional package that is not installed
        return None
    return hints.get(entry.name)


def _is_checked(entry: Entry) -> bool:
    """Whether the constructor that a key belongs to checks its arguments."""
    target = find_target({"_target_": entry.target}, entry.group)
    function = target.__init__ if inspect.isclass(target) else target
    own = target.__module__.startswith("diffusion_lab")
    return not own or getattr(function, "__checked__", False)


def _words(annotation: Any) -> str:
    kind = annotation if inspect.isclass(annotation) else None
    builtin = kind in (None, bool, int, float, str)
    return describe(annotation if builtin else Node)


@functools.cache
def _reached() -> Mapping[str, str]:
    """The allowed values of keys, by the constructors that they or references to them reach."""
    found: dict[str, dict[str, None]] = {}
    for path in files():
        for entry in entries(path):
            annotation = _annotation(entry)
            if annotation is None or not (text := _words(annotation)) or not _is_checked(entry):
                continue
            found.setdefault(entry.key, {})[text] = None
            reference = REFERENCE.fullmatch(str(entry.value))
            if reference:
                found.setdefault(reference[1], {})[text] = None
    return {key: " or ".join(texts) for key, texts in found.items()}


def allowed(entry: Entry, only_eval: bool) -> str:
    """Returns the allowed values of a key in words.

    They come from the constructor that the key belongs to. Keys that belong to none have an
    annotation in `validation.TRAIN_KEYS` or `EVAL_KEYS`, or are references' targets.

    Arguments:
        entry: The key.
        only_eval: Whether it is a key of evaluations.
    """
    if entry.name == "_partial_":
        return "true"
    annotation = _annotation(entry)
    text = "" if annotation is None else _words(annotation)
    if text and (_is_checked(entry) or not _rule(entry, only_eval)):
        return text
    keys = getattr(validation, "EVAL_KEYS" if only_eval else "TRAIN_KEYS", {})
    if not entry.target and entry.key in keys:
        return describe(keys[entry.key])
    text = _rule(entry, only_eval)
    if text:
        return text
    key = entry.key
    for prefix, same in SAME.items():
        key = same + key.removeprefix(prefix) if key.startswith(prefix) else key
    return _reached().get(entry.key) or _reached().get(key, "")


def _rule(entry: Entry, only_eval: bool) -> str:
    """The text of a rule, for keys whose constructors have no annotations yet."""
    try:
        from diffusion_lab.command import rules
    except ImportError:
        return ""
    both = (rules.EVAL, rules.TRAIN) if only_eval else (rules.TRAIN, rules.EVAL)
    found = rules.find_rule(both[0], entry.group, entry.target, entry.name)
    return found.allowed if found else ""


def configuration() -> str:
    """Returns the page of all groups, options and keys."""
    parts = [
        "# Configuration", "",
        "Every key of every file in `conf/`: the meaning is its comment there, the allowed values "
        "are those of the constructor that it belongs to. Values that are not allowed are refused "
        "before data or weights are loaded. Written by `make reference`.",
    ]  # fmt: skip
    group = ""
    seen: dict[str, tuple[str, str]] = {}
    for path in files():
        place = path.parent.relative_to(CONF)
        name = "/".join(place.parts)
        if name != group:
            group, seen = name, {}
            parts += ["", f"## {name}"]
        title = f"{name}={path.stem}" if name else f"{path.stem}.yaml"
        parts += ["", f"### {title}" if name else f"## {title}", "", _about(path), ""]
        rows, same = [], []
        only_eval = path.stem == "eval" or place.parts[:1] in {(g,) for g in ONLY_EVAL}
        for entry in entries(path):
            value, row = _shown(entry.value), (str(entry.value), entry.comment)
            if seen.get(entry.key) == row:
                same.append(f"`{entry.key}`")
                continue
            seen[entry.key] = row
            cells = [f"`{entry.key}`", f"`{value}`", _cell(entry.comment)]
            rows.append("| " + " | ".join([*cells, _cell(allowed(entry, only_eval))]) + " |")
        if rows:
            parts += ["| key | default | meaning | allowed |", "|---|---|---|---|", *rows]
        if same:
            parts += ["", "As above: " + ", ".join(same) + "."]
    return "\n".join(parts) + "\n"


def api() -> str:
    """Returns the page of all modules for autodoc."""
    package = Path(diffusion_lab.__file__).parent
    names = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package.parent).with_suffix("").parts
        if place[-1] in ("__main__", "__init__") or "conf" in place:
            continue
        names.append(".".join(place))
    blocks = [f"## {n}\n\n```{{eval-rst}}\n.. automodule:: {n}\n```" for n in names]
    return "\n\n".join(["# Python", "Generated from the docstrings.", *blocks]) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(configuration())
