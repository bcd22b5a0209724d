r"""Exponential integrators: DPM-Solver++, UniPC and SEEDS.

With λ = log(α / σ) and h = λ_s - λ_t, the linear part of the ODE and of the SDE is solved exactly;
what is left is an integral over x̂, for which the methods use polynomials in λ:

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

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.sampler.base import Noise, Sampler, State
from diffusion_lab.sampler.time_grid import Grid, LogSNR
from diffusion_lab.schedule import Schedule
from diffusion_lab.transition import transition


def _lambda(schedule: Schedule, t: Tensor | float) -> Tensor:
    return -torch.log(schedule.ratio(t))


class DPMSolver(Sampler):
    r"""DPM-Solver++(2M): second order by the estimate of the step before, one call a step.

    D = x̂_t + (x̂_t - x̂_{t'}) h / (2 h'), h' = λ_t - λ_{t'} of the step before; the first step is
    of first order.

    Arguments:
        steps: The number N of steps.
        order: 1 (DDIM, or the ancestral step with `stochastic`) or 2.
        stochastic: Whether the SDE is solved instead of the ODE.
        grid: See `Sampler`; even in log SNR by default.
        clip: Whether x̂ is clipped to [-1, 1].

    Raises:
        ValueError: If the order is neither.
    """

    own_grid = LogSNR
    memory = 1

    def __init__(
        self, steps: int = 20, order: int = 2, stochastic: bool = False, grid: Grid | None = None,
        clip: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(steps, grid, clip)
        if order not in (1, 2):
            raise ValueError(f"order={order} is not allowed; it is 1 or 2")
        self.order, self.stochastic = order, stochastic

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, schedule = state.x_t, denoiser.schedule
        z = noise(x_t) if self.stochastic else None
        if s == 0:
            return state.denoised
        alpha_s, sigma_s, _, sigma_t, _ = transition(schedule, state.t, s)
        h = _lambda(schedule, s) - _lambda(schedule, state.t)
        d = state.denoised
        if self.order == 2 and state.previous is not None:
            h_before = _lambda(schedule, state.t) - _lambda(schedule, state.previous.t)
            d = d + (h / (2 * h_before)).to(d.dtype) * (d - state.previous.denoised)
        if z is None:
            of_x, of_d = sigma_s / sigma_t, alpha_s * torch.expm1(-h)
            return of_x.to(d.dtype) * x_t - of_d.to(d.dtype) * d
        kept = -torch.expm1(-2 * h)
        of_x, of_d = sigma_s / sigma_t * torch.exp(-h), alpha_s * kept
        x_s = of_x.to(d.dtype) * x_t + of_d.to(d.dtype) * d
        return x_s + (sigma_s * torch.sqrt(kept)).to(d.dtype) * z


class UniPC(Sampler):
    r"""UniPC of second order: a predictor like 2M, and a corrector that costs no call.

    The estimate at s, made at the predicted x_s, corrects x_s before the next step starts from it.
    With D_0 = x̂_t, D_1 = (x̂_{t'} - x̂_t) / ρ, ρ = (λ_{t'} - λ_t) / h, D_2 = x̂_s - x̂_t,

        predictor   x_s = σ_s/σ_t x_t - α_s (e^{-h} - 1) (D_0 + D_1 / 2),
        corrector   x_s = σ_s/σ_t x_t - α_s (e^{-h} - 1) (D_0 + c_1 D_1 + c_2 D_2),

    c solves c_1 + c_2 = φ_1, ρ c_1 + c_2 = φ_2, φ_1 and φ_2 the moments of e^{-h}'s expansion.

    Arguments:
        steps: The number N of steps.
        grid: See `Sampler`; even in log SNR by default.
        clip: Whether x̂ is clipped to [-1, 1].
    """

    stochastic = False
    own_grid = LogSNR
    memory = 2
    adjustable = False

    def __init__(self, steps: int = 20, grid: Grid | None = None, clip: bool = False) -> None:
        super().__init__(steps, grid, clip)

    def refine(self, schedule: Schedule, state: State) -> State:
        before = state.previous
        if before is None:
            return state
        alpha_s, sigma_s, _, sigma_t, _ = transition(schedule, before.t, state.t)
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
            first = (before.previous.denoised - before.denoised) / rho.to(last.dtype)
            correction = c_1.to(last.dtype) * first + (b_1 - c_1).to(last.dtype) * last
        d = before.denoised + correction
        x_s = (sigma_s / sigma_t).to(d.dtype) * before.x_t - (alpha_s * moment).to(d.dtype) * d
        return replace(state, x_t=x_s)

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, schedule = state.x_t, denoiser.schedule
        if s == 0:
            return state.denoised
        alpha_s, sigma_s, _, sigma_t, _ = transition(schedule, state.t, s)
        h = _lambda(schedule, s) - _lambda(schedule, state.t)
        d = state.denoised
        if state.previous is not None:
            rho = (_lambda(schedule, state.previous.t) - _lambda(schedule, state.t)) / h
            d = d + (state.previous.denoised - d) / (2 * rho).to(d.dtype)
        return (sigma_s / sigma_t).to(d.dtype) * x_t - (alpha_s * torch.expm1(-h)).to(d.dtype) * d


class SEEDS(Sampler):
    r"""SEEDS-2: the SDE by two stages, whose noise is one path of the Brownian motion.

    With m half way in λ between t and s (h = 2 k),

        x_m = σ_m/σ_t e^{-k} x_t + α_m (1 - e^{-2k}) x̂_t + σ_m n_m,    n_m = √(1 - e^{-2k}) z,
        x_s = σ_s/σ_t e^{-h} x_t + α_s (1 - e^{-2h}) x̂_m + σ_s n_s,
        n_s = e^{-k} n_m + √(1 - e^{-2k}) z'.

    Arguments:
        steps: The number N of steps; 2N - 1 calls of the denoiser.
        grid: See `Sampler`; even in log SNR by default.
        clip: Whether x̂ is clipped to [-1, 1].
    """

    own_grid = LogSNR

    def __init__(self, steps: int = 20, grid: Grid | None = None, clip: bool = False) -> None:
        super().__init__(steps, grid, clip)

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        x_t, schedule = state.x_t, denoiser.schedule
        if s == 0:
            return state.denoised
        half = torch.sqrt(schedule.ratio(s) * schedule.ratio(state.t))  # in log r
        m = schedule.t_from_ratio(half)
        alpha_m, sigma_m, _, sigma_t, _ = transition(schedule, state.t, m)
        alpha_s, sigma_s = schedule(s)
        k = _lambda(schedule, m) - _lambda(schedule, state.t)
        fresh, kept = -torch.expm1(-2 * k), -torch.expm1(-4 * k)
        n_m = torch.sqrt(fresh).to(x_t.dtype) * noise(x_t)
        x_m = (sigma_m / sigma_t * torch.exp(-k)).to(x_t.dtype) * x_t + sigma_m.to(x_t.dtype) * n_m
        x_m = x_m + (alpha_m * fresh).to(x_t.dtype) * state.denoised
        n_s = torch.exp(-k).to(x_t.dtype) * n_m + torch.sqrt(fresh).to(x_t.dtype) * noise(x_t)
        of_x = sigma_s / sigma_t * torch.exp(-2 * k)
        x_s = of_x.to(x_t.dtype) * x_t + sigma_s.to(x_t.dtype) * n_s
        return x_s + (alpha_s * kept).to(x_t.dtype) * denoiser(x_m, m)
