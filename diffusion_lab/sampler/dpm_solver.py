r"""Exponential integrators: DPM-Solver++, UniPC and SEEDS.

With λ = log(α / σ) and h = λ_s - λ_t, the linear part of the ODE and of the SDE is solved exactly.
The integral over x̂ remains, in which the methods approximate x̂ by polynomials in λ:

    ODE   x_s = σ_s/σ_t x_t - α_s (e^{-h} - 1) D,
    SDE   x_s = σ_s/σ_t e^{-h} x_t + α_s (1 - e^{-2h}) D + σ_s √(1 - e^{-2h}) z,

D = x̂ in first order. The last step, to t = 0, returns x̂.

Sources:
    Lu et al., "DPM-Solver++", 2022, algorithm 2 (2M) and appendix D.3 (SDE).
    Zhao et al., "UniPC", 2023, algorithms 1 and 2, with B(h) = e^h - 1.
    Gonzalez et al., "SEEDS: exponential SDE solvers", 2023, section 3.2.
"""

__all__ = ["SEEDS", "DPMSolver", "UniPC"]

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from diffusion_lab.constraints import PositiveInt, checked
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.sampler.time_grid import LogSNR, TimeGrid
from diffusion_lab.schedule import Schedule
from diffusion_lab.transition import transition


def _lambda(schedule: Schedule, t: Tensor | float) -> Tensor:
    """λ = log(α / σ), half the log SNR."""
    return -torch.log(schedule.ratio(t))


class DPMSolver(Sampler):
    r"""DPM-Solver++(2M): second order by the previous estimate, one call per step.

    D = x̂_t + (x̂_t - x̂_{t'}) h / (2 h'), h' = λ_t - λ_{t'} of the step before; the first step is
    of first order.

    Arguments:
        steps: The number N of steps.
        order: 1 (DDIM, or the ancestral step with `stochastic`) or 2.
        stochastic: Whether the SDE is solved instead of the ODE.
        grid: See `Sampler`; uniform in log SNR by default.
        clip: Whether x̂ is clipped to [-1, 1].
    """

    default_grid = LogSNR

    @checked
    def __init__(
        self,
        steps: PositiveInt = 20,
        order: Literal[1, 2] = 2,
        stochastic: bool = False,
        grid: TimeGrid | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__(steps, grid, clip)
        self.order, self.stochastic = order, stochastic
        self.history = order - 1

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, schedule = state.x_t, denoiser.schedule
        z = noise(x_t) if self.stochastic else None
        if s == 0:
            return state.denoised
        step = transition(schedule, state.t, s)
        alpha_s, sigma_s, sigma_t = step.alpha_s, step.sigma_s, step.sigma_t
        h = _lambda(schedule, s) - _lambda(schedule, state.t)
        d = state.denoised
        if self.order == 2 and state.previous is not None:
            h_before = _lambda(schedule, state.t) - _lambda(schedule, state.previous.t)
            d = d + h / (2 * h_before) * (d - state.previous.denoised)
        if z is None:
            return sigma_s / sigma_t * x_t - alpha_s * torch.expm1(-h) * d
        fresh = -torch.expm1(-2 * h)
        x_s = sigma_s / sigma_t * torch.exp(-h) * x_t + alpha_s * fresh * d
        return x_s + sigma_s * torch.sqrt(fresh) * z


class UniPC(Sampler):
    r"""UniPC of second order: a predictor like 2M, and a corrector without a further call.

    The estimate at the predicted x_s corrects x_s before the next step.
    With D_0 = x̂_t, D_1 = (x̂_{t'} - x̂_t) / ρ, ρ = (λ_{t'} - λ_t) / h, D_2 = x̂_s - x̂_t,

        predictor   x_s = σ_s/σ_t x_t - α_s (e^{-h} - 1) (D_0 + D_1 / 2),
        corrector   x_s = σ_s/σ_t x_t - α_s (e^{-h} - 1) (D_0 + c_1 D_1 + c_2 D_2),

    c solves c_1 + c_2 = φ_1, ρ c_1 + c_2 = φ_2, with the moments φ_1 and φ_2 of the expansion of
    e^{-h}.

    Arguments:
        steps: The number N of steps.
        grid: See `Sampler`; uniform in log SNR by default.
        clip: Whether x̂ is clipped to [-1, 1].
    """

    stochastic = False
    default_grid = LogSNR
    history = 2
    supports_adjust = False

    @checked
    def __init__(
        self, steps: PositiveInt = 20, grid: TimeGrid | None = None, clip: bool = False
    ) -> None:
        super().__init__(steps, grid, clip)

    def correct(self, schedule: Schedule, state: State) -> State:
        before = state.previous
        if before is None:
            return state
        step = transition(schedule, before.t, state.t)
        h = _lambda(schedule, state.t) - _lambda(schedule, before.t)
        moment = torch.expm1(-h)  # B(-h)
        phi = moment / -h - 1
        b_1 = phi / moment
        b_2 = 2 * (phi / -h - 0.5) / moment
        last = state.denoised - before.denoised
        if before.previous is None:
            correction = 0.5 * last
        else:
            rho = (_lambda(schedule, before.previous.t) - _lambda(schedule, before.t)) / h
            c_1 = (b_1 - b_2) / (1 - rho)
            first = (before.previous.denoised - before.denoised) / rho
            correction = c_1 * first + (b_1 - c_1) * last
        d = before.denoised + correction
        x_s = step.sigma_s / step.sigma_t * before.x_t - step.alpha_s * moment * d
        return replace(state, x_t=x_s)

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, schedule = state.x_t, denoiser.schedule
        if s == 0:
            return state.denoised
        step = transition(schedule, state.t, s)
        h = _lambda(schedule, s) - _lambda(schedule, state.t)
        d = state.denoised
        if state.previous is not None:
            rho = (_lambda(schedule, state.previous.t) - _lambda(schedule, state.t)) / h
            d = d + (state.previous.denoised - d) / (2 * rho)
        return step.sigma_s / step.sigma_t * x_t - step.alpha_s * torch.expm1(-h) * d


class SEEDS(Sampler):
    r"""SEEDS-2: the SDE in two stages, with the noise of one Brownian path.

    With m at the midpoint in λ between t and s (h = 2 k),

        x_m = σ_m/σ_t e^{-k} x_t + α_m (1 - e^{-2k}) x̂_t + σ_m n_m,    n_m = √(1 - e^{-2k}) z,
        x_s = σ_s/σ_t e^{-h} x_t + α_s (1 - e^{-2h}) x̂_m + σ_s n_s,
        n_s = e^{-k} n_m + √(1 - e^{-2k}) z'.

    Arguments:
        steps: The number N of steps; 2N - 1 calls of the denoiser.
        grid: See `Sampler`; uniform in log SNR by default.
        clip: Whether x̂ is clipped to [-1, 1].
    """

    default_grid = LogSNR

    @checked
    def __init__(
        self, steps: PositiveInt = 20, grid: TimeGrid | None = None, clip: bool = False
    ) -> None:
        super().__init__(steps, grid, clip)

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, schedule = state.x_t, denoiser.schedule
        if s == 0:
            return state.denoised
        m = schedule.t_from_ratio(torch.sqrt(schedule.ratio(s) * schedule.ratio(state.t)))
        step = transition(schedule, state.t, s)
        alpha_s, sigma_s, sigma_t = step.alpha_s, step.sigma_s, step.sigma_t
        alpha_m, sigma_m = schedule(m)
        k = _lambda(schedule, m) - _lambda(schedule, state.t)
        fresh_m, fresh_s = -torch.expm1(-2 * k), -torch.expm1(-4 * k)
        n_m = torch.sqrt(fresh_m) * noise(x_t)
        x_m = sigma_m / sigma_t * torch.exp(-k) * x_t + sigma_m * n_m
        x_m = x_m + alpha_m * fresh_m * state.denoised
        n_s = torch.exp(-k) * n_m + torch.sqrt(fresh_m) * noise(x_t)
        x_s = sigma_s / sigma_t * torch.exp(-2 * k) * x_t + sigma_s * n_s
        return x_s + alpha_s * fresh_s * denoiser(x_m, m)
