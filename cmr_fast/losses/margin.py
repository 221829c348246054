"""Margin losses over all triplets or mined ones: pytorch-metric-learning's TripletMarginLoss, and VSE++."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cmr_fast.errors import InputError
from cmr_fast.ops.triplet import Distance, Mining, Reduction, triplet_margin

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

    Parameters
    ----------
    margin : float
        In units of the distance.
    swap, smooth_loss : bool
        Must be False: both need every triplet by itself.
    triplets_per_anchor : "all"
        Sampling is for those who cannot have all.
    distance : object or str, optional
        None is that library's default, `LpDistance()`: embeddings of unit length, Euclidean distance. Its `LpDistance`
        (p=2, power 1 or 2), `CosineSimilarity` and `DotProductSimilarity` are taken, or the names of `triplet_margin`
        (which leave the embeddings as they are).
    reducer : object or str, optional
        None is `AvgNonZeroReducer()`: the mean over triplets whose loss is above 0. `MeanReducer` and `SumReducer` are
        taken as well, or "mean_nonzero", "mean", "sum".
    mining : str
        As in `triplet_margin`, in place of a miner.
    **unsupported
        Other arguments of that library; None is accepted, all else is refused.

    Raises
    ------
    InputError
        On whatever has no counterpart here.
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
        """Compute the loss of a batch.

        Parameters
        ----------
        embeddings : Tensor
            Float (N, d): anchors.
        labels : Tensor
            Class ids (N,), or multi-hot (N, C): positive where a label is shared.
        indices_tuple : None
            Must be None.
        ref_emb : Tensor, optional
            Float (M, d): positives and negatives. Default: the other embeddings.
        ref_labels : Tensor, optional
            Labels of ref_emb, of the same kind; given where ref_emb is.

        Returns
        -------
        Tensor
            A scalar of the dtype of the embeddings (float32 for half precision), differentiable in both.

        Raises
        ------
        InputError
            On shapes, dtypes or devices that disagree.
        """
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
        """Return the settings, for repr."""
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

    Parameters
    ----------
    image, text : Tensor
        Float (B, d), row i of both from pair i.
    margin : float
        In units of the distance.
    labels : Tensor, optional
        Class ids (B,) or multi-hot (B, C), where more than one's own partner is relevant. Default: the pairs alone.
    distance, reduction : str
        As in `triplet_margin`.

    Returns
    -------
    Tensor
        A scalar of the dtype of image (float32 for half precision), differentiable in image and text.

    Raises
    ------
    InputError
        On shapes, dtypes or devices that disagree, and on names that are none of `triplet_margin`.
    """
    if labels is None:
        labels = torch.arange(len(image), device=image.device)
    total = torch.zeros((), dtype=image.dtype, device=image.device)
    for anchors, others in ((image, text), (text, image)):
        total = total + triplet_margin(
            anchors, labels, margin, mining="hard_negative", other=others, distance=distance, reduction=reduction
        )
    return total
