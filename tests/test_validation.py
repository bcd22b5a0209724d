"""Every key of conf/ is constrained, and a value outside of its constraint is refused by name.

Wrong values are derived from the annotations: they are just outside of a range, or of another
type. The annotations are tested in `test_constraints.py`, the ranges by the reference page.
"""

import copy
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from conftest import Command
from omegaconf import OmegaConf
from reference import CONF, composed, entries, files

from diffusion_lab.command.validation import (
    EVAL_KEYS,
    check_eval,
    check_train,
    check_values,
    constraints_by_key,
)
from diffusion_lab.constraints import Range, allows, describe
from diffusion_lab.errors import ConfigError
from diffusion_lab.runs import compose
from diffusion_lab.runs import instantiate as instantiation
from diffusion_lab.runs.instantiate import constraints_of, find_target


def wrong_values(annotation: Any) -> list[Any]:
    """Values that the annotation does not allow: of other types, and just outside of ranges."""
    candidates: list[Any] = [{"wrong": 1}, "wrong", 3.25, [1.5, "x"], -1, True, math.nan]
    parts = [annotation]
    while parts:
        part = parts.pop()
        if get_origin(part) is Annotated:
            for limits in get_args(part)[1:]:
                if isinstance(limits, Range):
                    step = 1 if get_args(part)[0] is int else 1e-3
                    low = limits.low if limits.low_open else limits.low - step
                    high = limits.high if limits.high_open else limits.high + step
                    kind = get_args(part)[0]
                    candidates += [kind(v) for v in (low, high) if math.isfinite(v)]
        elif get_origin(part) is not Literal:
            parts += [p for p in get_args(part) if p is not type(None)]
    return [value for value in candidates if not allows(annotation, value)]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(CONF).with_suffix("")))
def test_every_key_is_constrained_and_wrong_values_are_named(path: Path) -> None:
    config, keys = composed(path)
    (check_eval if keys is EVAL_KEYS else check_train)(config)
    constraints = constraints_by_key(config, keys)
    problems = []
    for entry in entries(path):
        if entry.name.startswith("_") or str(entry.value).startswith("${"):
            continue
        annotation = constraints.get(entry.key)
        if annotation is None or not describe(annotation):
            problems.append(f"{entry.key} is not constrained by its class")
            continue
        if not entry.comment:
            problems.append(f"{entry.key} has no comment")
        node = OmegaConf.select(config, entry.group) if entry.group else config
        raw = copy.deepcopy(node._get_node(entry.name))
        wrong = wrong_values(annotation)
        assert len(wrong) > 2, entry.key
        value = wrong[-1]  # all wrong values are refused in the same way
        OmegaConf.update(config, entry.key, value, merge=False)
        try:
            check_values(config, keys)
            problems.append(f"{entry.key}={value} passes the check")
        except ConfigError as error:
            if not str(error).startswith((f"{entry.key}=", f"{entry.key}.")):
                problems.append(f"{entry.key}={value} is reported as: {error}")
        node._set_item_impl(entry.name, raw)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("command", "override"),
    [
        ("train", "callbacks.progress.refresh_rate=-1"),
        ("train", "optimizer.betas=[0.9]"),
        ("train", "ema.decay=2"),
        ("eval", "operator.std=0"),
        ("eval", "num_images=0"),
        ("eval", "sampler.clip=maybe"),
    ],
)
def test_invalid_value_is_refused_before_data_or_weights_are_opened(
    command: str, override: str, lab: Command
) -> None:
    nowhere = ["data.source=/nowhere"] if command == "train" else ["run=/nowhere", "task=deblur"]
    result = lab(command, *nowhere, override)
    assert result.code == 1
    message = result.text
    key, _ = override.split("=")
    assert message.startswith(f"{key}=") and " is not allowed; it must be " in message
    assert "/nowhere" not in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+schedule.mine=-1", "schedule.mine is not a key of Cosine; its keys: s, steps"),
        ("+trainer.max_step=3", "trainer.max_step is not a key of Trainer"),
        ("+callbacks.samples.number=3", "callbacks.samples.number is not a key of SampleGrid"),
        ("+sed=3", "sed is not a key of this command"),
        ("+ema.deacy=0.5", "ema.deacy is not a key of this command"),
    ],
)
def test_unknown_keys_are_refused(override: str, message: str, lab: Command) -> None:
    result = lab("train", override)
    assert result.code == 1 and message in result.text, result.text


def test_value_in_place_of_a_group_is_refused() -> None:
    config = compose("train", ["++paths.output_dir=out"])
    OmegaConf.update(config, "ema", 3, merge=False)
    with pytest.raises(ConfigError, match=r"^ema(=3|\.)"):
        check_train(config)


def integers(annotation: Any) -> Any:
    """An allowed value made of integers, where the annotation asks for floats; otherwise None."""
    candidates = [1, 0, 2, 5, 100, [0, 0], [1, 1], [2], [1, 2], [1, 2, 3], {"x": 1}, {"x": [1, 2]}]
    if set(re.findall(r"\bfloat\b|\bint\b", str(annotation))) != {"float"}:
        return None
    return next((v for v in candidates if allows(annotation, v)), None)


def nodes(value: Any) -> list[dict]:
    """All nodes with a `_target_` in a file."""
    if not isinstance(value, dict):
        return []
    inner = [node for each in value.values() for node in nodes(each)]
    return [*inner, value] if "_target_" in value else inner


def numbers(value: Any) -> list[Any]:
    """The numbers in nested containers."""
    if isinstance(value, dict):
        value = list(value.values())
    return [n for each in value for n in numbers(each)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(CONF).with_suffix("")))
def test_integers_arrive_as_floats_where_the_class_expects_floats(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """YAML reads 1 as an integer; torch would make integer tensors of it."""
    made = []
    monkeypatch.setattr(
        instantiation.hydra.utils, "instantiate",
        lambda node, **_: made.append(node) or (lambda **_: None),
    )  # fmt: skip
    for node in nodes(OmegaConf.to_container(OmegaConf.load(path))):
        hints = constraints_of(find_target(node, "x"))
        values = {name: integers(hints[name]) for name in node if name in hints}
        values = {name: value for name, value in values.items() if value is not None}
        instantiation.instantiate({"_target_": node["_target_"], **values}, "x")
        for name, value in values.items():
            assert made[-1][name] == value, name
            assert {type(n) for n in numbers(made[-1][name])} == {float}, name
