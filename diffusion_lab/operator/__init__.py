"""Operators: what is seen of an image. One file a kind."""

__all__ = ["Identity", "LinearOperator", "Operator"]

from diffusion_lab.operator.base import Identity, LinearOperator, Operator
