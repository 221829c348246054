"""Losses of cross-modal methods: pure functions of tensors, and modules with the signatures that others have."""

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmr_fast.errors import InputError
from cmr_fast.ops.infonce import info_nce, sigmoid_loss
from cmr_fast.ops.infonce_distributed import distributed_info_nce, distributed_sigmoid_loss
from cmr_fast.ops.triplet import Distance, Mining, Reduction, acmr_triplet, triplet_margin

__all__ = [
    "ClipLoss",
    "SigLipLoss",
    "TripletMarginLoss",
    "acmr_triplet",
    "frobenius",
    "gradient_reversal",
    "triplet_margin",
    "vse_plus_plus",
]


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
    """ACMR's L_reg (Eq. 7): the sum of the weights' Frobenius norms, not squared unless asked (weight decay's form)."""
    matrices = list(weights)
    if not matrices:
        raise InputError("frobenius needs at least one weight, got none")
    if squared:
        return torch.stack([weight.square().sum() for weight in matrices]).sum()
    return _Norms.apply(*matrices)


def vse_plus_plus(
    image: Tensor,
    text: Tensor,
    margin: float = 0.2,
    labels: Tensor | None = None,
    *,
    distance: Distance = "cosine",
    reduction: Reduction = "sum",
) -> Tensor:
    """VSE++'s max of hinges (Faghri et al. 2018, Eq. 6): each image with its hardest text, each text with its image.

    image, text   float (B, d), row i of both from pair i
    labels        (B,) or (B, C) where more than one's own partner is relevant; default: the pairs alone
    """
    if labels is None:
        labels = torch.arange(len(image), device=image.device)
    total = torch.zeros((), dtype=image.dtype, device=image.device)
    for anchors, others in ((image, text), (text, image)):
        total = total + triplet_margin(
            anchors, labels, margin, mining="hard_negative", other=others, distance=distance, reduction=reduction
        )
    return total


_REDUCERS: dict[str, Reduction] = {
    "AvgNonZeroReducer": "mean_nonzero",
    "MeanReducer": "mean",
    "SumReducer": "sum",
    "mean_nonzero": "mean_nonzero",
    "mean": "mean",
    "sum": "sum",
}


class TripletMarginLoss(nn.Module):
    """pytorch-metric-learning's TripletMarginLoss, without the triplets: change the import.

    margin                in units of the distance
    triplets_per_anchor   "all": sampling is for those who cannot have all
    distance              None is that library's default, LpDistance(): embeddings of unit length, Euclidean distance.
                          Its LpDistance (p=2, power 1 or 2), CosineSimilarity and DotProductSimilarity are taken, or
                          the names of cmr_fast.triplet_margin (which leave the embeddings as they are)
    reducer               None is AvgNonZeroReducer(): the mean over triplets whose loss is above 0. MeanReducer and
                          SumReducer are taken as well, or "mean_nonzero", "mean", "sum"
    mining                as in cmr_fast.triplet_margin, in place of a miner's indices_tuple

    swap and smooth_loss need every triplet by itself and are refused, as is whatever else has no counterpart here.
    Labels may be (N, C) multi-hot as well.
    """

    def __init__(
        self,
        margin: float = 0.05,
        swap: bool = False,
        smooth_loss: bool = False,
        triplets_per_anchor: Literal["all"] = "all",
        *,
        distance: Any = None,
        reducer: Any = None,
        mining: Mining = "all",
        **unsupported: Any,
    ) -> None:
        super().__init__()
        for name, value in (("swap", swap), ("smooth_loss", smooth_loss)):
            if value:
                raise InputError(f"{name}=True needs every triplet by itself: expected False, got {value!r}")
        if triplets_per_anchor != "all":
            raise InputError(f"triplets_per_anchor must be 'all', got {triplets_per_anchor!r}")
        given = {name: value for name, value in unsupported.items() if value is not None}
        if given:
            raise InputError(f"TripletMarginLoss takes distance, reducer and mining, got {', '.join(sorted(given))}")
        self.margin, self.mining = margin, mining
        self.normalize, self.distance = _distance_of(distance)
        name = "mean_nonzero" if reducer is None else reducer if isinstance(reducer, str) else type(reducer).__name__
        if name not in _REDUCERS:
            raise InputError(f"reducer must be AvgNonZeroReducer, MeanReducer or SumReducer, got {name}")
        self.reduction = _REDUCERS[name]

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """embeddings (N, d) with labels; positives and negatives from ref_emb (M, d) with ref_labels where given."""
        if indices_tuple is not None:
            raise InputError("indices_tuple must be None: expected TripletMarginLoss(mining=...) in place of a miner")
        if labels is None:
            raise InputError("labels must be given, got None")
        if (ref_emb is None) != (ref_labels is None):
            raise InputError("ref_emb and ref_labels must be given together, got one of them")
        if self.normalize:
            embeddings = nn.functional.normalize(embeddings)
            ref_emb = None if ref_emb is None else nn.functional.normalize(ref_emb)
        return cast(
            Tensor,
            triplet_margin(
                embeddings,
                labels.to(embeddings.device),
                self.margin,
                mining=self.mining,
                other=ref_emb,
                other_labels=None if ref_labels is None or ref_emb is None else ref_labels.to(ref_emb.device),
                distance=self.distance,
                reduction=self.reduction,
            ),
        )

    def extra_repr(self) -> str:
        return f"margin={self.margin}, mining={self.mining}, distance={self.distance}, reduction={self.reduction}"


def _distance_of(distance: Any) -> tuple[bool, Distance]:
    """Whether embeddings are made unit length first, and the distance by triplet_margin's name."""
    if distance is None:
        return True, "euclidean"
    if isinstance(distance, str):
        if distance not in ("euclidean", "squared", "cosine", "dot"):
            raise InputError(f"distance must be euclidean, squared, cosine or dot, got {distance!r}")
        return False, cast(Distance, distance)
    kind, power = type(distance).__name__, getattr(distance, "power", None)
    names: dict[Any, str] = {("LpDistance", 1): "euclidean", ("LpDistance", 2): "squared"}
    names |= {("CosineSimilarity", 1): "dot", ("DotProductSimilarity", 1): "dot"}
    if (kind, power) not in names or getattr(distance, "p", None) != 2:
        raise InputError(
            "distance must be LpDistance(p=2, power=1 or 2), CosineSimilarity or DotProductSimilarity, got "
            f"{kind} with p={getattr(distance, 'p', None)}, power={power}"
        )
    return bool(distance.normalize_embeddings), cast(Distance, names[kind, power])


def _one_dtype(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast features may come in two types; the wider one, then."""
    if image.dtype == text.dtype or not torch.is_autocast_enabled(image.device.type):
        return image, text
    wide = torch.promote_types(image.dtype, text.dtype)
    return image.to(wide), text.to(wide)


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
        image_features, text_features = _one_dtype(image_features, text_features)
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
        image_features, text_features = _one_dtype(image_features, text_features)
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
