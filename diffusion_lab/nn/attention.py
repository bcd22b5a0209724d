r"""Scaled dot-product attention with derivatives of any order.

    softmax(q kᵀ / √C) v.

The fused operations of torch have no second derivative and no forward-mode derivative. They are
used where neither is needed, and for the first derivative.
"""

__all__ = ["attention"]

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_lab.nn.differentiable import formula_gradients, needs_formula


def _formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return scores.softmax(-1) @ value


class _Attention(torch.autograd.Function):
    """The formula above. Arguments q, k, v."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        # The graph of the fused operation itself, which has a different backward on each device.
        with torch.enable_grad():
            ctx.inputs = [x.detach().requires_grad_() for x in (query, key, value)]
            ctx.output = F.scaled_dot_product_attention(*ctx.inputs)
        output: Tensor = ctx.output.detach()
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph
            with torch.autocast(gradient.device.type, enabled=False):
                return tuple(
                    formula_gradients(_formula, ctx.saved_tensors, ctx.needs_input_grad, gradient)
                )
        gradients: tuple[Tensor, ...]
        gradients = torch.autograd.grad(ctx.output, ctx.inputs, gradient, retain_graph=True)
        return gradients


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Returns softmax(q kᵀ / √C) v, of shape (B, N, C).

    Arguments:
        query: q, of shape (B, N, C).
        key: k, of the same shape.
        value: v, of the same shape.
    """
    if needs_formula():
        return _formula(query, key, value)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or query.is_meta:
        return F.scaled_dot_product_attention(query, key, value)
    result: Tensor = _Attention.apply(query, key, value)
    return result
