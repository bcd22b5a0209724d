r"""Differentiable gradients for autograd functions with a fast backward pass.

A backward pass by compiled kernels or by torch's fused operations has no derivative itself. Where
autograd builds a graph of the gradient (`create_graph=True`), the function's formula is computed
again by operations of torch, whose gradients can be differentiated any number of times.

The transforms of `torch.func` and forward-mode differentiation need such a formula from the start.
"""

__all__ = ["formula_gradients", "needs_formula"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_formula() -> bool:
    """Returns whether a transform of torch.func or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def formula_gradients(
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    gradient: Tensor,
) -> list[Tensor | None]:
    """Returns the gradients of a formula by its inputs, with their graph.

    Arguments:
        formula: The function, of torch's operations, of all inputs.
        inputs: Its inputs.
        needs: Whether the gradient by each input is needed.
        gradient: The gradient of the output.
    """
    wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed and x is not None]
    found = iter(list[Tensor]())
    if wanted:
        with torch.enable_grad():
            output = formula(*inputs)
        found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=True))
    return [
        next(found) if needed and x is not None else None
        for x, needed in zip(inputs, needs, strict=True)
    ]
