r"""Langevin dynamics at a fixed noise level, alone or as the corrector of another sampler.

    x <- x + δ ∇ log p(x_t) + √(2 δ) z

leaves p(x_t) as it is, but for an error of the order of δ. Both samplers take δ = 2 a (snr σ_t)²,
which is the same for all samples. Song et al. set it by the norms of z and of the score, averaged
over the batch, snr |z| / |∇ log p|: for images that is snr σ_t to a few percent, since
|∇ log p| ≈ √d / σ_t; but a sample would depend on the others of its batch, and with its own norms
δ would depend on x, and p(x_t) would not be left as it is.

Sources:
    Song, Ermon, "Generative modeling by estimating gradients of the data distribution", 2019,
    algorithm 1 (annealed Langevin dynamics).
    Song et al., "Score-based generative modeling through SDEs", 2021, algorithms 4 and 5.
"""

__all__ = ["AnnealedLangevin", "PredictorCorrector"]

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.sampler.sde import ReverseDiffusion
from diffusion_lab.sampler.time_grid import Grid, LogSNR
from diffusion_lab.schedule import Schedule
from diffusion_lab.transition import transition


def _langevin(x: Tensor, score: Tensor, size: Tensor, noise: Noise) -> Tensor:
    return x + size.to(x.dtype) * score + torch.sqrt(2 * size).to(x.dtype) * noise(x)


class PredictorCorrector(Sampler):
    r"""A predictor step to s, then M Langevin steps at s.

    δ = 2 a (snr σ_s)², with a = α_t / α_s, which is 1 for VE; algorithm 5 of the paper has √a.

    Arguments:
        steps: The number N of steps.
        predictor: Makes the sampler of the predictor from N and the grid.
        corrections: The number M of Langevin steps after each step.
        snr: Sets δ, above 0; the paper's signal-to-noise ratio: 0.16 for small images, 0.075 at
            256.
        grid: See `Sampler`; uniform in t by default.
        clip: Whether x̂ is clipped to [-1, 1].

    Raises:
        ValueError: If M is below 1 or snr not above 0.
    """

    def __init__(
        self, steps: int = 1000, predictor: Callable[..., Sampler] = ReverseDiffusion,
        corrections: int = 1, snr: float = 0.16, grid: Grid | None = None, clip: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(steps, grid, clip)
        if corrections < 1 or not snr > 0:
            raise ValueError(
                f"corrections={corrections} and snr={snr} are not allowed; at least 1, above 0"
            )
        self.predictor = predictor(steps=steps, grid=grid)
        self.corrections, self.snr = corrections, snr

    def check(self, schedule: Schedule) -> None:
        self.predictor.check(schedule)

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_s = self.predictor.step(denoiser, state, s, noise)
        if s == 0:
            return x_s
        alpha_s, sigma_s, alpha_t, _, _ = transition(denoiser.schedule, state.t, s)
        size = 2 * (alpha_t / alpha_s) * (self.snr * sigma_s) ** 2
        for _ in range(self.corrections):
            x_s = _langevin(x_s, denoiser.score(x_s, s), size, noise)
        return x_s


class AnnealedLangevin(Sampler):
    r"""Langevin dynamics at falling noise levels, M steps at each.

    It needs no schedule but the levels themselves: at each, x is made to follow p(x_t), and is
    carried to the next level by α_s / α_t. It mixes slowly between modes that are far apart.

    Arguments:
        steps: The number N of levels.
        corrections: The number M of Langevin steps at each level.
        snr: Sets δ = 2 (snr σ_t)², above 0.
        grid: See `Sampler`; even in log SNR by default, the geometric sequence of the paper.
        clip: Whether x̂ is clipped to [-1, 1].

    Raises:
        ValueError: If M is below 1 or snr not above 0.
    """

    own_grid = LogSNR

    def __init__(
        self, steps: int = 200, corrections: int = 5, snr: float = 0.16, grid: Grid | None = None,
        clip: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(steps, grid, clip)
        if corrections < 1 or not snr > 0:
            raise ValueError(
                f"corrections={corrections} and snr={snr} are not allowed; at least 1, above 0"
            )
        self.corrections, self.snr = corrections, snr

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        alpha_s, _, alpha_t, sigma_t, _ = transition(denoiser.schedule, state.t, s)
        x_t, denoised = state.x_t, state.denoised
        t = torch.tensor(state.t, dtype=torch.float64)
        size = 2 * (self.snr * sigma_t) ** 2
        for k in range(self.corrections):
            if k:
                denoised = denoiser(x_t, t)
            score = (alpha_t.to(x_t.dtype) * denoised - x_t) / (sigma_t**2).to(x_t.dtype)
            x_t = _langevin(x_t, score, size, noise)
        if s == 0:
            return denoiser(x_t, t)
        return (alpha_s / alpha_t).to(x_t.dtype) * x_t
