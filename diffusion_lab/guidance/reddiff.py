r"""RED-diff: a variational posterior of one point, found by gradient descent.

The posterior is approximated by N(μ, 0). With x_t = α_t μ + σ_t ε, one Adam step at each time t,
from the noisiest on, on

    L(μ) = d/m ½ ‖y - A(μ)‖² + λ r_t sg[ε̂(x_t) - ε]ᵀ μ,    r_t = σ_t / α_t,

d and m being the sizes of x_0 and y and sg the stop of gradients. Because r_t (ε̂ - ε) is nothing
but μ - x̂(x_t), the gradient is that of regularisation by denoising (RED),

    ∇L = d/m ∂Aᵀ (A(μ) - y) + λ (μ - x̂(x_t)),

without a large factor at any level. (It is d times the paper's loss of means over the numbers,
which makes no difference to Adam.) σ_y is not in it: λ weighs the prior against y. The start is

    μ = E[x_0 | y] for x_0 ~ N(0, I),    of the coefficients ȳ_i / (1 + ν_i²) (see `Spectrum`),

which is the paper's A⁺ y where y has no noise; where it has, A⁺ of a blur multiplies it a
thousandfold, and Adam's steps do not lead back.

The result is one image, near a mode, not a sample: repeated calls differ by the noise of the
optimisation only, and this spread means nothing. For a Gaussian prior N(m, C) its fixed point at
level r is where d/m Aᵀ (A μ - y) + λ r² (C + r²)⁻¹ (μ - m) = 0.

Source:
    Mardani, Song, Kautz, Vahdat, "A variational perspective on solving inverse problems with
    diffusion models", 2024, algorithm 1.
"""

__all__ = ["Descent", "REDDiff", "red_gradient"]

import logging

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.guidance.base import Guidance, Observation
from diffusion_lab.guidance.data_step import misfit_gradient
from diffusion_lab.guidance.linear_solve import pull_back
from diffusion_lab.guidance.svd_steps import Spectrum
from diffusion_lab.operator import LinearOperator, SVDOperator
from diffusion_lab.sampler.base import Callback, Generator, Noise, Sampler, State
from diffusion_lab.transition import transition

log = logging.getLogger(__name__)


def red_gradient(
    observation: Observation, mu: Tensor, denoised: Tensor, strength: float
) -> Tensor:
    """Returns ∇L at μ, of shape (B, *), each row's its own.

    Arguments:
        observation: y and A.
        mu: μ, of shape (B, *).
        denoised: x̂(x_t).
        strength: λ.
    """
    balance = mu[0].numel() / observation.y[0].numel()
    return balance * misfit_gradient(observation, mu) + strength * (mu - denoised)


class Descent(Sampler):
    """The steps of `REDDiff`, for one use: it keeps μ and Adam's moments.

    Arguments:
        like: The sampler whose number of steps, grid and clipping are taken.
        observation: What was seen.
        mu: The first μ.
        strength: λ.
        lr: The step size of Adam.
    """

    stochastic = False

    def __init__(
        self, like: Sampler, observation: Observation, mu: Tensor, strength: float, lr: float
    ) -> None:
        super().__init__(like.steps, like.grid, like.clip)
        self.observation, self.mu, self.strength = observation, mu, strength
        # Every number has a step size of its own, so that no row depends on another.
        self.optimizer = torch.optim.Adam([mu], lr=lr, betas=(0.9, 0.99))

    def step(self, denoiser: Denoiser, state: State, s: Tensor, noise: Noise) -> Tensor:
        mu = self.mu
        mu.grad = red_gradient(self.observation, mu, state.denoised, self.strength)
        self.optimizer.step()
        if s == 0:
            return mu.clone()
        step = transition(denoiser.schedule, state.t, s)
        return step.alpha_s * mu + step.sigma_s * noise(mu)


class REDDiff(Guidance):
    """Finds one image that fits y and is its own denoised one: a point, not a posterior sample.

    The sampler gives the levels (its number of steps and its grid) and the clipping; its own step
    is not used. One call of the network a step. It starts from zero where A is not linear.

    Arguments:
        strength: λ, at least 0: the weight of the prior against y.
        lr: The step size of Adam, above 0, on the scale of images in [-1, 1].

    Raises:
        ValueError: If λ is negative or the step size not above 0.
    """

    stochastic = False
    noiseless = True

    def __init__(self, strength: float = 0.25, lr: float = 0.1) -> None:
        if not strength >= 0:
            raise ValueError(f"strength={strength} is not allowed; λ is at least 0")
        if not lr > 0:
            raise ValueError(f"lr={lr} is not allowed; it is above 0")
        self.strength, self.lr = strength, lr

    def draw(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        observation: Observation,
        generator: Generator,
        callback: Callback | None,
    ) -> Tensor:
        log.warning(
            "REDDiff gives one image for each observation, not a posterior; its spread means "
            "nothing. Use guidance=pnpdm, guidance=daps or guidance=mmps for samples"
        )
        operator, z = observation.operator, observation.noise(generator)
        mu = torch.zeros_like(z)
        if isinstance(operator, SVDOperator):
            mu = operator.v(Spectrum.of(observation).pulled(operator.vt(mu), 1.0))
        elif isinstance(operator, LinearOperator):
            one = torch.ones((), dtype=torch.float64)
            mu = pull_back(operator, observation.y, one, float(observation.sigma_y))
        alpha, sigma = (c.to(z) for c in denoiser.schedule(torch.ones((), dtype=torch.float64)))
        method = Descent(sampler, observation, mu, self.strength, self.lr)
        return method(denoiser, alpha * mu + sigma * z, generator=generator, callback=callback)
