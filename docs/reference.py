"""Configuration reference, generated from the comments in conf/ and the constructors' annotations.

Every file becomes a table with key, default, meaning and allowed values. `make reference` writes
docs/configuration.md, which is part of the repository.
"""

__all__ = ["Entry", "allowed", "api", "composed", "configuration", "entries", "files"]

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import diffusion_lab
from diffusion_lab.command import validation
from diffusion_lab.constraints import describe
from diffusion_lab.runs.compose import CONFIG_PATH, compose

CONF = Path(CONFIG_PATH)
ONLY_EVAL = {"benchmark", "guidance", "model", "operator", "task"}
BESIDE = {  # choices that an option needs beside it
    "network=unet_256": ["data=celeba"],
    "loss=hybrid": ["network.learn_variance=true"],
    "guidance=none": ["task=generate"],
    "operator=none": ["task=generate"],
    "schedule=subvp": ["sampler=euler_maruyama"],
}
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


def composed(path: Path) -> tuple[DictConfig, Mapping[str, Any]]:
    """Returns a configuration that a file is part of, and the keys of its command.

    Arguments:
        path: A file in conf/.
    """
    group = "/".join(path.parent.relative_to(CONF).parts)
    output = "++paths.output_dir=out"
    if not group:
        keys = validation.EVAL_KEYS if path.stem == "eval" else validation.TRAIN_KEYS
        return compose(path.stem, [output]), keys
    option = f"{group}={path.stem}"
    choices = [*BESIDE.get(option, []), option, output]
    if group.split("/")[0] in ONLY_EVAL:
        return compose("eval", choices), validation.EVAL_KEYS
    return compose("train", choices), validation.TRAIN_KEYS


def allowed(key: str, constraints: Mapping[str, Any]) -> str:
    """Returns the allowed values of a key in words.

    Arguments:
        key: The full key.
        constraints: The annotations of all keys, see `validation.constraints_by_key`.
    """
    if key.endswith("._partial_"):
        return "true"
    return describe(constraints[key]) if key in constraints else ""


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
        constraints = validation.constraints_by_key(*composed(path))
        for entry in entries(path):
            value, row = _shown(entry.value), (str(entry.value), entry.comment)
            if seen.get(entry.key) == row:
                same.append(f"`{entry.key}`")
                continue
            seen[entry.key] = row
            cells = [f"`{entry.key}`", f"`{value}`", _cell(entry.comment)]
            rows.append("| " + " | ".join([*cells, _cell(allowed(entry.key, constraints))]) + " |")
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
