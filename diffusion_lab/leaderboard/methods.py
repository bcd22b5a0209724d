"""Methods of the leaderboard, with the settings at which they are graded."""

__all__ = ["CONTROL", "Control", "Counted", "Method", "methods_table"]

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance import (
    DAPS,
    DDNM,
    DDRM,
    DMPS,
    DPS,
    ILVR,
    JFPS,
    MMPS,
    MMSE,
    SDA,
    TDS,
    TMPD,
    DiffPIR,
    Guidance,
    Guided,
    Observation,
    PiGDM,
    PnPDM,
    PrecisionWeighted,
    REDDiff,
    Replacement,
    Residual,
    TruncatedReverseSDE,
)
from diffusion_lab.leaderboard.problems import BEDS, Bed
from diffusion_lab.sampler import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    PredictorCorrector,
    Sampler,
)
from diffusion_lab.sampler.time_grid import LogSNR
from diffusion_lab.schedule import EDM, Linear, Schedule

CONTROL = "control"


@dataclass(frozen=True)
class Method:
    """One row of the leaderboard.

    Attributes:
        name: Name of the method, with its main settings.
        guidance: Returns the method for a bed.
        sampler: The sampler.
        schedule: The noise schedule of the denoiser.
        beds: Names of the beds on which it is graded; None for all on which it is defined.
    """

    name: str
    guidance: Callable[[Bed], Guidance]
    sampler: Sampler
    schedule: Schedule
    beds: tuple[str, ...] | None = None


class Counted(Denoiser):
    """Counts the rows denoised, and the rows of backward passes.

    Arguments:
        denoiser: The denoiser.
        parent: The object that counts; None counts here.
    """

    def __init__(self, denoiser: Denoiser, parent: "Counted | None" = None) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser = denoiser
        self.counts: dict[str, int] = parent.counts if parent else {"nfe": 0, "vjp": 0}

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.counts["nfe"] += len(x_t)
        denoised = self.denoiser(x_t, t)
        if denoised.requires_grad:
            denoised.register_hook(self._backward)  # type: ignore[no-untyped-call]  # untyped
        return denoised

    def _backward(self, gradient: Tensor) -> None:
        self.counts["vjp"] += len(gradient)


class Control(Guided):
    """E[x_0 | x_t, y] in closed form, in place of a method.

    Arguments:
        bed: The bed, which has the closed form.
    """

    def __init__(self, bed: Bed) -> None:
        self.bed = bed

    def denoiser(self, denoiser: Denoiser, observation: Observation) -> Denoiser:
        bed = self.bed
        exact = bed.prior.conditional_denoiser(
            denoiser.schedule, observation.y, bed.operator, bed.sigma_y
        )
        return Counted(exact, denoiser) if isinstance(denoiser, Counted) else exact


def _residual(strength: float, _bed: Bed) -> Residual:
    return Residual(strength)


def methods_table() -> list[Method]:
    """Returns all methods, the cheap controls first."""
    linear, edm = Linear(), EDM(sigma_min=0.02, sigma_max=30.0)
    few, many, all_ = EulerMaruyama(128), EulerMaruyama(512), Ancestral(1000, variance="large")
    corrected = PredictorCorrector(128, DDIM, 4, grid=LogSNR())
    geometric = EulerMaruyama(64, grid=LogSNR())  # TDS uses its steps and grid

    cheap = tuple(name for name in BEDS if name != "image_blur")  # 64 numbers, 3 components
    masks = ("gaussian_mask", "mixture_mask", "mixture_ambiguous", "spring_positions")

    def truncated(_problem: Bed) -> TruncatedReverseSDE:
        return TruncatedReverseSDE()

    def row(
        name: str, guidance: Callable[[Bed], Guidance], sampler: Sampler,
        schedule: Schedule = linear, beds: tuple[str, ...] | None = None,
    ) -> Method:  # fmt: skip
        return Method(name, guidance, sampler, schedule, beds)

    return [
        row(CONTROL, Control, few),
        row(f"{CONTROL} 512", Control, many, beds=cheap),
        row("truncated 16", truncated, EulerMaruyama(16)),
        row("truncated 64", truncated, EulerMaruyama(64)),
        row("truncated small 64", truncated, Ancestral(64)),
        row("truncated large 64", truncated, Ancestral(64, variance="large")),
        row("truncated ddim 64", truncated, DDIM(64)),
        row("fused", lambda _: PrecisionWeighted(), few),
        row("mmse", lambda _: MMSE(), DDIM(1)),
        *(row(f"residual {x}", partial(_residual, x), all_) for x in (0.001, 0.01, 0.1)),
        row("dmps", lambda _: DMPS(), all_, beds=cheap),
        row("replacement", lambda _: Replacement(), few),
        row("replacement x 10", lambda _: Replacement(repeats=10), few, beds=masks),
        row("ilvr", lambda _: ILVR(), few),
        row("ddrm", lambda _: DDRM(), DDIM(20)),
        row("ddnm", lambda _: DDNM(), DDIM(100)),
        row("diffpir", lambda _: DiffPIR(), DDIM(100)),
        row("reddiff", lambda _: REDDiff(), DDIM(100)),
        row("daps", lambda _: DAPS(), DDIM(100), beds=cheap),
        row("pnpdm", lambda _: PnPDM(), EulerMaruyama(10), beds=cheap),
        row("dps 0.3", lambda _: DPS(0.3), all_, beds=cheap),
        row("pigdm", lambda _: PiGDM(), few),
        row("sda", lambda _: SDA(0.01), few),
        row("sda, 4 corrections", lambda _: SDA(0.01), corrected, beds=cheap),
        row("tmpd", lambda _: TMPD(), few),
        row("mmps 4", lambda _: MMPS(4), few),
        row("jfps", lambda bed: JFPS(1.0, bed.covariance, _enough(bed)), few, beds=cheap),
        row("tds", lambda _: TDS(data_std=1.0), geometric, edm),
        row("tds, 2 particles", lambda _: TDS(2.0, 1.0), geometric, edm),
        row("tds, 10 particles", lambda _: TDS(10.0, 1.0), geometric, edm, cheap),
    ]


def _enough(bed: Bed) -> int:
    """Iterations that solve the system: twice the number of elements of y, against rounding."""
    return 2 * bed.nothing.numel()
