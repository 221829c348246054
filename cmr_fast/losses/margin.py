"""Margin losses over all triplets or mined ones: pytorch-metric-learning's TripletMarginLoss, and VSE++."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cmr_fast.errors import InputError
from cmr_fast.losses import _triplets
from cmr_fast.losses._checks import as_class_ids, as_labels, as_number, check_features
from cmr_fast.ops.labels import share_label
from cmr_fast.ops.triplet import MINING, Distance, Mining, Reduction, triplet_margin

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
        As in `triplet_margin`; a miner's indices_tuple needs "all".
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
        if mining not in MINING:
            raise InputError(f"mining must be one of {', '.join(MINING)}, got {mining!r}")
        self.margin, self.mining = as_number(margin, "margin"), mining
        self.swap, self.smooth_loss, self.triplets_per_anchor = False, False, triplets_per_anchor
        self.normalize, self.distance = _distance_of(distance)
        name = "mean_nonzero" if reducer is None else reducer if isinstance(reducer, str) else type(reducer).__name__
        if name not in _REDUCERS:
            raise InputError(f"reducer must be AvgNonZeroReducer, MeanReducer or SumReducer, got {name}")
        self.reduction = _REDUCERS[name]

    def forward(
        self,
        embeddings: Tensor,
        labels: Any = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Any = None,
    ) -> Tensor:
        """Compute the loss of a batch.

        Parameters
        ----------
        embeddings : Tensor
            Float (N, d): anchors.
        labels : Tensor or array_like
            Class ids (N,) of integers, floats or bools, or multi-hot (N, C): positive where a label is shared. Arrays,
            lists, columns of a table and sparse matrices are taken too. Not needed beside indices_tuple.
        indices_tuple : tuple of Tensor, optional
            What a miner or a wrapper gives: triplets (a, p, n), or pairs (a, p, a, n) whose triplets are not multiplied
            out; a of embeddings, p and n of ref_emb (of embeddings where there is none).
        ref_emb : Tensor, optional
            Float (M, d): positives and negatives. Default: the other embeddings.
        ref_labels : Tensor or array_like, optional
            Labels of ref_emb, of the same kind. As in pytorch-metric-learning, row i of ref_emb is no positive of row i
            where ref_labels is left out or is the very object given as labels.

        Returns
        -------
        Tensor
            A scalar of the dtype of the embeddings (float32 for half precision), differentiable in both.

        Raises
        ------
        InputError
            On shapes, dtypes or devices that disagree, and on indices out of range.
        """
        check_features(embeddings, "embeddings")
        if ref_emb is not None:
            check_features(ref_emb, "ref_emb")
            if (ref_emb.shape[1], ref_emb.dtype, ref_emb.device) != (
                *embeddings.shape[1:], embeddings.dtype, embeddings.device,
            ):  # fmt: skip
                raise InputError(
                    f"embeddings and ref_emb must agree in width, dtype and device, got {tuple(embeddings.shape)} "
                    f"{embeddings.dtype} on {embeddings.device} and {tuple(ref_emb.shape)} {ref_emb.dtype} on "
                    f"{ref_emb.device}"
                )
        elif ref_labels is not None:
            raise InputError("ref_labels needs ref_emb: they must be given together, got ref_labels alone")
        if labels is None and indices_tuple is None:
            raise InputError("labels must be given, got None")
        x = nn.functional.normalize(embeddings) if self.normalize else embeddings
        y = ref_emb
        if y is not None and self.normalize:
            y = nn.functional.normalize(y)
        if indices_tuple is not None:
            if self.mining != "all":
                raise InputError(f"indices_tuple is a miner's: mining must be 'all' beside it, got {self.mining!r}")
            others = x if y is None else y
            listed = _triplets.check_listed(indices_tuple, len(x), len(others), x.device)
            between = _triplets.distances(x, others, self.distance)
            return _triplets.of_list(between, listed, self.margin, self.reduction)
        paired = y is not None and _is_same(labels, ref_labels, embeddings)
        first = as_labels(labels, "labels").to(x.device)
        if y is None or (paired and ref_emb is embeddings):
            return self._all(x, as_class_ids(first, None)[0], None, None)
        second = first if paired else as_labels(labels if ref_labels is None else ref_labels, "ref_labels").to(y.device)
        if first.ndim != second.ndim:
            shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
            raise InputError(f"labels and ref_labels must be of one kind and width, got {shapes}")
        first, second = cast(tuple[Tensor, Tensor], as_class_ids(first, second))
        return self._without_partners(x, first, y) if paired else self._all(x, first, y, second)

    def _all(self, x: Tensor, labels: Tensor, other: Tensor | None, other_labels: Tensor | None) -> Tensor:
        loss = triplet_margin(
            x, labels, self.margin, mining=self.mining, other=other, other_labels=other_labels,
            distance=self.distance, reduction=self.reduction,
        )  # fmt: skip
        return cast(Tensor, loss)

    def _without_partners(self, x: Tensor, labels: Tensor, y: Tensor) -> Tensor:
        """Row i of y, of the same labels, is no positive of row i of x."""
        if not len(x) == len(y) == len(labels):
            raise InputError(f"labels of both must be ({len(x)},) and ({len(y)},), got {tuple(labels.shape)} for both")
        alike = share_label(labels, labels)
        positive, negative = alike.clone().fill_diagonal_(False), ~alike
        between = _triplets.distances(x, y, self.distance)
        return _triplets.of_pairs(between, positive.long(), negative.long(), self.margin, self.mining, self.reduction)

    def extra_repr(self) -> str:
        """Return the settings, for repr."""
        return f"margin={self.margin}, mining={self.mining}, distance={self.distance}, reduction={self.reduction}"


def _is_same(labels: Any, ref_labels: Any, embeddings: Tensor) -> bool:
    """Whether that library would see one object: labels that it has to move to another device are two."""
    moved = isinstance(labels, Tensor) and labels.device != embeddings.device
    return ref_labels is None or (ref_labels is labels and not moved)


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
    labels: Any = None,
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
    labels : Tensor or array_like, optional
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
    check_features(image, "image")
    check_features(text, "text")
    if labels is None:
        ids = torch.arange(len(image), device=image.device)
    else:
        ids = as_class_ids(as_labels(labels, "labels").to(image.device), None)[0]
    margin = as_number(margin, "margin")
    total = torch.zeros((), dtype=image.dtype, device=image.device)
    for anchors, others in ((image, text), (text, image)):
        total = total + triplet_margin(
            anchors, ids, margin, mining="hard_negative", other=others, distance=distance, reduction=reduction
        )
    return total
