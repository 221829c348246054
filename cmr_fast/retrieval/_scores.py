"""Distances of embeddings as integer keys that rise with them: coarse ones, certain of most rankings, and exact.

Products of matrices are fast and their rounding is bounded. Put on a grid and sorted, they are the ranking wherever
neighbours lie further apart than the bound; queries where some do not (true ties, rows far from all others) are
computed again, from differences where the metric is one, and tied by the rounding of their own sums.
"""

import math
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

METRICS = ("cosine", "l2", "ip")
Metric = Literal["cosine", "l2", "ip"]

_NEVER = np.iinfo(np.int64).max
_SQUARED = 1e-140  # largest elements below, or above 1 / this: sums of squares may lose digits or overflow
_TINY = 1e-280  # below, products may lose digits to the smallest float64


class Scores:
    """Distances of queries (Q, d) to a database (N, d), both float64 on one device.

    repeats    rows of the database that equal an earlier one
    paying     False once coarse keys are certain of few queries
    """

    def __init__(self, query: Tensor, database: Tensor, metric: Metric) -> None:
        x, y = query, database
        if metric == "cosine":
            x, y = (_unit(v) for v in (x, y))
        elif metric == "ip":  # of each by itself: a factor does not change the order
            x, y = _scaled(x), _scaled(y)
        else:
            x, y = _scaled(x, y), _scaled(y, x)
        self._x, self._y, self._l2 = x, y, metric == "l2"
        self._rounding = (y.shape[1] + 4) * torch.finfo(y.dtype).eps
        self.paying = True
        self.repeats = 0 if _no_row_twice(y) else len(y) - len(self._distinct[0])

    def is_repeated(self, rows: np.ndarray) -> np.ndarray:
        """Which of these database rows have an equal one, bool of the same shape."""
        if not self.repeats:
            return np.zeros(rows.shape, dtype=bool)
        return np.asarray((self._distinct[2] > 1)[self._distinct[1]].cpu().numpy()[rows])

    def coarse(self, rows: slice, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys int64 (B, N) within +-2^(bits - 1), and for each query what two keys must differ by to be certain."""
        x, y, largest = self._products
        block = x[rows]
        norms = block.norm(dim=1)
        if self._l2:  # less |x|^2, which does not change the order
            bound = (norms + largest).square()
            far = torch.addmm(y.square().sum(dim=1), block, y.T, alpha=-2)
            error = 8 * self._rounding * bound
        else:
            bound = norms * largest
            far = -block @ y.T
            error = 4 * self._rounding * bound
        usable = (bound > _TINY) & torch.isfinite(bound)
        unit = torch.where(usable, 2.0 ** (bits - 1) / bound.clamp_min(_TINY), 0.0)
        keys = far.mul_(unit[:, None]).round_().long().cpu().numpy()
        apart = torch.where(usable, error * unit, 0.0).ceil().long().cpu().numpy() + 1
        apart[~usable.cpu().numpy()] = _NEVER
        return keys, apart

    def exact(self, rows: np.ndarray) -> np.ndarray:
        """Keys int64 (B, N) from 0, equal where tied."""
        block = self._x[torch.from_numpy(rows).to(self._x.device)]
        distinct, place, _ = self._distinct
        if self._l2:
            far = torch.cdist(block, distinct, compute_mode="donot_use_mm_for_euclid_dist")
            error = self._rounding * far
        else:
            far = -(block @ distinct.T)
            error = self._rounding * block.norm(dim=1, keepdim=True) * distinct.norm(dim=1)
        order = far.argsort(dim=1)
        far, error = far.gather(1, order), error.gather(1, order)
        apart = far[:, 1:] - far[:, :-1] > torch.minimum(error[:, 1:], error[:, :-1])
        keys = torch.zeros_like(order)
        keys.scatter_(1, order[:, 1:], apart.long().cumsum(1))
        return keys[:, place].cpu().numpy()

    @cached_property
    def _distinct(self) -> tuple[Tensor, Tensor, Tensor]:
        """The different rows of the database, which of them each row is, and how many are each."""
        rows, place, counts = torch.unique(self._y, dim=0, return_inverse=True, return_counts=True)
        return rows, place, counts

    @cached_property
    def _products(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and database as coarse keys multiply them, and the largest norm in the database."""
        centre = self._y.mean(dim=0) if self._l2 else torch.zeros_like(self._y[0])
        x, y = (self._x - centre, self._y - centre) if self._l2 else (self._x, self._y)
        return x, y, y.norm(dim=1).max()


def _unit(v: Tensor) -> Tensor:
    """Rows divided by their norms; zero stays zero."""
    largest = torch.linalg.vector_norm(v, ord=torch.inf, dim=1, keepdim=True)
    far = (largest > 0) & ((largest < _SQUARED) | (largest > 1 / _SQUARED))
    if bool(far.any()):
        v = v / torch.where(far, largest, 1.0)
    norms: Tensor = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v / norms.clamp_min(torch.finfo(v.dtype).tiny)


def _scaled(v: Tensor, beside: Tensor | None = None) -> Tensor:
    """Times a power of two, where squares of the largest elements, `beside` too, would underflow or overflow."""
    largest = max(float(x.abs().max()) for x in (v, v if beside is None else beside))
    if largest == 0 or _SQUARED <= largest <= 1 / _SQUARED:
        return v
    return v * 2.0 ** -max(-1000, min(math.frexp(largest)[1], 1000))


def _no_row_twice(y: Tensor) -> bool:
    """True only where no two rows are equal, by a hash of their bits that is exact in any order of summation."""
    odd = torch.randint(2**62, (y.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    for columns in (16, y.shape[1]):  # the first ones tell most rows apart
        part = (y[:, :columns] + 0.0).view(torch.int64)  # + 0.0: -0 and 0 are equal
        hashes = torch.sort((part * odd[:columns].to(y.device)).sum(dim=1)).values
        if not bool((hashes[1:] == hashes[:-1]).any()):
            return True
    return False
