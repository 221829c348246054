"""Margin losses over all triplets of a batch or over mined ones, and ACMR's separable terms: no list of triplets.

Every loss here is linear in the distances as long as no triplet changes sides of its hinge: row i of its weights W
depends on row i of the distances D and on the labels alone. So blocks of anchors go one after the other: one product
gives their distances, the weights over all triplets take a sort and a search in each row, and one or two products give
the gradient. Nothing larger than a block is ever held. The gradient is made in the forward pass, where the weights are
at hand; the backward op scales it.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._dispatch import check_finite
from cmr_fast.ops._library import call, derivative_wanted, register_loss
from cmr_fast.ops._tensors import Array, as_number, as_tensor, like_input
from cmr_fast.ops._triplet_blocks import Sweep, address, weights_of
from cmr_fast.ops.labels import share_bit

Mining = Literal["all", "hard", "hard_negative", "semihard"]
Distance = Literal["euclidean", "squared", "cosine", "dot"]
Reduction = Literal["mean", "mean_nonzero", "sum"]
MINING = ("all", "hard", "hard_negative", "semihard")
DISTANCES = ("euclidean", "squared", "dot")
REDUCTIONS = ("mean", "mean_nonzero", "sum")
MAX_ITEMS = 1 << 24  # weights are counts, and float32 counts exactly up to here
MAX_CUDA_CANDIDATES = 4096  # a row is sorted in shared memory


def triplet_margin(
    x: Array,
    labels: Array,
    margin: float,
    *,
    mining: Mining = "all",
    other: Array | None = None,
    other_labels: Array | None = None,
    distance: Distance = "euclidean",
    reduction: Reduction = "mean",
    backend: str | None = None,
    threads: int | None = None,
) -> Array:
    """Triplet margin loss of a batch: a scalar made of max(0, d(a, p) - d(a, n) + margin) over triplets (a, p, n).

    A batch without a triplet (no positives, no negatives, nothing at all) gives 0 and a gradient of zeros. The hinge
    is open where d(a, n) < d(a, p) + margin, rounded to the dtype: a tie counts nothing and has no gradient. Of equal
    distances, mining takes the lower index. Distances of 0 have a gradient of 0.

    Parameters
    ----------
    x : Tensor or numpy.ndarray
        Float (B, d) anchors. float16 and bfloat16 are computed in float32.
    labels : Tensor or numpy.ndarray
        Integer (B,) class ids: positive where equal; or (B, C) multi-hot: positive where a label is shared.
    margin : float
        In units of the distance.
    mining : {"all", "hard", "hard_negative", "semihard"}
        "all": every triplet, exactly, in O(B^2 log B).
        "hard": per anchor its farthest positive and its nearest negative (Hermans et al. 2017, Eq. 5).
        "hard_negative": per positive pair the anchor's nearest negative: VSE++'s max of hinges (Faghri et al. 2018,
        Eq. 6).
        "semihard": per positive pair the nearest negative that is farther than the positive (FaceNet, section 3.2); a
        pair without one makes no triplet.
    other : Tensor or numpy.ndarray, optional
        Float (M, d) candidates of the other modality: anchors are rows of x, positives and negatives rows of `other`.
        Without it they are the other rows of x; an anchor is never its own positive.
    other_labels : Tensor or numpy.ndarray, optional
        Their labels, of the same kind; left out: those of x, row by row.
    distance : {"euclidean", "squared", "cosine", "dot"}
        Euclidean, its square, 1 - cosine, or minus the inner product.
    reduction : {"mean", "mean_nonzero", "sum"}
        Mean over all triplets of the mining, over those whose hinge is above 0, or the sum.
    backend : {"cpp", "cuda", "torch"}, optional
        Forces one; the device chooses otherwise.
    threads : int, optional
        Of the native kernels; default all processors of this process. Results do not depend on it.

    Returns
    -------
    Tensor or numpy.ndarray
        A scalar of x's dtype (float32 for half precision) and kind, differentiable once, in x and other.

    Raises
    ------
    InputError
        On shapes, dtypes, devices or labels that do not fit, and values that are none of the named ones.
    """
    anchors, was_numpy = as_tensor(x, "x")
    candidates = None if other is None else as_tensor(other, "other")[0]
    if mining not in MINING:
        raise InputError(f"mining must be one of {', '.join(MINING)}, got {mining!r}")
    if distance not in (*DISTANCES, "cosine"):
        raise InputError(f"distance must be one of euclidean, squared, cosine, dot, got {distance!r}")
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    margin = as_number(margin, "margin")
    anchors, candidates = _check_embeddings(anchors, candidates, "x", "other")
    if other is None and other_labels is not None:
        raise InputError("other_labels needs other: without it positives and negatives are rows of x")
    relevance, other_relevance = _as_relevance(labels, anchors, "labels", "x"), None
    if candidates is not None and other_labels is not None:
        other_relevance = _as_relevance(other_labels, candidates, "other_labels", "other")
        if relevance.shape[1:] != other_relevance.shape[1:]:
            raise InputError(
                f"labels and other_labels must be of one kind and width, got {_shape(labels)} and "
                f"{_shape(other_labels)}"
            )
    elif candidates is not None and len(candidates) != len(anchors):
        raise InputError(
            f"without other_labels, other and x must be pairs row by row, got {len(candidates)} and {len(anchors)} rows"
        )
    if distance == "cosine":
        # 1 - cos: the margin is a difference, so the 1 does not matter
        anchors = torch.nn.functional.normalize(anchors)
        candidates = None if candidates is None else torch.nn.functional.normalize(candidates)
        distance = "dot"
    loss = call(
        "triplet_margin", anchors, candidates, relevance, other_relevance, margin, mining, distance, reduction,
        derivative_wanted(anchors), candidates is not None and derivative_wanted(candidates),
        *_dispatch.how(backend, threads),
    )[0]  # fmt: skip
    result: Array = like_input(loss, was_numpy)
    return result


def acmr_triplet(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    margin: float,
    weight: float,
    reduction: Literal["sum", "mean"] = "mean",
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """ACMR's inter-modal invariance loss (Eq. 4-6) over every triplet of a batch, in O(B^2 d) and without a triplet.

    With D_ij = ||image_i - text_j||, P_i relevant and N_i irrelevant texts of image i, the terms of Eq. 4 separate:

        sum_{j,k} [D_ij + weight * max(0, margin - D_ik)]
            = N_i * sum_{j relevant} D_ij + weight * P_i * sum_{k irrelevant} max(0, margin - D_ik)

    Eq. 5 is the same on D transposed. Distances of 0 have a gradient of 0, and so has a hinge at its kink.

    Parameters
    ----------
    image, text : Tensor
        Float (B, d), row i of both from pair i. float16 and bfloat16 are computed in float32.
    labels : Tensor
        Integer (B,) class ids, or (B, C) multi-hot: relevant where a label is shared.
    margin : float
        The paper's mu, in units of distance.
    weight : float
        The paper's lambda, of the hinge on negatives.
    reduction : {"mean", "sum"}
        "sum": both directions, all anchors, as in Eq. 4-6. "mean": per anchor, mean relevant D + weight * mean
        irrelevant hinge (what a triplet contributes on average), then the mean over anchors that have a triplet, summed
        over both directions; 0 if there is no triplet.
    backend, threads
        As in `triplet_margin`.

    Returns
    -------
    Tensor
        A scalar, differentiable once, in image and text.

    Raises
    ------
    InputError
        On shapes, dtypes, devices or labels that do not fit.
    """
    image, text = as_tensor(image, "image")[0], as_tensor(text, "text")[0]
    if image.ndim != 2 or image.shape != text.shape:
        raise InputError(f"image and text must both be (B, d), got {_shape(image)} and {_shape(text)}")
    if reduction not in ("sum", "mean"):
        raise InputError(f"reduction must be sum or mean, got {reduction!r}")
    margin, weight = as_number(margin, "margin"), as_number(weight, "weight")
    image, partner = _check_embeddings(image, text, "image", "text")
    assert partner is not None
    text = partner
    relevance = _as_relevance(labels, image, "labels", "image")
    loss: Tensor = call(
        "acmr_triplet", image, text, relevance, margin, weight, reduction, derivative_wanted(image),
        derivative_wanted(text), *_dispatch.how(backend, threads),
    )[0]  # fmt: skip
    return loss


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape)


def _check_embeddings(x: Tensor, other: Tensor | None, name: str, other_name: str) -> tuple[Tensor, Tensor | None]:
    """Both as float32 or float64."""
    for value, called in ((x, name), (other, other_name)):
        if value is None:
            continue
        if value.ndim != 2 or not value.is_floating_point():
            raise InputError(f"{called} must be float (N, d), got {value.dtype} {tuple(value.shape)}")
        if value.shape[0] > MAX_ITEMS:
            raise InputError(f"{called} must have at most {MAX_ITEMS} rows, got {value.shape[0]}")
    check_finite(**{name: x, other_name: other})
    if other is not None and (other.shape[1], other.dtype, other.device) != (x.shape[1], x.dtype, x.device):
        raise InputError(
            f"{name} and {other_name} must agree in width, dtype and device, got {tuple(x.shape)} {x.dtype} on "
            f"{x.device} and {tuple(other.shape)} {other.dtype} on {other.device}"
        )
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float(), None if other is None else other.float()
    if x.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    return x, other


def _as_relevance(labels: object, items: Tensor, name: str, of: str) -> Tensor:
    """int64 (N,) class ids, or (N, W) words of packed multi-hot labels."""
    given, _ = as_tensor(labels, name)
    if given.ndim not in (1, 2) or given.is_complex() or (given.ndim == 2 and given.shape[1] == 0):
        raise InputError(f"{name} must be int (N,) class ids or (N, C) multi-hot, got {given.dtype} {_shape(given)}")
    if given.ndim == 1 and (given.is_floating_point() or given.dtype == torch.bool):
        raise InputError(f"{name} of shape (N,) must be integer class ids, got {given.dtype}")
    if given.shape[0] != items.shape[0] or given.device != items.device:
        raise InputError(
            f"{name} must have a row for each of the {len(items)} rows of {of} on {items.device}, got {len(given)} on "
            f"{given.device}"
        )
    if given.ndim == 1:
        return given.long()
    if given.dtype != torch.bool and given.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(((given == 0) | (given == 1)).all()):
            raise InputError(f"{name} of shape (N, C) must be multi-hot, 0 or 1, got others; class ids have shape (N,)")
        if given.shape[1] == 1 and bool((given != given[0]).any()):
            raise InputError(f"{name} must be class ids (N,) or multi-hot of several classes, got {_shape(given)}")
    packed: Tensor = torch.ops.cmr_fast.pack_codes(given if given.dtype == torch.bool else given > 0)
    words = packed.new_zeros((len(packed), -(-packed.shape[1] // 8) * 8))
    words[:, : packed.shape[1]] = packed
    return words.view(torch.int64)


def _planes(labels: Tensor) -> Tensor:
    """(N,) as it is; (N, W) -> (W, N)."""
    return (labels if labels.ndim == 1 else labels.T).contiguous()


def _unfit(x: Tensor, candidates: int) -> dict[str, str]:
    unfit = {}
    if x.dtype != torch.float32:
        unfit = dict.fromkeys(("cpp", "cuda"), f"it computes in float32, x is {x.dtype}")
    elif candidates > MAX_CUDA_CANDIDATES:
        unfit["cuda"] = f"it sorts rows of at most {MAX_CUDA_CANDIDATES} candidates, these have {candidates}"
    return unfit


def _outputs(x: Tensor, other: Tensor | None, grad_x: bool, grad_other: bool) -> tuple[Tensor, Tensor, Tensor]:
    others = other.shape[0] if other is not None and grad_other else 0
    return x.new_empty(()), x.new_empty((x.shape[0] if grad_x else 0, x.shape[1])), x.new_empty((others, x.shape[1]))


def _triplet_margin(
    x: Tensor,
    other: Tensor | None,
    labels: Tensor,
    other_labels: Tensor | None,
    margin: float,
    mining: str,
    distance: str,
    reduction: str,
    needs_grad_x: bool,
    needs_grad_other: bool,
    backend: str | None,
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x if other is None else other
    candidate_labels = labels if other_labels is None else other_labels
    chosen = _dispatch.choose_backend("triplet_margin", x.device.type, backend, _unfit(x, y.shape[0]))
    _, grad_x, grad_other = _outputs(x, other, needs_grad_x, needs_grad_other)
    losses = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)  # sum of an anchor's weighed distances
    counts = torch.zeros((2, x.shape[0]), dtype=torch.int64, device=x.device)  # its triplets, and those of them open
    sweep = Sweep(x, other, chosen, distance, threads)

    if chosen == "torch":

        def weigh(rows: slice, block: Tensor) -> Tensor:
            d = sweep.distances(rows, block)
            close = sweep.is_close(rows, d) if distance != "dot" else None
            if distance != "dot":
                d = d.clamp_(min=0)
            if distance == "euclidean":
                d = d.sqrt_()
            positive = share_bit(labels[rows], candidate_labels)
            negative = ~positive
            if other is None:
                positive.diagonal(rows.start).fill_(False)
            w, losses[rows], counts[0, rows], counts[1, rows] = weights_of(d, positive, negative, margin, mining)
            if close is not None and close.device.type == "cpu":
                sweep.close = bool((close & (w != 0)).any())
            if distance == "euclidean":
                w = torch.where(d == 0, 0, w / d)
            elif distance == "squared":
                w = w * 2
            block.copy_(w)
            return block.sum(1)
    else:
        own, planes = labels.contiguous(), _planes(candidate_labels)
        words = 1 if labels.ndim == 1 else labels.shape[1]
        sums = x.new_empty(x.shape[0])
        triplets, opened = counts.unbind()
        modes = MINING.index(mining), DISTANCES.index(distance)
        shape = (y.shape[0], words, labels.ndim == 1, margin, *modes, needs_grad_x or needs_grad_other)

        def weigh(rows: slice, block: Tensor) -> Tensor:
            close = sweep.native.triplet_weigh(
                *sweep.head, rows.stop - rows.start, *shape, rows.start if other is None else -1, block.data_ptr(),
                sweep.points(rows), address(own, rows), planes.data_ptr(), address(losses, rows),
                address(triplets, rows), address(opened, rows), address(sums, rows), *sweep.tail,
            )  # fmt: skip
            sweep.close = bool(close)
            return sums[rows]

    sweep.run(weigh, grad_x, grad_other)
    # the margin of each open triplet, in float64; one that rounding opened may be below 0 by that
    loss = torch.add(losses, counts[1], alpha=margin).clamp_(min=0).sum()
    if reduction != "sum":
        number = counts[REDUCTIONS.index(reduction)].sum().clamp(min=1)
        loss = loss / number
        for grad in (grad_x, grad_other):
            if grad.shape[0]:
                grad.div_(number)
    return loss.to(x.dtype), grad_x, grad_other


def _acmr_triplet(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    margin: float,
    weight: float,
    reduction: str,
    needs_grad_image: bool,
    needs_grad_text: bool,
    backend: str | None,
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight of D_ij is near_i + near_j where relevant, else -(far_i + far_j) where its hinge is open."""
    size = len(image)
    chosen = _dispatch.choose_backend("acmr_triplet", image.device.type, backend, _unfit(image, size))
    _, grad_image, grad_text = _outputs(image, text, needs_grad_image, needs_grad_text)
    sweep = Sweep(image, text, chosen, "euclidean", threads)
    losses = torch.zeros(size, dtype=torch.float64, device=image.device)
    near, far, sums = image.new_empty((3, size)).unbind()
    if chosen == "torch":
        positives = torch.zeros(size, dtype=image.dtype, device=image.device)
        for first in range(0, size, sweep.rows):
            rows = slice(first, first + sweep.rows)
            positives[rows] = share_bit(labels[rows], labels).sum(1).to(image.dtype)
        negatives = size - positives
        near, far = negatives, weight * positives
        if reduction == "mean":
            usable = (positives * negatives > 0).to(image.dtype)
            usable = usable / usable.sum().clamp(min=1)
            near, far = usable / positives.clamp(min=1), weight * usable / negatives.clamp(min=1)

        def weigh(rows: slice, block: Tensor) -> Tensor:
            d2 = sweep.distances(rows, block)
            close = sweep.is_close(rows, d2)
            d = d2.clamp_(min=0).sqrt_()
            pull, push = near[rows, None] + near, far[rows, None] + far
            relevant = share_bit(labels[rows], labels)
            hinge = (margin - d).clamp(min=0)
            losses[rows] = torch.where(relevant, pull * d, push * hinge).double().sum(1)
            w = torch.where(relevant, pull, torch.where(hinge > 0, -push, 0))
            if close.device.type == "cpu":
                sweep.close = bool((close & (w != 0)).any())
            block.copy_(torch.where(d == 0, 0, w / d))
            return block.sum(1)
    else:
        own, planes = labels.contiguous(), _planes(labels)
        relevance = (1 if labels.ndim == 1 else labels.shape[1], labels.ndim == 1)
        counts = torch.empty(size, dtype=torch.int64, device="cpu")
        sweep.native.triplet_acmr_factors(
            *sweep.head, size, *relevance, own.data_ptr(), planes.data_ptr(), weight, reduction == "mean",
            counts.data_ptr(), near.data_ptr(), far.data_ptr(),
        )  # fmt: skip

        def weigh(rows: slice, block: Tensor) -> Tensor:
            sweep.close = sweep.native.triplet_acmr(
                *sweep.head, rows.stop - rows.start, size, *relevance, margin, near.data_ptr(), far.data_ptr(),
                rows.start, needs_grad_image or needs_grad_text, block.data_ptr(), sweep.points(rows),
                address(own, rows), planes.data_ptr(), address(losses, rows), address(sums, rows), *sweep.tail,
            )  # fmt: skip
            return sums[rows]

    sweep.run(weigh, grad_image, grad_text)
    return losses.sum().to(image.dtype), grad_image, grad_text


register_loss(
    "triplet_margin(Tensor x, Tensor? other, Tensor labels, Tensor? other_labels, float margin, str mining, "
    "str distance, str reduction, bool needs_grad_x, bool needs_grad_other, str? backend, int? threads) "
    "-> (Tensor, Tensor, Tensor)",
    _triplet_margin,
    lambda x, other, *rest: _outputs(x, other, rest[6], rest[7]),
    differentiable=(0, 1),
)
register_loss(
    "acmr_triplet(Tensor image, Tensor text, Tensor labels, float margin, float weight, str reduction, "
    "bool needs_grad_image, bool needs_grad_text, str? backend, int? threads) -> (Tensor, Tensor, Tensor)",
    _acmr_triplet,
    lambda image, text, *rest: _outputs(image, text, rest[4], rest[5]),
    differentiable=(0, 1),
)
