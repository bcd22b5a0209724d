r"""Langevin dynamics at a fixed noise level, alone or as the corrector of another sampler.

    x <- x + δ ∇ log p(x_t) + √(2 δ) z

has p(x_t) as its stationary distribution, up to an error of order δ. Both samplers take
δ = 2 a (snr σ_t)², the same for all samples. Song et al. set it by the norms of z and of the
score, averaged over the batch, snr |z| / |∇ log p|. For images this is snr σ_t to a few percent,
since |∇ log p| ≈ √d / σ_t, but a sample then depends on the others of its batch; with norms per
sample δ depends on x, and p(x_t) is not stationary.

Sources:
    Song, Ermon, "Generative modeling by estimating gradients of the data distribution", 2019,
    algorithm 1 (annealed Langevin dynamics).
    Song et al., "Score-based generative modeling through SDEs", 2021, algorithms 4 and 5.
"""

__all__ = ["AnnealedLangevin", "PredictorCorrector"]

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diffusion_lab.constraints import Positive, PositiveInt, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.sampler.sde import ReverseDiffusion
from diffusion_lab.sampler.time_grid import LogSNR, TimeGrid
from diffusion_lab.schedule import Schedule
from diffusion_lab.transition import transition


def _langevin(x: Tensor, score: Tensor, size: Tensor, noise: Noise) -> Tensor:
    """x after a step of size δ."""
    return x + size * score + torch.sqrt(2 * size) * noise(x)


class PredictorCorrector(Sampler):
    r"""A predictor step to s, then M Langevin steps at s.

    δ = 2 a (snr σ_s)², with a = α_t / α_s, which is 1 for VE. The authors' code of algorithm 5 has
    a² = 1 - β in place of a, 1% less at most for 1000 steps of the linear schedule.

    Arguments:
        steps: The number N of steps.
        predictor: The class of the predictor, or another function that makes it from `steps` and
            `grid`. It must be a one-step method.
        langevin_steps: The number M of Langevin steps after each step; a denoiser call each.
        snr: Sets δ; the paper's signal-to-noise ratio: 0.16 for small images, 0.075 at 256.
        grid: See `Sampler`; uniform in t by default.
        clip: Whether x̂ is clipped to [-1, 1].

    Raises:
        ValueError: If the predictor is a multistep method, or has steps, a grid or clipping of its
            own, which would not be used.
    """

    @checked
    def __init__(
        self,
        steps: PositiveInt = 1000,
        predictor: Callable[..., Sampler] = ReverseDiffusion,
        langevin_steps: PositiveInt = 1,
        snr: Positive = 0.16,
        grid: TimeGrid | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__(steps, grid, clip)
        given = predictor.keywords if isinstance(predictor, partial) else {}
        unused = [name for name in ("steps", "grid", "clip") if name in given]
        if unused:
            raise ValueError(
                f"predictor.{unused[0]} is not used; set {unused[0]} of the sampler itself"
            )
        self.predictor = predictor(steps=steps, grid=grid)
        if self.predictor.history:
            raise ValueError(
                f"predictor={type(self.predictor).__name__} is a multistep method; choose a "
                "one-step one: ReverseDiffusion, EulerMaruyama, Ancestral, DDIM"
            )
        self.langevin_steps, self.snr = langevin_steps, snr

    def check(self, schedule: Schedule) -> None:
        self.predictor.check(schedule)

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_s = self.predictor.step(denoiser, state, s, noise)
        if s == 0:
            return x_s
        step = transition(denoiser.schedule, state.t, s)
        size = 2 * (step.alpha_t / step.alpha_s) * (self.snr * step.sigma_s) ** 2
        for _ in range(self.langevin_steps):
            x_s = _langevin(x_s, denoiser.score(x_s, s), size, noise)
        return x_s


class AnnealedLangevin(Sampler):
    r"""Annealed Langevin dynamics: M steps at each of N decreasing noise levels.

    At each level Langevin dynamics samples p(x_t); x_t α_s / α_t starts the next level. Of the
    schedule it uses the levels only. It mixes slowly between distant modes.

    Arguments:
        steps: The number N of levels.
        langevin_steps: The number M of Langevin steps at each level; a denoiser call each.
        snr: Sets δ = 2 (snr σ_t)².
        grid: See `Sampler`; uniform in log SNR by default, the geometric sequence of the paper.
        clip: Whether x̂ is clipped to [-1, 1].
    """

    default_grid = LogSNR

    @checked
    def __init__(
        self,
        steps: PositiveInt = 200,
        langevin_steps: PositiveInt = 5,
        snr: Positive = 0.16,
        grid: TimeGrid | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__(steps, grid, clip)
        self.langevin_steps, self.snr = langevin_steps, snr

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        step = transition(denoiser.schedule, state.t, s)
        x_t, denoised = state.x_t, state.denoised
        t = torch.tensor(state.t, dtype=torch.float64)
        size = 2 * (self.snr * step.sigma_t) ** 2
        for k in range(self.langevin_steps):
            if k:
                denoised = denoiser(x_t, t)
            score = (step.alpha_t * denoised - x_t) / step.sigma_t**2
            x_t = _langevin(x_t, score, size, noise)
        if s == 0:
            return denoiser(x_t, t)
        return step.alpha_s / step.alpha_t * x_t
