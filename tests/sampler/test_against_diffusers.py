"""Complete runs of the samplers against the schedulers of diffusers, with equal network and noise.

Both use the same times: index i of diffusers is t = (i + 1) / T. The tables of diffusers are
replaced by float64 tables; some of its steps still round the state to float32.
"""

import math
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion_lab.denoiser import Denoiser, NetworkDenoiser
from diffusion_lab.parameterization import EDM as EDMParameterization
from diffusion_lab.parameterization import Epsilon
from diffusion_lab.sampler import DDIM, Ancestral, DPMSolver, Heun, Sampler, State, UniPC
from diffusion_lab.sampler.time_grid import Karras, TimeGrid
from diffusion_lab.schedule import EDM, VP, Linear, Schedule

BETA = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BAR = (1 - BETA).cumprod(0)
D = 5


class Indices(TimeGrid):
    """A time grid of given indices, followed by 0."""

    def __init__(self, indices: Tensor) -> None:
        self.indices = indices

    def __call__(self, schedule: Schedule, steps: int, t_start: float) -> Tensor:
        times = (self.indices.double() + 1) / schedule.steps
        return torch.cat([times, times.new_zeros(1)])


class Net(nn.Module):
    """A random ε-network in float64 that depends on x and the index."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        w, v = torch.randn(2, D, D, generator=generator, dtype=torch.float64)
        self.w, self.v = nn.Parameter(w), nn.Parameter(v / 2)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.sin(x @ self.w + index.double()[:, None] / 200) @ self.v


class Recorder(Denoiser):
    """A denoiser that records its inputs."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser = denoiser
        self.asked: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.asked.append(x_t)
        return self.denoiser(x_t, t)


NET = Net()


def start() -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, D, generator=generator, dtype=torch.float64), generator


def states(
    sampler: Sampler, x: Tensor, generator: torch.Generator, schedule: Schedule | None = None
) -> list[Tensor]:
    """x before every step, and the result."""
    states: list[Tensor] = []

    def record(state: State) -> None:
        states.append(state.x_t)

    denoiser = NetworkDenoiser(NET, schedule or Linear(), Epsilon())
    sampler(denoiser, x, generator=generator, callback=record)
    return states


@torch.no_grad()
def their_states(scheduler: Any, x: Tensor, **options: Any) -> list[Tensor]:
    """x before every step of diffusers' loop, and the result."""
    states = [x]
    for i in scheduler.timesteps:
        epsilon = NET(scheduler.scale_model_input(x, i), i.expand(len(x)))
        x = scheduler.step(epsilon, i, x, **options).prev_sample
        states.append(x)
    return states


def in_float64(scheduler: Any, steps: int) -> Any:
    """Replaces the tables by float64 ones; in float32, 1 - ᾱ and β have 3 digits at small t."""
    scheduler.betas, scheduler.alphas_cumprod = BETA, ALPHA_BAR
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "sigmas"):
        ratio = torch.sqrt((1 - ALPHA_BAR) / ALPHA_BAR)
        ratio = torch.cat([ratio[scheduler.timesteps.long()], ratio.new_zeros(1)])
        assert np.allclose(scheduler.sigmas, ratio, rtol=1e-5)
        scheduler.sigmas = ratio
    return scheduler


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    """Compares the states of every step, relative to the largest value."""
    assert len(ours) == len(theirs)
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
        assert error < tolerance, f"step {k}: {error:.2g}"


# --- DDPM and DDIM ------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(
    "spacing, steps", [("leading", 1000), ("leading", 50), ("trailing", 13), ("linspace", 28)]
)
def test_ancestral_matches_the_ddpm_scheduler(variance: str, spacing: str, steps: int) -> None:
    """Under `trailing`, diffusers adds noise in the last step too, as its timestep is not 0."""
    scheduler = in_float64(
        diffusers.DDPMScheduler(
            variance_type=f"fixed_{variance}", clip_sample=False, timestep_spacing=spacing
        ),
        steps,
    )
    x, generator = start()
    sampler = Ancestral(steps, variance, grid=Indices(scheduler.timesteps))
    ours = states(sampler, x, generator)
    x, generator = start()
    theirs = their_states(scheduler, x, generator=generator)
    if spacing == "trailing" and variance == "large":
        last = float((ours[-1] - theirs[-1]).abs().max())
        assert last > math.sqrt(1 - float(ALPHA_BAR[scheduler.timesteps[-1]])) / 2
        ours, theirs = ours[:-1], theirs[:-1]
    assert_close(ours, theirs, 1e-8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_matches_diffusers_if_the_steps_divide_1000(spacing: str, eta: float) -> None:
    scheduler = in_float64(
        diffusers.DDIMScheduler(clip_sample=False, timestep_spacing=spacing), 50
    )
    x, generator = start()
    ours = states(DDIM(50, eta, grid=Indices(scheduler.timesteps)), x, generator)
    x, generator = start()
    theirs = their_states(scheduler, x, eta=eta, generator=generator)
    assert_close(ours, theirs, 1e-9)


@torch.no_grad()
def ddim(indices: Tensor, x: Tensor) -> Tensor:
    """Song, Meng and Ermon, eq. 12 with σ = 0, from each index to the next one."""
    for i, j in pairwise([*indices.tolist(), -1]):
        now, following = float(ALPHA_BAR[i]), float(ALPHA_BAR[j]) if j >= 0 else 1.0
        epsilon = NET(x, torch.full((len(x),), i))
        x_0 = (x - math.sqrt(1 - now) * epsilon) / math.sqrt(now)
        x = math.sqrt(following) * x_0 + math.sqrt(1 - following) * epsilon
    return x


@pytest.mark.parametrize(
    "spacing, steps, right",
    [("leading", 50, True), ("trailing", 50, True), ("leading", 13, True),
     ("linspace", 10, False), ("linspace", 50, False), ("trailing", 13, False)],
)  # fmt: skip
def test_ddim_steps_to_the_next_time_of_its_grid(spacing: str, steps: int, right: bool) -> None:
    """diffusers steps to i - T // n, not to the next index (huggingface/diffusers#11347).

    With `linspace` and 10 steps, the grid is 999, 888, ..., but x is taken to the level of 899.
    """
    scheduler = in_float64(
        diffusers.DDIMScheduler(clip_sample=False, timestep_spacing=spacing), steps
    )
    indices = scheduler.timesteps
    exact = ddim(indices, start()[0])
    ours = states(DDIM(steps, grid=Indices(indices)), *start())[-1]
    assert_close([ours], [exact], 1e-9)
    theirs = their_states(scheduler, start()[0])[-1]
    wrong = sum(i - 1000 // steps != j for i, j in pairwise([*indices.tolist(), -1]) if j >= 0)
    if right:
        assert wrong == 0
        assert_close([theirs], [exact], 1e-9)
    else:
        assert wrong > 5
        assert float((theirs - exact).abs().max()) > 0.01


# --- ODE solvers --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("spacing, steps", [("linspace", 20), ("trailing", 25), ("leading", 8)])
def test_dpm_solver_matches_diffusers(spacing: str, steps: int, order: int) -> None:
    """The method is 2M with midpoint slopes; diffusers rounds the state to float32."""
    scheduler = in_float64(
        diffusers.DPMSolverMultistepScheduler(solver_order=order, timestep_spacing=spacing), steps
    )
    sampler = DPMSolver(steps, order, grid=Indices(scheduler.timesteps))
    ours = states(sampler, *start())
    assert_close(ours, their_states(scheduler, start()[0]), 1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_stochastic_dpm_solver_matches_diffusers(order: int) -> None:
    """The noise is float32 in both."""
    scheduler = in_float64(
        diffusers.DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", solver_order=order
        ),
        20,
    )
    z = torch.randn(20, 6, D, generator=torch.Generator().manual_seed(2)).double()
    x, _ = start()
    ours, theirs = [x], [x]
    sampler = DPMSolver(20, order, stochastic=True, grid=Indices(scheduler.timesteps))
    denoiser, before = NetworkDenoiser(NET, Linear(), Epsilon()), None
    for k, (t, s) in enumerate(pairwise(sampler.times(denoiser.schedule))):
        with torch.no_grad():
            before = State(float(t), ours[-1], denoiser(ours[-1], t), before)
        ours.append(sampler.step(denoiser, before, s, lambda x, k=k: z[k]))
        i = scheduler.timesteps[k]
        with torch.no_grad():
            epsilon = NET(theirs[-1], i.expand(6))
        theirs.append(scheduler.step(epsilon, i, theirs[-1], variance_noise=z[k]).prev_sample)
    assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize("spacing, steps", [("linspace", 20), ("trailing", 25), ("leading", 8)])
def test_unipc_matches_diffusers(spacing: str, steps: int) -> None:
    """diffusers returns the predicted states, which are the inputs of the denoiser here."""
    scheduler = in_float64(
        diffusers.UniPCMultistepScheduler(
            solver_order=2, solver_type="bh2", timestep_spacing=spacing
        ),
        steps,
    )
    denoiser = Recorder(NetworkDenoiser(NET, Linear(), Epsilon()))
    x_0 = UniPC(steps, grid=Indices(scheduler.timesteps))(denoiser, start()[0])
    assert_close([*denoiser.asked, x_0], their_states(scheduler, start()[0]), 1e-8)


@torch.no_grad()
def test_heun_matches_diffusers() -> None:
    """diffusers works on x_t / α_t, and two of its steps are one step here.

    999 / 27 is an integer. Otherwise its `linspace` has levels between the indices, where
    diffusers interpolates σ and this package interpolates log ᾱ.
    """
    scheduler = diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(28)
    indices = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[1::2]]).long()
    assert indices[1] == 962 and indices[-1] == 0
    ratio = torch.sqrt((1 - ALPHA_BAR) / ALPHA_BAR)[indices]
    repeated = torch.cat([ratio[:1], ratio[1:].repeat_interleave(2), ratio.new_zeros(1)])
    assert np.allclose(scheduler.sigmas, repeated, rtol=1e-4)
    scheduler.sigmas = repeated
    alpha = ALPHA_BAR[indices].sqrt()
    x = start()[0]
    theirs = their_states(scheduler, x / alpha[0])
    theirs = [*(u * a for u, a in zip(theirs[:-1:2], alpha, strict=True)), theirs[-1]]
    ours = states(Heun(28, grid=Indices(indices)), *start())
    assert_close(ours, theirs, 1e-8)


# --- EDM ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_edm_sampling_matches_diffusers() -> None:
    """Preconditioning, Karras' grid and Euler steps, from the raw network output F."""
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(30)
    x = 80 * start()[0]
    theirs = [x]
    for c_noise in scheduler.timesteps:
        # The index here is ln σ on another scale: 0 at σ_min, 999 at σ_max.
        index = 999 * (4 * c_noise - math.log(0.002)) / math.log(80 / 0.002)
        output = NET(scheduler.scale_model_input(theirs[-1], c_noise), index.expand(6))
        theirs.append(scheduler.step(output, c_noise, theirs[-1]).prev_sample)
    denoiser = NetworkDenoiser(NET, EDM(0.002, 80.0), EDMParameterization(0.5))
    ours: list[Tensor] = []
    DDIM(30, grid=Karras())(denoiser, x, callback=lambda state: ours.append(state.x_t))
    assert_close(ours, theirs, 1e-4)


class Smooth(Denoiser):
    """An estimate that depends only on x_t / α_t and the level r, as for every exact denoiser."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return smooth(x_t / self.schedule(t)[0].to(x_t), self.schedule.ratio(t).to(x_t))


def smooth(x: Tensor, r: Tensor) -> Tensor:
    return torch.tanh(x @ NET.w.detach() / (1 + r)) + x / (1 + r**2)


def algorithm_2(
    x: Tensor, levels: Tensor, churn: float, noise: float, low: float, high: float,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Algorithm 2 of Karras et al. for σ(t) = t and s(t) = 1; without churn, algorithm 1."""
    n = len(levels) - 1
    for t, t_next in pairwise(levels):
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= t <= high else 0.0
        t_hat = t + gamma * t
        if gamma > 0:
            epsilon = noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = x + torch.sqrt(t_hat**2 - t**2) * epsilon
        d = (x - smooth(x, t_hat)) / t_hat
        x_next = x + (t_next - t_hat) * d
        if t_next != 0:
            d_next = (x_next - smooth(x_next, t_next)) / t_next
            x_next = x + (t_next - t_hat) * (d + d_next) / 2
        x = x_next
    return x


@pytest.mark.parametrize("churn", [0.0, 5.0, 40.0])
@pytest.mark.parametrize("schedule", [EDM(), VP()], ids=["edm", "vp"])
def test_heun_with_churn_matches_algorithm_2_of_edm(schedule: Schedule, churn: float) -> None:
    """Under VP, the levels are r, and x is x_t / α_t."""
    options = {"churn": churn, "noise": 1.003, "churn_min": 0.05, "churn_max": 50.0}
    sampler = Heun(18, grid=Karras(), **options)
    levels = schedule.ratio(sampler.times(schedule))
    start_u = float(levels[0]) * start()[0]
    alpha_1 = schedule(torch.ones((), dtype=torch.float64))[0]
    ours = sampler(Smooth(schedule), alpha_1 * start_u, generator=torch.Generator().manual_seed(3))
    values = tuple(options.values())
    theirs = algorithm_2(start_u, levels, *values, torch.Generator().manual_seed(3))
    assert_close([ours], [theirs], 1e-9)


def test_karras_grid_matches_equation_5() -> None:
    sigma = (80 ** (1 / 7) + np.arange(18) / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    levels = EDM().ratio(Karras()(EDM(), 18, 1.0))
    np.testing.assert_allclose(levels, [*sigma, 0.0], rtol=1e-10)
