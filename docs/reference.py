"""The configuration reference, made of the comments in conf/ and the rules in diffusion_lab.

Every file becomes a table: key, default, what it means, what is allowed. `make docs` writes
docs/configuration.md, which is kept in the repository for those who read it there.
"""

__all__ = ["Entry", "api", "configuration", "entries", "files"]

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import diffusion_lab
from diffusion_lab.command.rules import EVAL, TRAIN, find_rule
from diffusion_lab.runs.compose import CONFIG_PATH

CONF = Path(CONFIG_PATH)
ONLY_EVAL = {"benchmark", "guidance", "model", "task"}
LINE = re.compile(r"^(?P<indent> *)(?P<name>\w+):(?P<value>[^#]*?)(?: +# (?P<comment>.*))?$")


@dataclass(frozen=True)
class Entry:
    """A key of a file of conf/.

    Attributes:
        group: Where the key is in the composed configuration, for example "task".
        target: The `_target_` there; empty if there is none.
        name: The key's own name.
        value: Its value in the file.
        comment: Its comment.
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
    """Returns the files of conf/, the two of the commands first."""
    options = sorted(p for p in CONF.rglob("*.yaml") if "local" not in p.parts)
    return sorted(options, key=lambda path: path.parent != CONF)


def entries(path: Path) -> Iterator[Entry]:
    """Yields the keys of a file that hold a value, but those of Hydra itself."""
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
    """The comment on top of a file."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line[1:].strip())
    return _cell(" ".join(lines))


def configuration() -> str:
    """Returns the page of all groups, options and keys."""
    parts = [
        "# Configuration", "",
        "Every key of every file in `conf/`, from the comments there. A value that is not allowed "
        "is refused before images or weights are touched.",
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
        rules = EVAL if only_eval else TRAIN
        for entry in entries(path):
            value, said = _shown(entry.value), (str(entry.value), entry.comment)
            if seen.get(entry.key) == said:
                same.append(f"`{entry.key}`")
                continue
            seen[entry.key] = said
            rule = find_rule(rules, entry.group, entry.target, entry.name)
            cells = [f"`{entry.key}`", f"`{value}`", _cell(entry.comment)]
            rows.append("| " + " | ".join([*cells, _cell(rule.allowed) if rule else ""]) + " |")
        if rows:
            parts += ["| key | default | meaning | allowed |", "|---|---|---|---|", *rows]
        if same:
            parts += ["", "As above: " + ", ".join(same) + "."]
    return "\n".join(parts) + "\n"


def api() -> str:
    """Returns the page of all modules, for autodoc."""
    package = Path(diffusion_lab.__file__).parent
    names = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package.parent).with_suffix("").parts
        if place[-1] in ("__main__", "__init__") or "conf" in place:
            continue
        names.append(".".join(place))
    blocks = [f"## {n}\n\n```{{eval-rst}}\n.. automodule:: {n}\n```" for n in names]
    return "\n\n".join(["# Python", "From the docstrings.", *blocks]) + "\n"
