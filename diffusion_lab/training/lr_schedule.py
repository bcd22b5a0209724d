r"""Learning rates over the steps of training, as factors of the optimizer's own."""

__all__ = ["Constant", "Cosine"]

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Constant(LambdaLR):
    """Linear warm-up over the first steps, then constant (Ho et al., 2020).

    Arguments:
        optimizer: The optimizer.
        max_steps: Not used; the signature is the same for all.
        warmup: The number of steps of warm-up, at least 0.
    """

    def __init__(self, optimizer: Optimizer, max_steps: int, warmup: int = 0) -> None:
        super().__init__(optimizer, lambda step: min((step + 1) / (warmup + 1), 1.0))


class Cosine(LambdaLR):
    """Linear warm-up, then half a cosine down to `final` at the last step.

    Arguments:
        optimizer: The optimizer.
        max_steps: The number of steps of training; without a limit (-1) there is no decay.
        warmup: The number of steps of warm-up, at least 0.
        final: The factor at the end, in [0, 1].
    """

    def __init__(
        self, optimizer: Optimizer, max_steps: int, warmup: int = 0, final: float = 0.0
    ) -> None:
        def factor(step: int) -> float:
            if step < warmup or max_steps <= 0:
                return min((step + 1) / (warmup + 1), 1.0)
            progress = min((step - warmup) / max(max_steps - 1 - warmup, 1), 1.0)
            return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

        super().__init__(optimizer, factor)
