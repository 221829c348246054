"""Losses of cross-modal methods: pure functions of tensors, and modules with the signatures that others have."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmr_fast.errors import InputError
from cmr_fast.ops.infonce import info_nce, sigmoid_loss
from cmr_fast.ops.infonce_distributed import distributed_info_nce, distributed_sigmoid_loss


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


class ClipLoss(nn.Module):
    """open_clip's ClipLoss, argument for argument, in O(N) memory: change the import and nothing else.

    local_loss          over ranks: this rank's rows of the logits only
    gather_with_grad    over ranks: gradients reach the features of the other ranks
    rank, world_size    of torch.distributed's default group
    cache_labels        accepted; there are no labels to cache
    ring                over ranks, with local_loss and gather_with_grad: texts travel instead of being gathered
    backend, threads    see cmr_fast.info_nce

    With local_loss and gather_with_grad one tile serves both directions, see ops/infonce_distributed.py; the value of
    logit_scale's gradient is then averaged over ranks, the others follow open_clip. The loss is float32 for float16
    and bfloat16 features. Raises InputError on Horovod and where world_size or the ranks' shapes disagree.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        ring: bool = False,
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise InputError("use_horovod must be False: features are gathered by torch.distributed")
        if ring and not (local_loss and gather_with_grad):
            raise InputError("ring needs local_loss and gather_with_grad")
        _check_rank(rank, world_size)
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod
        self.ring, self.backend, self.threads = ring, backend, threads

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """(n, d), (n, d) of one pair a row -> the mean of both directions, in a dict where output_dict asks for it."""
        choice: dict[str, Any] = {"backend": self.backend, "threads": self.threads}
        loss: Any
        if image_features.shape != text_features.shape:
            shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
            raise InputError(f"image_features and text_features must both be (n, d), got {shapes}")
        if self.world_size == 1:
            loss = info_nce(image_features, text_features, logit_scale, logit_bias=logit_bias, **choice)
        elif self.local_loss and self.gather_with_grad:
            _check_group(self.rank, self.world_size)
            form: Any = "ring" if self.ring else "gather"
            loss = distributed_info_nce(image_features, text_features, logit_scale, form=form, **choice)
            if isinstance(logit_bias, Tensor):
                loss = loss + 0 * logit_bias.sum()
        else:
            _check_group(self.rank, self.world_size)
            everything = [
                _gather(x, self.rank, self.gather_with_grad, own_gradient=not self.local_loss)
                for x in (image_features, text_features)
            ]
            if self.local_loss:
                choice |= {"offset": self.rank * len(image_features), "direction": "image"}
                loss = info_nce(image_features, everything[1], logit_scale, logit_bias=logit_bias, **choice)
                loss = (loss + info_nce(text_features, everything[0], logit_scale, **choice)) / 2
            else:
                image, text = everything
                loss = info_nce(image, text, logit_scale, logit_bias=logit_bias, **choice)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """open_clip's SigLipLoss, argument for argument, in O(N) memory.

    dist_impl    over ranks, all exact: "gather" and "reduce" gather the texts, "bidir" (the default) and "shift" pass
                 them round a ring. Gradients of logit_scale and logit_bias are averaged over ranks.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in ("bidir", "shift", "reduce", "gather"):
            raise InputError(f"dist_impl must be bidir, shift, reduce or gather, got {dist_impl!r}")
        _check_rank(rank, world_size)
        self.backend, self.threads = backend, threads

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """(n, d), (n, d) of one pair a row -> the sum over all pairs divided by n."""
        choice: dict[str, Any] = {"backend": self.backend, "threads": self.threads}
        if image_features.shape != text_features.shape:
            shapes = f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
            raise InputError(f"image_features and text_features must both be (n, d), got {shapes}")
        if self.world_size == 1:
            loss = sigmoid_loss(image_features, text_features, logit_scale, logit_bias, **choice)
        else:
            _check_group(self.rank, self.world_size)
            form: Any = "gather" if self.dist_impl in ("gather", "reduce") else "ring"
            loss = distributed_sigmoid_loss(image_features, text_features, logit_scale, logit_bias, form=form, **choice)
        return {"contrastive_loss": loss} if output_dict else loss


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise InputError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}")


def _check_group(rank: int, world_size: int) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(f"world_size is {world_size}, but torch.distributed has no process group")
    if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
        raise InputError(
            f"rank {rank} of world_size {world_size} must be torch.distributed's, "
            f"which is rank {dist.get_rank()} of {dist.get_world_size()}"
        )


def _gather(x: Tensor, rank: int, with_grad: bool, own_gradient: bool) -> Tensor:
    """(n, d) of every rank -> (N, d): with the gradient of all of them, of this rank's own, or of none."""
    shapes = [torch.empty(2, dtype=torch.int64, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, torch.tensor(x.shape, device=x.device))
    seen = [tuple(shape.tolist()) for shape in shapes]
    if len(set(seen)) > 1:
        raise InputError(f"every rank must have features of the same shape, got {', '.join(map(str, seen))}")
    if with_grad:
        return _Gather.apply(x)
    parts = [torch.empty_like(x) for _ in seen]
    dist.all_gather(parts, x.detach().contiguous())
    if own_gradient:
        parts[rank] = x
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """(n, d) of every rank -> (N, d); backward adds up what all ranks have for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
