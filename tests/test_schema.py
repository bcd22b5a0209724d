"""Every key of every file of conf/ has a rule, which is what its comment says.

A range is read from the comment ("> 0", ">= 1", "in [0, 1)", "from 1 to 8", "any number"): just
inside it the rule agrees, just outside and for another type the command's check names the key.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from omegaconf import OmegaConf
from reference import CONF, ONLY_EVAL, Entry, entries, files

from diffusion_lab.command.rules import EVAL, TRAIN, find_rule
from diffusion_lab.command.validation import check_eval, check_train
from diffusion_lab.errors import ConfigError
from diffusion_lab.runs import compose

FREE_TEXT = {  # names, paths, and what only the source of the images or a logger can judge
    "name", "resume", "pretrained", "run", "ckpt", "label", "image", "observation", "model.path",
    "data.source", "data.split", "data.image_column", "data.label", "data.cache_dir",
    "paths.cache_dir",
    "paths.output_dir", "model.data.cache_dir",
    "callbacks.power_ema.directory", "callbacks.samples.directory", "callbacks.best.dirpath",
    "callbacks.schedule_plot.directory", "extractor.weights",
    "callbacks.best.filename", "callbacks.best.monitor", "callbacks.last.directory",
    "logger.csv.directory", "logger.wandb.directory", "logger.wandb.project", "logger.wandb.name",
    "logger.wandb.job_type", "logger.tensorboard.directory",
    "trainer.profiler.dirpath", "trainer.profiler.filename",
}  # fmt: skip
FITS = {  # what an option needs beside it
    "network=unet_256": ["data=celeba"],
    "loss=hybrid": ["network.learn_variance=true"],
    "guidance=none": ["task=generate"],
    "task/restoration=default": ["task=deblur"],
}
NUMBER = r"(-?\d+(?:\.\d+)?)"
RANGES = {
    rf">= {NUMBER}": "[",
    rf"(?<!-)> {NUMBER}": "(",
    rf"(?:^|, |; |each )in ([\[(]){NUMBER}, {NUMBER}([\])])": "both",
    rf"(?:^|, |; )from {NUMBER}(?: \(\w+\))? to {NUMBER}?": "from",
}
ALL = [entry for path in files() for entry in entries(path)]


def bounds(comment: str) -> list[tuple[float, int, bool]]:
    """The bounds in a comment: value, -1 (lower) or 1 (upper), whether it is inside."""
    found = []
    for pattern, kind in RANGES.items():
        for match in re.finditer(pattern, comment):
            if kind == "both":
                left, low, high, right = match.groups()
                found += [(float(low), -1, left == "["), (float(high), 1, right == "]")]
            elif kind == "from":
                low, high = match.groups()
                found.append((float(low), -1, True))
                found += [(float(high), 1, True)] if high else []
            else:
                found.append((float(match[1]), -1, kind == "["))
    return found


def comment_of(entry: Entry) -> str:
    """The comment; that of the file that explains the key, where this one only sets it anew."""
    refers = re.fullmatch(r"\$\{([\w.]+)\}", str(entry.value))
    own = [e.comment for e in ALL if e.key == (refers[1] if refers else entry.key)]
    said = [c for c in (entry.comment, *own) if bounds(c) or "any number" in c]
    return said[0] if said else ""


def test_the_ranges_are_read_from_a_comment() -> None:
    assert bounds("S, >= 0: fresh noise; 0 is deterministic") == [(0, -1, True)]
    assert bounds("clip the estimate of x_0 to [-1, 1]") == []
    assert bounds("of these, in (0, 2], relative") == [(0, -1, False), (2, 1, True)]
    assert bounds("from 1 (coarse) to 100 (fine)") == [(1, -1, True), (100, 1, True)]
    assert bounds("levels, from 1 to the schedule's T") == [(1, -1, True)]
    assert bounds("images in [-1, 1], > 0") == [(0, -1, False)]


def shaped(entry: Entry, number: float) -> Any:
    """A number in the shape of the key's value: a list where that is one, whole where it is."""
    whole = isinstance(entry.value, int) and not isinstance(entry.value, bool)
    if isinstance(entry.value, list):
        whole = all(isinstance(v, int) for v in entry.value) and entry.name != "widths"
    elif not isinstance(entry.value, float):  # null, or written as the reference to another key
        whole = whole or not float(number) % 1
    one = int(number) if whole and not number % 1 else number
    return [one] * max(1, len(entry.value)) if isinstance(entry.value, list) else one


def wrong(entry: Entry, comment: str, free: bool) -> list[Any]:
    """Values that are not allowed."""
    values: list[Any] = [{"wrong": 1}, 3.25 if free else "wrong"]
    if isinstance(entry.value, str):
        return values
    if isinstance(entry.value, int) and not isinstance(entry.value, bool):
        values.append(entry.value + 0.5)
    for bound, side, inside in bounds(comment):
        step = 1e-3 if isinstance(entry.value, float | list) else 1
        values.append(shaped(entry, bound + side * step if inside else bound))
    return values


def composed(path: Path) -> tuple[str, Any]:
    """A configuration that the file is part of, and its command."""
    group = "/".join(path.parent.relative_to(CONF).parts)
    if path.parent == CONF:
        return path.stem, compose(path.stem, ["++paths.output_dir=out"])
    option = f"{group}={path.stem}"
    command = "eval" if path.relative_to(CONF).parts[0] in ONLY_EVAL else "train"
    chosen = FITS.get(option, []) + [option] * (group != "task/restoration")
    return command, compose(command, [*chosen, "++paths.output_dir=out"])


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(CONF).with_suffix("")))
def test_every_key_is_held_against_what_its_comment_says(path: Path) -> None:
    command, config = composed(path)
    rules, check = (EVAL, check_eval) if command == "eval" else (TRAIN, check_train)
    check(config)
    problems = []
    for entry in entries(path):
        key, comment = entry.key, comment_of(entry)
        target = entry.target or str(OmegaConf.select(config, f"{entry.group}._target_") or "")
        rule = find_rule(rules, entry.group, target, entry.name)
        if rule is None:
            problems.append(f"{key} has no rule in diffusion_lab/rules.py")
            continue
        free = rule.check("wrong")
        if free != (key in FREE_TEXT):
            problems.append(f"{key} {'may' if free else 'cannot'} be any text: see FREE_TEXT")
        numeric = rule.check(shaped(entry, 1)) or rule.check(shaped(entry, 0.5))
        if numeric and not isinstance(entry.value, bool) and not comment and not free:
            problems.append(f"{key}: the comment says no range ({rule.allowed})")
        for bound, _, inside in bounds(comment):
            if (
                inside
                and not isinstance(entry.value, str)
                and not rule.check(shaped(entry, bound))
            ):
                problems.append(f"{key}={shaped(entry, bound)} is refused; see its comment")
        node = OmegaConf.select(config, entry.group) if entry.group else config
        raw = node._get_node(entry.name)
        for value in wrong(entry, comment, free):
            OmegaConf.update(config, key, value, merge=False)
            try:
                check(config)
                problems.append(f"{key}={value} passes the check")
            except ConfigError as error:
                if not str(error).startswith((f"{key}=", f"{key}.")):
                    problems.append(f"{key}={value} is called: {error}")
            node._set_item_impl(entry.name, raw)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("command", "override"),
    [
        ("train", "callbacks.progress.refresh_rate=-1"),
        ("train", "optimizer.betas=[0.9]"),
        ("eval", "task.std=0"),
        ("eval", "sampler.clip=maybe"),
    ],
)
def test_a_value_is_refused_before_images_or_weights_are_looked_for(
    command: str, override: str, lab: Command
) -> None:
    nowhere = ["data.source=/nowhere"] if command == "train" else ["run=/nowhere", "task=deblur"]
    result = lab(command, *nowhere, override)
    assert result.code == 1
    message = result.text.split("\n", 1)[1]  # after the line with the overrides
    assert message.startswith(override) and " is not allowed; it is " in message
    assert "/nowhere" not in message


def test_a_group_of_keys_is_no_value() -> None:
    config = compose("train", ["++paths.output_dir=out"])
    OmegaConf.update(config, "data.splits", 3, merge=False)
    with pytest.raises(ConfigError, match=r"data.splits=3 is not allowed; it has keys: data\."):
        check_train(config)


def test_a_class_of_ones_own_checks_its_keys_itself() -> None:
    config = compose("train", ["+schedule.mine=-1", "++paths.output_dir=out"])
    check_train(config)
    assert find_rule(TRAIN, "schedule", config.schedule._target_, "mine") is None


def test_a_class_may_have_a_rule_of_its_own() -> None:
    """A list or a truncated number must not pass where a class wants whole steps."""
    pool = find_rule(EVAL, "task", "diffusion_lab.operator.AveragePool", "factor")
    hdr = find_rule(EVAL, "task", "diffusion_lab.operator.HDR", "factor")
    assert not pool.check(1.5) and hdr.check(1.5)


def test_no_rule_is_left_over() -> None:
    """A rule whose key was renamed would protect nothing."""
    keys = {entry.key for entry in ALL} | {"_partial_"}
    copies = ("fid.sampler.", "model.data.")  # groups that are used in a second place
    left = [re.sub(r"\[\w+\]", "", key) for key in TRAIN.keys() | EVAL.keys()]
    assert not [key for key in left if key not in keys and not key.startswith(copies)]
