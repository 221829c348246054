"""Losses of cross-modal methods, as pure functions of tensors."""

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cmr_fast.errors import InputError
from cmr_fast.ops.triplet import Distance, Mining, Reduction, acmr_triplet, triplet_margin

__all__ = ["TripletMarginLoss", "acmr_triplet", "frobenius", "gradient_reversal", "triplet_margin", "vse_plus_plus"]


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
