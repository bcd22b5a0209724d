"""The rows of the leaderboard: each posterior method and the settings that it is graded at.

Methods are those of conf/guidance. One that has no entry in `_ROWS` gets a row of its own name,
with the settings of its file.
"""

__all__ = ["CONTROL", "EXEMPT", "Control", "Counted", "Method", "Row", "method_rows"]

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance import Guidance, Guided, Observation
from diffusion_lab.leaderboard.problems import PROBLEMS, Problem
from diffusion_lab.runs.compose import CONFIG_PATH, compose_groups
from diffusion_lab.runs.instantiate import instantiate
from diffusion_lab.sampler import EulerMaruyama, Sampler
from diffusion_lab.schedule import EDM, Linear, Schedule

CONTROL = "control"
# Options of conf/guidance without a row, and the reason.
EXEMPT = {"none": "not a method"}


@dataclass(frozen=True)
class Method:
    """A posterior method with its sampler and schedule.

    Attributes:
        name: The name of its row.
        guidance: Returns the method for a problem.
        sampler: The sampler.
        schedule: The schedule of the prior's denoiser.
        problems: Names of the problems that it is graded on; None for all that it is defined for.
    """

    name: str
    guidance: Callable[[Problem], Guidance]
    sampler: Sampler
    schedule: Schedule
    problems: tuple[str, ...] | None = None


class Counted(Denoiser):
    """Counts the rows that pass through a denoiser, forwards and backwards.

    Arguments:
        denoiser: The denoiser.
        parent: The instance whose counts are increased; None for its own.
    """

    def __init__(self, denoiser: Denoiser, parent: "Counted | None" = None) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser = denoiser
        self.counts: dict[str, int] = parent.counts if parent else {"nfe": 0, "vjp": 0}

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.counts["nfe"] += len(x_t)
        denoised = self.denoiser(x_t, t)
        if denoised.requires_grad:
            denoised.register_hook(self._backward)  # type: ignore[no-untyped-call]  # by torch
        return denoised

    def _backward(self, gradient: Tensor) -> None:
        self.counts["vjp"] += len(gradient)


class Control(Guided):
    """The exact E[x_0 | x_t, y], in closed form.

    Arguments:
        problem: The problem.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def denoiser(self, denoiser: Denoiser, observation: Observation) -> Denoiser:
        problem = self.problem
        exact = problem.prior.conditional_denoiser(
            denoiser.schedule, observation.y, problem.operator, problem.sigma_y
        )
        return Counted(exact, denoiser) if isinstance(denoiser, Counted) else exact


_LINEAR = Linear()


def _no_arguments(_: Problem) -> dict[str, Any]:
    return {}


def _prior_covariance(problem: Problem) -> dict[str, Any]:
    """The covariance of the prior, and enough iterations of conjugate gradients to solve for y."""
    return {"covariance": problem.covariance, "iterations": 2 * problem.zero.numel()}


@dataclass(frozen=True)
class Row:
    """A row of the leaderboard before its method is built.

    Attributes:
        name: The method, with the settings that distinguish it.
        option: The option of conf/guidance, or `CONTROL`.
        settings: Overrides of conf/guidance and conf/sampler, separated by spaces.
        problems: See `Method`.
        schedule: The schedule of the prior's denoiser.
        arguments: Returns arguments of the method that depend on the problem.
    """

    name: str
    option: str
    settings: str = ""
    problems: tuple[str, ...] | None = None
    schedule: Schedule = _LINEAR
    arguments: Callable[[Problem], dict[str, Any]] = _no_arguments

    def build(self) -> Method:
        """Returns the method."""
        if self.option == CONTROL:
            sampler: Sampler = EulerMaruyama(int(self.settings))
            return Method(self.name, Control, sampler, self.schedule, self.problems)
        config = compose_groups(
            "+sampler=ancestral", f"+guidance={self.option}",
            *self.settings.split(), "sampler.clip=false",  # clipping is for pixels
        )  # fmt: skip

        def guidance(problem: Problem) -> Guidance:
            method: Guidance = instantiate(config.guidance, "guidance", **self.arguments(problem))
            return method

        sampler = instantiate(config.sampler, "sampler")
        return Method(self.name, guidance, sampler, self.schedule, self.problems)


_EDM = EDM(sigma_min=0.02, sigma_max=30.0)
_CHEAP = tuple(name for name in PROBLEMS if name != "image_blur")  # 64 numbers, 3 components
_MASKS = ("gaussian_mask", "mixture_mask", "mixture_ambiguous", "spring_positions")
_EULER = "sampler=euler_maruyama sampler.steps=128"
_ANCESTRAL = "sampler.steps=1000 sampler.variance=large"
# The priors have unit variance; samples of one y share particles.
_TDS = (
    "guidance.data_std=1 guidance.sigma_max=80 guidance.share_particles=true "
    "guidance.batch_size=16384"
)
_CORRECTED = (
    "guidance.gamma=0.01 sampler.predictor._target_=diffusion_lab.sampler.DDIM "
    "sampler.langevin_steps=4"
)
_ROWS = (
    Row(CONTROL, CONTROL, "128"),
    Row(f"{CONTROL} 512", CONTROL, "512", _CHEAP),
    Row("truncated 16", "truncated", "sampler.steps=16"),
    Row("truncated 64", "truncated"),
    Row("truncated small 64", "truncated", "sampler=ancestral sampler.steps=64"),
    Row(
        "truncated large 64", "truncated",
        "sampler=ancestral sampler.steps=64 sampler.variance=large",
    ),
    Row("truncated ddim 64", "truncated", "sampler=ddim sampler.steps=64"),
    Row("fused", "fused"),
    Row("mmse", "mmse"),
    *(
        Row(f"residual {x}", "residual", f"{_ANCESTRAL} guidance.gain={x}")
        for x in (0.001, 0.01, 0.1)
    ),
    Row("dmps", "dmps", _ANCESTRAL, _CHEAP),
    Row("replacement", "replacement", _EULER),
    Row("replacement x 10", "replacement", f"{_EULER} guidance.repeats=10", _MASKS),
    Row("ilvr", "ilvr", _EULER),
    Row("ddrm", "ddrm"),
    Row("ddnm", "ddnm"),
    Row("diffpir", "diffpir", "sampler/grid=uniform"),
    Row("reddiff", "reddiff"),
    Row("daps", "daps", "sampler/grid=uniform sampler.steps=100", _CHEAP),
    Row("pnpdm", "pnpdm", "sampler.steps=10", _CHEAP),
    Row("dps 0.3", "dps", _ANCESTRAL, _CHEAP),
    Row("pigdm", "pigdm", "guidance.data_std=1"),
    Row("sda", "sda", f"{_EULER} sampler/grid=uniform guidance.gamma=0.01"),
    Row("sda, 4 corrections", "sda", _CORRECTED, _CHEAP),
    Row("tmpd", "tmpd"),
    Row("mmps 4", "mmps", "sampler.steps=128 guidance.iterations=4"),
    Row("jfps", "jfps", "guidance.data_std=1", _CHEAP, arguments=_prior_covariance),
    Row("tds", "tds", _TDS, schedule=_EDM),
    Row("tds, 2 particles", "tds", f"{_TDS} guidance.particles=2", schedule=_EDM),
    Row("tds, 10 particles", "tds", f"{_TDS} guidance.particles=10", _CHEAP, schedule=_EDM),
)  # fmt: skip


def method_rows() -> dict[str, Row]:
    """Returns all rows by name: the table above, then the other options of conf/guidance."""
    found = [path.stem for path in sorted(Path(CONFIG_PATH, "guidance").glob("*.yaml"))]
    placed = {row.option for row in _ROWS} | EXEMPT.keys()
    others = [Row(name, name) for name in found if name not in placed]
    return {row.name: row for row in (*_ROWS, *others)}
