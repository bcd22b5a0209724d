"""Every schedule, parameterization, loss, sampler, method and operator of conf/ is graded.

The tests search for the files, so a new YAML file is composed, built and graded without a change
here. Exceptions are listed with a reason. The last tests add wrong components in another
configuration directory and assert that each grader rejects them.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

from diffusion_lab.runs.compose import CONFIG_PATH, compose_groups
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.schedule import VE, Cosine, SubVP

CONF = Path(CONFIG_PATH)
SHAPE = (3, 16, 16)

# Options that are not graded, and the reason.
EXEMPT = {
    "guidance=none": "not a method",
    "operator=none": "not an operator",
}
# Settings under which an option is graded, where those of conf/ are for images or for speed.
SETTINGS = {
    # Slow directions need a larger step than images do.
    "sampler=annealed_langevin": ["sampler.steps=200", "sampler.snr=0.3"],
    # Methods of higher order; the others take 200 steps.
    "sampler=dpm_solver": ["sampler.steps=40"],
    "sampler=heun": ["sampler.steps=40"],
    "sampler=seeds": ["sampler.steps=40"],
    "sampler=unipc": ["sampler.steps=40"],
    "guidance=dmps": ["sampler.steps=200"],
    "guidance=dps": ["sampler.steps=200"],
    # The posterior that is sampled is smoothed by rho_min.
    "guidance=pnpdm": [
        "guidance.iterations=90", "guidance.rho_max=3", "guidance.rho_min=0.04",
        "guidance.decay=0.95", "sampler.steps=10",
    ],
    "guidance=tmpd": ["guidance.floor=0"],  # a larger variance of y than Tweedie's is a bias
}  # fmt: skip
# Methods that are exact for data of covariance data_std² I, and the reason.
ISOTROPIC = {
    "guidance=jfps": "assumes the covariance data_std² I",
    "guidance=pigdm": "assumes the covariance data_std² I",
    "guidance=tmpd": "assumes that the covariance of y given x_t is diagonal",
}
# Methods that do not sample the exact posterior of any Gaussian prior, and the reason.
APPROXIMATE = {
    "guidance=daps": "N(x̂, r_t² I) is wider than p(x_0 | x_t) (Zhang et al., 2025)",
    "guidance=ddnm": "the more accurate of y and x̂ is used (Wang et al., 2023)",
    "guidance=ddrm": "the more accurate of y and x̂ is used (Kawar et al., 2022)",
    "guidance=diffpir": "a proximal point, not a sample; ζ sets the spread (Zhu et al., 2023)",
    "guidance=dmps": "p(y | x_t) of a flat prior (Meng & Kabashima, 2022)",
    "guidance=dps": "gradient steps of a fixed size, no posterior variance (Chung et al., 2023)",
    "guidance=ilvr": "A x_0 = y for every σ_y (Choi et al., 2021)",
    "guidance=reddiff": "one point, from noisy optimization (Mardani et al., 2024)",
    "guidance=replacement": "unobserved coefficients depend on y only through later calls of the "
    "network (Lugmayr et al., 2022)",
    "guidance=residual": "a constant gain, biased for every λ",
    "guidance=sda": "γ r_t² replaces the covariance of x_0 given x_t (Rozet & Louppe, 2023)",
}


def options(group: str, conf: Path = CONF) -> list[str]:
    """The options of a group, `group=option`, without exempt ones."""
    names = [f"{group}={path.stem}" for path in sorted((conf / group).glob("*.yaml"))]
    return [name for name in names if name not in EXEMPT]


def composed(*choices: str, settings: list[str] | None = None, conf: Path = CONF) -> DictConfig:
    """The chosen groups, without the rest of a command's configuration."""
    added = [f"+{choice}" for choice in choices]
    return compose_groups(f"hydra.searchpath=[file://{conf}]", *added, *(settings or []))


def built(group: str, config: DictConfig, **arguments: Any) -> Any:
    return instantiate(config[group], group, **arguments)


def check_schedule(option: str, conf: Path = CONF) -> None:
    grade_schedule(built("schedule", composed(option, conf=conf)))


def check_parameterization(option: str, conf: Path = CONF) -> None:
    parameterization = built("parameterization", composed(option, conf=conf))
    for schedule in (Cosine(), VE(), SubVP()):
        grade_parameterization(parameterization, schedule)


def check_loss(option: str, conf: Path = CONF) -> None:
    parameterization = built("parameterization", composed("parameterization=epsilon"))
    grade_loss(built("loss", composed(option, conf=conf)), Cosine(), parameterization)


def check_sampler(option: str, conf: Path = CONF) -> None:
    settings = SETTINGS.get(option, ["sampler.steps=200"])
    # Clipping is right for pixels only.
    config = composed(option, settings=[*settings, "++sampler.clip=false"], conf=conf)
    grade_sampler(built("sampler", config), Cosine())


def check_guidance(option: str, conf: Path = CONF) -> None:
    settings = [*SETTINGS.get(option, []), "++sampler.clip=false"]
    config = composed("sampler=ancestral", option, settings=settings, conf=conf)
    sampler, guidance = built("sampler", config), built("guidance", config)
    if option in APPROXIMATE:
        grade_guidance(guidance, sampler, Cosine(), "approximate")
    else:
        grade = "isotropic" if option in ISOTROPIC else "exact"
        grade_guidance(guidance, sampler, Cosine(), grade)


def check_operator(option: str, conf: Path = CONF) -> None:
    grade_operator(built("operator", composed(option, conf=conf), shape=SHAPE), SHAPE)


CHECKS = {
    "schedule": check_schedule,
    "parameterization": check_parameterization,
    "loss": check_loss,
    "sampler": check_sampler,
    "guidance": check_guidance,
    "operator": check_operator,
}


@pytest.mark.parametrize("option", [option for group in CHECKS for option in options(group)])
def test_every_option_of_conf_passes_its_grader(option: str) -> None:
    CHECKS[option.split("=")[0]](option)


@pytest.mark.parametrize("group", ["schedule", "parameterization", "loss", "sampler", "guidance"])
def test_every_option_has_its_own_class(group: str) -> None:
    before = ["sampler=ancestral"] if group == "guidance" else []  # methods override the sampler
    targets = [composed(*before, option)[group]._target_ for option in options(group)]
    assert len(set(targets)) == len(targets)


def test_exceptions_name_files_of_conf() -> None:
    listed = [*EXEMPT, *SETTINGS, *ISOTROPIC, *APPROXIMATE]
    missing = [k for k in listed if not (CONF / f"{k.replace('=', '/')}.yaml").exists()]
    assert not missing
    assert not ISOTROPIC.keys() & APPROXIMATE.keys()


PLANTED = """
from diffusion_lab.guidance import Guided
from diffusion_lab.loss import Simple
from diffusion_lab.operator import GaussianBlur
from diffusion_lab.parameterization import V
from diffusion_lab.sampler import EulerMaruyama
from diffusion_lab.schedule import Cosine


class Schedule(Cosine):
    def t_from_ratio(self, ratio):
        return super().t_from_ratio(1.01 * ratio)  # not the inverse of ratio()


class Parameterization(V):
    def target(self, x_0, noise, alpha_t, sigma_t):
        return -super().target(x_0, noise, alpha_t, sigma_t)


class Loss(Simple):
    def output_weight(self, schedule, parameterization, t):
        return -super().output_weight(schedule, parameterization, t)


class Sampler(EulerMaruyama):
    def step(self, denoiser, state, s, noise):
        return super().step(denoiser, state, s, lambda x: noise(x) / 2**0.5)


class Guidance(Guided):
    def posterior_mean(self, denoiser, observation, x_t, t):
        return denoiser(x_t, t)  # ignores y


class Operator(GaussianBlur):
    def adjoint(self, y):
        return 1.01 * super().adjoint(y)
"""
RIGHT = {  # the classes that the planted ones derive from or replace, and their arguments
    "schedule": ("diffusion_lab.schedule.Cosine", ""),
    "parameterization": ("diffusion_lab.parameterization.V", ""),
    "loss": ("diffusion_lab.loss.Simple", ""),
    "sampler": ("diffusion_lab.sampler.EulerMaruyama", "steps: 64"),
    "guidance": ("diffusion_lab.guidance.MMPS", ""),
    "operator": ("diffusion_lab.operator.GaussianBlur", "std: 1.0"),
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configuration directory with a right and a wrong option in every graded group."""
    (tmp_path / "planted_components.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    for group, (target, arguments) in RIGHT.items():
        (tmp_path / group).mkdir()
        for name in ("right", "wrong"):
            wrong = f"planted_components.{group.capitalize()}"
            text = f"_target_: {target if name == 'right' else wrong}\n{arguments}\n"
            if group == "guidance":
                method = text.replace("\n", "\n  ").rstrip()
                text = "# @package _global_\ndefaults:\n  - override /sampler: euler_maruyama\n"
                text += f"guidance:\n  {method}\n"
            (tmp_path / group / f"{name}.yaml").write_text(text)
    yield tmp_path
    sys.modules.pop("planted_components", None)


REJECTIONS = {
    "schedule": "not close",
    "parameterization": "not close",
    "loss": "negative",
    "sampler": "the variance is .* of the exact one",
    "guidance": "the mean is off by",
    "operator": "not close",
}


@pytest.mark.parametrize("group", CHECKS)
def test_graders_find_and_reject_a_wrong_component(group: str, planted: Path) -> None:
    right, wrong = options(group, planted)
    assert (right, wrong) == (f"{group}=right", f"{group}=wrong")
    CHECKS[group](right, planted)
    with pytest.raises(AssertionError, match=REJECTIONS[group]):
        CHECKS[group](wrong, planted)


def test_approximate_grade_rejects_a_method_that_ignores_y(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(APPROXIMATE, "guidance=wrong", "ignores y")
    with pytest.raises(AssertionError, match="of the way from the prior's mean"):
        check_guidance("guidance=wrong", planted)
