r"""Adaptive solver of the probability-flow ODE: samples, latents and likelihoods.

In u = x_t / α_t and ℓ = log(σ_t / α_t) the ODE of every schedule is

    du/dℓ = u - x̂(α_t u, t),

smooth over all levels. The solution at the highest level is the latent of the image at the
lowest one, and the density changes by the integral of the divergence,

    log p(u_0) = log p(u_1) + ∫_{ℓ_0}^{ℓ_1} (d - tr ∂x̂/∂u) dℓ,   log p(x_t) = log p(u) - d log α_t.

The trace is exact, by d products with the Jacobian, or Hutchinson's estimate vᵀ (∂x̂/∂u) v with
v = ±1, fixed for the whole integration.

The method is that of Dormand and Prince, of fifth order. Each sample of a batch has its own step
sizes, chosen by its own error; a step copies one flag from the device.

Sources:
    Song et al., "Score-based generative modeling through SDEs", 2021, eq. 13, 39 and 40.
    Dormand, Prince, "A family of embedded Runge-Kutta formulae", 1980, table 2.
    Grathwohl et al., "FFJORD", 2019, section 3.1 (one v per solution).
"""

__all__ = ["ProbabilityFlow"]

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.constraints import Positive, PositiveInt, checked
from diffusion_lab.denoiser import Clipped, Denoiser
from diffusion_lab.errors import SamplingError
from diffusion_lab.rng import normal_like
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler, State
from diffusion_lab.sampler.time_grid import LogSNR, TimeGrid
from diffusion_lab.schedule import Schedule
from diffusion_lab.tensor import broadcast
from diffusion_lab.transition import transition

# Weights of the earlier slopes at the start of each stage; the last row is the solution itself.
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# Weights of all seven slopes in the difference of the fifth-order and fourth-order solutions.
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

Parts = tuple[Tensor, ...]  # of the state: u, and with it log p, each of shape (B, n)
Slope = Callable[[Parts, Tensor], Parts]


def _moved(y: Parts, h: Tensor, weights: tuple[float, ...], slopes: list[Parts]) -> Parts:
    """y + h Σ_j weights_j slopes_j."""
    return tuple(
        part
        + h[:, None].to(part) * sum(c * k[n] for c, k in zip(weights, slopes, strict=True) if c)
        for n, part in enumerate(y)
    )


def _stages(
    slope: Slope, y: Parts, level: Tensor, h: Tensor, first: Parts
) -> tuple[Parts, Parts, Parts]:
    """One step of size h (B,): the solution, the slope there, and the error estimate."""
    slopes = [first]
    for weights in STAGES:
        end = _moved(y, h, weights, slopes)
        slopes.append(slope(end, level + h * sum(weights)))
    zero = tuple(torch.zeros_like(part) for part in y)
    return end, slopes[-1], _moved(zero, h, ERROR, slopes)


class ProbabilityFlow(Sampler):
    """Dormand and Prince's method, with error control per sample.

    Arguments:
        steps: The largest number of steps; with `adaptive=false` the number of steps on the grid.
        rtol: Relative tolerance of the error of a step; used if `adaptive`.
        atol: Absolute tolerance of the error of a step; used if `adaptive`.
        adaptive: Whether the step sizes are chosen by the tolerances.
        grid: The grid of `adaptive=false`; uniform in log SNR by default.
        clip: Whether x̂ is clipped to [-1, 1].

    Raises:
        ValueError: If there is a grid with `adaptive=true`.
    """

    stochastic = False
    default_grid = LogSNR

    @checked
    def __init__(
        self,
        steps: PositiveInt = 1000,
        rtol: Positive = 1e-5,
        atol: Positive = 1e-5,
        adaptive: bool = True,
        grid: TimeGrid | None = None,
        clip: bool = False,
    ) -> None:
        super().__init__(steps, grid, clip)
        if adaptive and grid is not None:
            raise ValueError(
                f"grid={type(grid).__name__} is not used, as adaptive=true chooses the step "
                "sizes; set adaptive=false, or no grid"
            )
        self.rtol, self.atol, self.adaptive = rtol, atol, adaptive
        self.supports_adjust = not adaptive

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        """One step on the grid, without error control."""
        if s == 0:
            return state.denoised
        schedule = denoiser.schedule
        step = transition(schedule, state.t, s)
        u = state.x_t / step.alpha_t
        level, end = (schedule.ratio(t).log().expand(len(u)) for t in (state.t, s))
        first = ((u - state.denoised).flatten(1),)
        slope = _slope(denoiser, u.shape)
        (u_s,), _, _ = _stages(slope, (u.flatten(1),), level, end - level, first)
        return (step.alpha_s * u_s).reshape(u.shape)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        start: Tensor,
        *,
        t_start: float = 1.0,
        generator: Generator = None,
        callback: Callback | None = None,
        adjust: Callable[[State, Tensor], Tensor] | None = None,
    ) -> Tensor:
        if not self.adaptive or adjust is not None:
            return super().__call__(
                denoiser, start, t_start=t_start, generator=generator, callback=callback,
                adjust=adjust,
            )  # fmt: skip
        if self.clip:
            denoiser = Clipped(denoiser)
        t_min = min(denoiser.schedule.t_min, t_start / 2)
        x_t = self.integrate(denoiser, start, t_start, t_min, callback)
        x_0 = denoiser(x_t, torch.tensor(t_min, dtype=torch.float64))
        if callback is not None:
            callback(State(0.0, x_0, x_0))
        return x_0

    def integrate(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: float,
        s: float,
        callback: Callback | None = None,
    ) -> Tensor:
        """Returns the solution x_s of the ODE through x_t, of shape (B, *).

        Arguments:
            denoiser: E[x_0 | x_t].
            x_t: The point at time t, of shape (B, *).
            t: Its time, in (0, 1].
            s: The time of the result, in (0, 1]. The latent of an image is x_1, integrated from
                its x_t at `t_min`.
            callback: Called after every step, with the time of the batch's first sample.

        Raises:
            SamplingError: If `steps` steps do not suffice; names the level.
        """
        schedule, shape = denoiser.schedule, x_t.shape
        alpha_t, alpha_s = (
            schedule(torch.tensor(c, dtype=torch.float64))[0].to(x_t) for c in (t, s)
        )
        first, last = (float(schedule.ratio(c).log()) for c in (t, s))

        def watch(y: Parts, slope: Parts, level: Tensor) -> None:
            time = schedule.t_from_ratio(level.exp(), check=False)
            x = broadcast(schedule(time)[0], x_t) * y[0].reshape(shape)
            assert callback is not None
            callback(State(float(time[0]), x, (y[0] - slope[0]).reshape(shape)))

        (u,) = self._solve(
            _slope(denoiser, shape), ((x_t / alpha_t).flatten(1),), first, last,
            watch if callback else None,
        )  # fmt: skip
        return alpha_s * u.reshape(shape)

    def log_prob(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: float | None = None,
        *,
        exact: bool = False,
        generator: Generator = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns log p(x_t) in nats, float64, of shape (B,), and the latents x_1.

        Arguments:
            denoiser: E[x_0 | x_t].
            x_t: The points, of shape (B, *).
            t: The time of x_t in (0, 1); None for the schedule's `t_min`.
            exact: Whether the trace is exact, at d times the cost.
            generator: The source of Hutchinson's v; with keyed streams it does not depend on the
                batch.

        Raises:
            SamplingError: See `integrate`.
        """
        schedule, shape = denoiser.schedule, x_t.shape
        t = schedule.t_min if t is None else t
        times = torch.tensor([t, 1.0], dtype=torch.float64)
        (alpha_t, alpha_1), (low, high) = schedule(times)[0], schedule.ratio(times).log().tolist()
        probe = None if exact else torch.sign(normal_like(x_t, generator))
        zero = torch.zeros(len(x_t), 1, dtype=torch.float64, device=x_t.device)
        y = ((x_t / alpha_t.to(x_t)).flatten(1), zero)
        slope = _slope_and_divergence(denoiser, shape, probe)
        u, integral = self._solve(slope, y, low, high)
        x_1 = alpha_1.to(x_t) * u.reshape(shape)
        d, s = u.shape[1], schedule.prior_std
        square = x_1.double().flatten(1).square().sum(1) / s**2
        log_prior = -square / 2 - d * math.log(s * math.sqrt(2 * math.pi))
        change = d * (torch.log(alpha_1) - torch.log(alpha_t)).to(integral)
        return log_prior + change + integral[:, 0], x_1

    def _solve(
        self,
        slope: Slope,
        y: Parts,
        start: float,
        end: float,
        watch: Callable[[Parts, Parts, Tensor], None] | None = None,
    ) -> Parts:
        """The solution at ℓ = end. Each sample has its own level and step size."""
        level = torch.full((len(y[0]),), start, dtype=torch.float64, device=y[0].device)
        h = torch.full_like(level, (end - start) / 100)
        rate = slope(y, level)
        for _ in range(self.steps):
            last = (end - level).abs() <= h.abs()
            h = torch.where(last, end - level, h)
            y_new, rate_new, error = _stages(slope, y, level, h, rate)
            size = torch.stack([
                ((e / (self.atol + self.rtol * torch.maximum(a.abs(), b.abs()))) ** 2).mean(1)
                for e, a, b in zip(error, y, y_new, strict=True)
            ]).double().amax(0).sqrt()  # fmt: skip
            accepted = size <= 1  # a NaN is not
            level = torch.where(accepted, torch.where(last, end, level + h), level)
            choose = accepted[:, None]
            y = tuple(torch.where(choose, b, a) for a, b in zip(y, y_new, strict=True))
            rate = tuple(torch.where(choose, b, a) for a, b in zip(rate, rate_new, strict=True))
            factor = (0.9 * size.clamp(min=1e-10) ** -0.2).nan_to_num(nan=0.2)
            h = h * factor.clamp(0.2, 5)
            if watch is not None:
                watch(y, rate, level)
            if bool((level == end).all()):
                return y
        stuck = float(level[(level != end).nonzero()[0, 0]])
        raise SamplingError(
            f"ProbabilityFlow reached σ/α = {math.exp(stuck):.4g} after {self.steps} steps. Check "
            "that the denoiser is finite there, or raise sampler.steps, sampler.rtol or "
            "sampler.atol"
        )


def _point(
    schedule: Schedule, u: Tensor, level: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """x_t, of the images' shape, and t."""
    t = schedule.t_from_ratio(level.exp(), check=False)
    x_t = u.reshape(shape)
    return broadcast(schedule(t)[0], x_t) * x_t, t


def _slope(denoiser: Denoiser, shape: torch.Size) -> Slope:
    """u - x̂."""

    def slope(y: Parts, level: Tensor) -> Parts:
        x_t, t = _point(denoiser.schedule, y[0], level, shape)
        return (y[0] - denoiser(x_t, t).flatten(1),)

    return slope


def _slope_and_divergence(denoiser: Denoiser, shape: torch.Size, probe: Tensor | None) -> Slope:
    """u - x̂ and its divergence d - tr ∂x̂/∂u."""

    def slope(y: Parts, level: Tensor) -> Parts:
        with torch.enable_grad():
            u = y[0].detach().requires_grad_()
            x_t, t = _point(denoiser.schedule, u, level, shape)
            denoised = denoiser(x_t, t).flatten(1)
            if probe is None:
                trace = u.new_zeros(len(u))
                for k in range(u.shape[1]):
                    (row,) = torch.autograd.grad(denoised[:, k].sum(), u, retain_graph=True)
                    trace = trace + row[:, k]
            else:
                v = probe.flatten(1)
                (product,) = torch.autograd.grad(denoised, u, v)
                trace = (product * v).sum(1)
        divergence = (u.shape[1] - trace.double())[:, None]
        return (u - denoised).detach(), divergence.detach()

    return slope
