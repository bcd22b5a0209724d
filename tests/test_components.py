"""Every schedule, parameterization, loss, sampler, method and operator of conf/ is graded.

The files are found, not listed: a new YAML is composed, built and graded without a change here. An
exemption is an entry with its reason. At the end wrong components in a directory of their own are
shown to be caught.
"""

from pathlib import Path
from typing import Any

import hydra
import pytest
from grading import (
    grade_guidance,
    grade_loss,
    grade_operator,
    grade_parameterization,
    grade_sampler,
    grade_schedule,
)
from omegaconf import DictConfig

from diffusion_lab.runs.compose import CONFIG_PATH, register_resolvers
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.schedule import VE, Cosine, SubVP

CONF = Path(CONFIG_PATH)
SHAPE = (3, 16, 16)

# Options that are not graded, and why.
EXEMPT = {
    "guidance=none": "no method",
    "operator=none": "no operator",
}
# Settings at which a sampler is graded, where its own are chosen for speed.
STEPS = {"sampler=heun": 50, "sampler=dpm_solver": 50, "sampler=unipc": 50, "sampler=seeds": 50}
TOLERANCE: dict[str, float] = {}
# Methods that do not sample the exact posterior even of a Gaussian prior: half of the way to its
# mean is asked of them.
APPROXIMATE: dict[str, str] = {}


def options(group: str, conf: Path = CONF) -> list[str]:
    """The options of a group, `group=option`, without exempt ones."""
    names = [f"{group}={path.stem}" for path in sorted((conf / group).glob("*.yaml"))]
    return [name for name in names if name not in EXEMPT]


def composed(*choices: str, conf: Path | None = None) -> DictConfig:
    """The groups that are chosen, without the rest of a command's configuration."""
    register_resolvers()
    search = [f"hydra.searchpath=[file://{conf}]"] if conf else []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(overrides=[*search, *(f"+{choice}" for choice in choices)])


def built(group: str, config: DictConfig, **arguments: Any) -> Any:
    return instantiate(config[group], group, **arguments)


def every(group: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("option", options(group))


def check_schedule(option: str, conf: Path | None = None) -> None:
    grade_schedule(built("schedule", composed(option, conf=conf)))


def check_sampler(option: str, conf: Path | None = None) -> None:
    config = composed(option, conf=conf)
    config.sampler.clip = False  # right for pixels only
    config.sampler.steps = max(config.sampler.steps, STEPS.get(option, 300))
    sampler = built("sampler", config)
    grade_sampler(sampler, Cosine(), TOLERANCE.get(option, 0.1))


def check_guidance(option: str, conf: Path | None = None) -> None:
    config = composed("sampler=ancestral", option, conf=conf)
    if "clip" in config.sampler:
        config.sampler.clip = False
    sampler, guidance = built("sampler", config), built("guidance", config)
    grade_guidance(guidance, sampler, Cosine(), exact=option not in APPROXIMATE)


def check_operator(option: str, conf: Path | None = None) -> None:
    grade_operator(built("operator", composed(option, conf=conf), shape=SHAPE), SHAPE)


@every("schedule")
def test_schedules_are_inverted_and_consistent(option: str) -> None:
    check_schedule(option)


@every("parameterization")
def test_parameterizations_are_inverted(option: str) -> None:
    parameterization = built("parameterization", composed(option))
    for schedule in (Cosine(), VE(), SubVP()):
        grade_parameterization(parameterization, schedule)


@every("loss")
def test_losses_weigh_every_time(option: str) -> None:
    parameterization = built("parameterization", composed("parameterization=epsilon"))
    grade_loss(built("loss", composed(option)), Cosine(), parameterization)


@every("sampler")
def test_samplers_reach_the_closed_form(option: str) -> None:
    check_sampler(option)


@every("guidance")
def test_methods_reach_the_closed_form(option: str) -> None:
    check_guidance(option)


@every("operator")
def test_operators_satisfy_their_identities(option: str) -> None:
    check_operator(option)


def test_exemptions_name_files_of_conf() -> None:
    listed = [*EXEMPT, *STEPS, *TOLERANCE, *APPROXIMATE]
    missing = [k for k in listed if not (CONF / f"{k.replace('=', '/')}.yaml").exists()]
    assert not missing
