"""Learning-rate schedules, as factors of the optimizer's learning rate."""

__all__ = ["Constant", "Cosine"]

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffusion_lab.constraints import NonNegativeInt, UnitInterval, checked


class Constant(LambdaLR):
    """Linear warm-up over the first steps, then constant (Ho et al., 2020).

    Arguments:
        optimizer: The optimizer.
        max_steps: Not used; part of the common signature.
        warmup: The number of steps of warm-up.
    """

    @checked
    def __init__(self, optimizer: Optimizer, max_steps: int, warmup: NonNegativeInt = 0) -> None:
        super().__init__(optimizer, lambda step: min((step + 1) / (warmup + 1), 1.0))


class Cosine(LambdaLR):
    """Linear warm-up, then half a cosine that decays to `final` at the last step.

    Arguments:
        optimizer: The optimizer.
        max_steps: The number of steps of training; -1, no limit, means no decay.
        warmup: The number of steps of warm-up.
        final: The factor at the last step.
    """

    @checked
    def __init__(
        self,
        optimizer: Optimizer,
        max_steps: int,
        warmup: NonNegativeInt = 0,
        final: UnitInterval = 0.0,
    ) -> None:
        def factor(step: int) -> float:
            if step < warmup or max_steps <= 0:
                return min((step + 1) / (warmup + 1), 1.0)
            progress = min((step - warmup) / max(max_steps - 1 - warmup, 1), 1.0)
            return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

        super().__init__(optimizer, factor)
