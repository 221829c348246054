"""Losses of cross-modal methods, as pure functions of tensors."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops.triplet import acmr_triplet, triplet_margin

__all__ = ["acmr_triplet", "frobenius", "gradient_reversal", "triplet_margin"]


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * gradient, None


def gradient_reversal(x: Tensor, scale: float = 1.0) -> Tensor:
    """x forward, -scale times the gradient backward (Ganin and Lempitsky; ACMR section 3.5)."""
    return _GradientReversal.apply(x, scale)


def frobenius(weights: Iterable[Tensor], *, squared: bool = False) -> Tensor:
    """ACMR's L_reg (Eq. 7): the sum of the weights' Frobenius norms, not squared unless asked (weight decay's form)."""
    norms = [weight.square().sum() if squared else weight.norm() for weight in weights]
    if not norms:
        raise InputError("frobenius needs at least one weight, got none")
    return torch.stack(norms).sum()
