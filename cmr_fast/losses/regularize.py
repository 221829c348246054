"""ACMR's two helpers: the gradient turned round, and the sum of the weights' norms."""

from collections.abc import Iterable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.losses._checks import as_number
from cmr_fast.ops._library import refuse_tangent, transformed
from cmr_fast.ops._tensors import check_float


class _GradientReversal(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -scale."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        refuse_tangent("gradient_reversal")

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
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise InputError(
            f"x must be a floating-point tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    check_float(x, "x")
    return cast(Tensor, _GradientReversal.apply(x, as_number(scale, "scale")))


class _Norms(torch.autograd.Function):
    """Frobenius norms of weights, summed. The gradient is one pass over a weight; 0 where its norm is."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        norms = torch.stack(torch._foreach_norm(weights))
        ctx.save_for_backward(norms, *weights)
        return norms.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        norms, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative: the norms as functions of the weights
            norms = torch.stack([torch.linalg.vector_norm(weight) for weight in weights])
        scales = (gradient / norms.masked_fill(norms == 0, torch.inf)).unbind()
        needed = ctx.needs_input_grad
        return tuple(w * s if need else None for w, s, need in zip(weights, scales, needed, strict=True))


def frobenius(weights: Tensor | Iterable[Tensor], *, squared: bool = False) -> Tensor:
    """ACMR's L_reg (Eq. 7): the sum of the weights' Frobenius norms.

    Parameters
    ----------
    weights : Tensor or iterable of Tensor
        Float, of any shapes, at least one. A tensor is one weight, not its rows.
    squared : bool
        Sum the squares of the norms instead: the form of weight decay.

    Returns
    -------
    Tensor
        A scalar, differentiable in the weights; the gradient of a weight of zeros is 0.

    Raises
    ------
    InputError
        Where there is no weight, or one is no floating-point tensor.
    """
    if not isinstance(weights, Iterable):  # a tensor is one too
        raise InputError(f"weights must be a tensor or an iterable of them, got {type(weights).__name__}")
    matrices = [weights] if isinstance(weights, Tensor) else list(weights)
    for weight in matrices:
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            seen = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise InputError(f"weights must be floating-point tensors, got {seen}")
        check_float(weight, "weights")
    if not matrices:
        raise InputError("frobenius needs at least one weight, got none")
    if squared:
        return torch.stack([weight.square().sum() for weight in matrices]).sum()
    if transformed():
        return torch.stack([torch.linalg.vector_norm(weight) for weight in matrices]).sum()
    return cast(Tensor, _Norms.apply(*matrices))
