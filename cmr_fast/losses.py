"""Losses of cross-modal methods, as pure functions of tensors."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from cmr_fast.errors import InputError


def acmr_triplet(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    margin: float,
    weight: float,
    reduction: Literal["sum", "mean"] = "mean",
) -> Tensor:
    """ACMR's inter-modal invariance loss (Eq. 4-6) over every triplet of a batch, in O(B^2 d) and without a triplet.

    image, text   float (B, d), row i of both from pair i
    labels        int64 (B,) class ids, or (B, C) multi-hot: relevant = at least one label shared
    margin        the paper's mu, in units of distance
    weight        the paper's lambda, of the hinge on negatives

    With D_ij = ||image_i - text_j||, P_i relevant and N_i irrelevant texts of image i, the terms of Eq. 4 separate:

        sum_{j,k} [D_ij + weight * max(0, margin - D_ik)]
            = N_i * sum_{j relevant} D_ij + weight * P_i * sum_{k irrelevant} max(0, margin - D_ik)

    Eq. 5 is the same on D transposed. Returns a scalar:
    sum    both directions, all anchors, as in Eq. 4-6
    mean   per anchor, mean relevant D + weight * mean irrelevant hinge (what a triplet contributes on average), then
           the mean over anchors that have a triplet, summed over both directions; 0 if there is no triplet
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise InputError(f"image and text must both be (B, d), got {tuple(image.shape)} and {tuple(text.shape)}")
    if reduction not in ("sum", "mean"):
        raise InputError(f"reduction must be sum or mean, got {reduction!r}")
    relevant = share_label(labels, labels).to(image.dtype)
    if len(relevant) != len(image):
        raise InputError(f"labels must have one row per pair, got {len(relevant)} labels for {len(image)} pairs")
    distance = paired_distances(image, text)
    near = distance * relevant
    far = (margin - distance).clamp(min=0) * (1 - relevant)
    total = image.new_zeros(())
    for axis in (1, 0):
        positives, negatives = relevant.sum(axis), (1 - relevant).sum(axis)
        pull, push = near.sum(axis), far.sum(axis)
        if reduction == "sum":
            total = total + (negatives * pull + weight * positives * push).sum()
        else:
            usable = (positives * negatives > 0).to(image.dtype)
            anchors = pull / positives.clamp(min=1) + weight * push / negatives.clamp(min=1)
            total = total + (anchors * usable).sum() / usable.sum().clamp(min=1)
    return total


def paired_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N, d), (M, d) -> (N, M), at least sqrt(eps) so that the gradient is finite at zero."""
    # distances do not change with the origin; one amid the points keeps digits in the expansion of the square
    origin = torch.cat([a, b]).mean(0).detach()
    a, b = a - origin, b - origin
    squared = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
    return squared.clamp(min=torch.finfo(squared.dtype).eps).sqrt()


def share_label(a: Tensor, b: Tensor) -> Tensor:
    """Which items share at least one label: labels (N,) and (M,), or multi-hot (N, C) and (M, C) -> bool (N, M)."""
    if a.ndim == 1 and b.ndim == 1:
        return a[:, None] == b
    if a.ndim == 2 and b.ndim == 2 and a.shape[1] == b.shape[1]:
        return a.float() @ b.float().T > 0
    raise InputError(f"labels must both be (N,) or both (N, C), got {tuple(a.shape)} and {tuple(b.shape)}")


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
