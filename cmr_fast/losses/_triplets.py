"""Triplets that are not all of a batch: a miner's list, or all but those of a row with its own partner.

In plain torch on distances (N, M). Pairs are not multiplied out: the losses of an anchor's positives take a sort of
its negatives and a sum over the nearer ones.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cmr_fast.errors import InputError
from cmr_fast.ops.triplet import Distance, Mining, Reduction


def distances(x: Tensor, y: Tensor, distance: Distance) -> Tensor:
    """(N, d), (M, d) -> (N, M), of at least float32."""
    with torch.autocast(x.device.type, enabled=False):
        x, y = (z.float() if z.dtype in (torch.float16, torch.bfloat16) else z for z in (x, y))
        if distance == "cosine":
            x, y = F.normalize(x), F.normalize(y)
        if distance in ("cosine", "dot"):
            return -(x @ y.T)
        between = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return between.square() if distance == "squared" else between


def check_listed(listed: Any, rows: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
    """(a, p, n) or (a, p, a, n) as a miner gives them, int64 on `device`."""
    expected = "indices_tuple must be a miner's (a, p, n) or (a, p, a, n), integers of one length"
    if not isinstance(listed, tuple | list) or len(listed) not in (3, 4):
        raise InputError(f"{expected}, got {type(listed).__name__}" + (f" of {len(listed)}" if listed else ""))
    for x in listed:
        # an empty one may be of any dtype: miners make it so
        if not isinstance(x, Tensor) or x.ndim != 1 or (len(x) and (x.is_floating_point() or x.dtype == torch.bool)):
            raise InputError(f"{expected}, got {type(x).__name__} {getattr(x, 'dtype', '')} among them")
    indices = tuple(x.to(device).long() for x in listed)
    lengths = [len(x) for x in indices]
    if any(a != b for a, b in zip(lengths[:-1:2], lengths[1::2], strict=False)) or (
        len(indices) == 3 and lengths[2] != lengths[0]
    ):
        raise InputError(f"{expected}, got lengths {lengths}")
    bounds = (rows, columns, columns) if len(indices) == 3 else (rows, columns, rows, columns)
    for x, bound in zip(indices, bounds, strict=True):
        if len(x) and not 0 <= int(x.min()) <= int(x.max()) < bound:
            raise InputError(f"indices_tuple must be of {rows} anchors and {columns} others, got {int(x.max())}")
    return indices


def of_list(between: Tensor, listed: tuple[Tensor, ...], margin: float, reduction: Reduction) -> Tensor:
    """The loss of triplets (a, p, n), or of all that pairs (a, p) and (a, n) make."""
    if len(listed) == 3:
        anchor, positive, negative = listed
        hinges = (between[anchor, positive] + margin - between[anchor, negative]).clamp(min=0)
        return _reduced(hinges.sum(dtype=torch.float64), (hinges > 0).sum(), len(anchor), reduction, between)
    positive, negative = (
        torch.zeros(between.shape, dtype=torch.int64, device=between.device).index_put_(
            pairs, torch.ones_like(pairs[0]), accumulate=True
        )
        for pairs in (listed[:2], listed[2:])
    )
    return of_pairs(between, positive, negative, margin, "all", reduction)


def of_pairs(
    between: Tensor, positive: Tensor, negative: Tensor, margin: float, mining: Mining, reduction: Reduction
) -> Tensor:
    """The loss of triplets of positive and negative pairs: (N, M), how often each counts (0 or 1 where mined)."""
    fixed = between.detach()
    both = (positive > 0).any(1) & (negative > 0).any(1)
    nearest = fixed.masked_fill(negative == 0, torch.inf)
    if mining == "all":
        near, order = fixed.sort(dim=1)
        weight = negative.gather(1, order)
        count = F.pad(weight.cumsum(1), (1, 0))
        total = F.pad((between.gather(1, order).double() * weight).cumsum(1), (1, 0))
        reach = between + margin
        place = torch.searchsorted(near, reach.detach())  # the negatives before it are nearer than reach
        within = count.gather(1, place) * positive
        loss = (within * reach.double() - positive * total.gather(1, place)).sum()
        return _reduced(loss, within.sum(), (positive.sum(1) * negative.sum(1)).sum(), reduction, between)
    if not between.numel():
        return _reduced(between.sum(dtype=torch.float64), 0, 0, reduction, between)
    if mining == "hard":
        farthest = fixed.masked_fill(positive == 0, -torch.inf).argmax(1, keepdim=True)
        chosen, valid = nearest.argmin(1, keepdim=True), both[:, None]
        ahead = between.gather(1, farthest)
    elif mining == "hard_negative":
        chosen, valid = nearest.argmin(1, keepdim=True).expand_as(between), (positive > 0) & both[:, None]
        ahead = between
    else:
        near, order = nearest.sort(dim=1, stable=True)
        place = torch.searchsorted(near, fixed, right=True)
        valid = (positive > 0) & (place < (negative > 0).sum(1, keepdim=True))
        chosen, ahead = order.gather(1, place.clamp(max=between.shape[1] - 1)), between
    hinges = (ahead + margin - between.gather(1, chosen)).clamp(min=0).masked_fill(~valid, 0)
    return _reduced(hinges.sum(dtype=torch.float64), (hinges > 0).sum(), valid.sum(), reduction, between)


def _reduced(
    total: Tensor, active: Tensor | int, triplets: Tensor | int, reduction: Reduction, between: Tensor
) -> Tensor:
    if reduction != "sum":
        count = torch.as_tensor(active if reduction == "mean_nonzero" else triplets, device=total.device)
        total = total / count.clamp(min=1)
    return total.to(between.dtype)
