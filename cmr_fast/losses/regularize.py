"""ACMR's two helpers: the gradient turned round, and the sum of the weights' norms."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from cmr_fast.errors import InputError


class _GradientReversal(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * gradient, None


def gradient_reversal(x: Tensor, scale: float = 1.0) -> Tensor:
    """Return x; its gradient is multiplied by -scale (Ganin and Lempitsky 2015; ACMR section 3.5).

    Parameters
    ----------
    x : Tensor
        Float, of any shape.
    scale : float
        What the gradient is multiplied by, after its sign is turned.

    Returns
    -------
    Tensor
        x, of the same shape, dtype and device.
    """
    return cast(Tensor, _GradientReversal.apply(x, scale))


class _Norms(torch.autograd.Function):
    """Frobenius norms of weights, summed. The gradient is one pass over a weight; 0 where its norm is."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        norms = torch.stack(torch._foreach_norm(weights))
        ctx.save_for_backward(norms, *weights)
        return norms.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        norms, *weights = ctx.saved_tensors
        scales = (gradient / norms).masked_fill(norms == 0, 0).unbind()
        needed = ctx.needs_input_grad
        return tuple(w * s if need else None for w, s, need in zip(weights, scales, needed, strict=True))


def frobenius(weights: Iterable[Tensor], *, squared: bool = False) -> Tensor:
    """ACMR's L_reg (Eq. 7): the sum of the weights' Frobenius norms.

    Parameters
    ----------
    weights : iterable of Tensor
        Float, of any shapes, at least one.
    squared : bool
        Sum the squares of the norms instead: the form of weight decay.

    Returns
    -------
    Tensor
        A scalar, differentiable once in the weights; the gradient of a weight of zeros is 0.

    Raises
    ------
    InputError
        Where there is no weight.
    """
    matrices = list(weights)
    if not matrices:
        raise InputError("frobenius needs at least one weight, got none")
    if squared:
        return torch.stack([weight.square().sum() for weight in matrices]).sum()
    return cast(Tensor, _Norms.apply(*matrices))
