"""The blocks of ops/triplet.py: anchors against all candidates, and the gradient that their weights give."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmr_fast.ops import _dispatch

BLOCK = {"cpp": 1 << 22, "cuda": 1 << 24, "torch": 1 << 20}  # distances held at once
EXACT = 25  # up to so many rows torch.cdist takes differences
CLOSE = 1 / 64  # squared distances up to this share of |x|^2 + |y|^2 are made from differences: kClose of the kernels
SAMPLE = 17  # rows that the origin is chosen by: kOriginRows of the kernels

# weigh(rows, block): inner products of a block of anchors with all candidates in (nothing where the sweep is exact); e
# in their place, its row sums back
Weigh = Callable[[slice, Tensor], Tensor]


class Sweep:
    """Blocks of anchors against all candidates: products, weights, and the gradient that these give.

    Squared distances are |x|^2 + |y|^2 - 2 x y; where that is up to CLOSE of |x|^2 + |y|^2 its digits are lost, and
    they are made again from differences. Batches of which torch.cdist takes differences are `exact`: so do we. The
    origin is moved only along coordinates whose values lie far from 0 beside their spread, and to one of these values,
    so that the difference is exact: equal distances stay equal, and a few far rows do not move it.
    """

    def __init__(self, x: Tensor, other: Tensor | None, backend: str, distance: str, threads: int | None) -> None:
        self.same, self.dot, self.backend = other is None, distance == "dot", backend
        y = x if other is None else other
        self.exact = not self.dot and max(x.shape[0], y.shape[0]) <= EXACT
        self.x = x.contiguous()
        self.y = self.x if self.same else y.contiguous()
        if not self.dot and not self.exact and x.shape[0] and y.shape[0]:
            origin = _native_origin(self.x, self.y) if backend == "cpp" else _origin(self.x, self.y)
            if origin is not None:
                self.x = self.x - origin
                self.y = self.x if self.same else self.y - origin
        self.x_squares = self.x.square().sum(1)
        self.y_squares = self.x_squares if self.same else self.y.square().sum(1)
        self.rows = max(1, min(x.shape[0], BLOCK[backend] // max(1, y.shape[0])))
        self.close = False  # whether a pair of the last block has a weight and is close; not asked for on a GPU
        self.head: tuple[Any, ...] = ()  # of a native call's arguments, and its scratch
        self.tail: tuple[int, ...] = ()
        if backend == "cpp":
            self.native, self.head = _dispatch.native(), (_dispatch.choose_isa(), _dispatch.choose_threads(threads))
            size = self.native.triplet_workspace(self.rows, y.shape[0], self.head[1])
            self.workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
            self.close_of_row = torch.empty(self.rows, dtype=torch.int64, device="cpu")
            self.tail = self.close_of_row.data_ptr(), self.workspace.data_ptr()
        elif backend == "cuda":
            self.native, self.head = _dispatch.native_cuda(), (_dispatch.queue(x),)

    def points(self, rows: slice) -> tuple[int, int, int, int, int, bool]:
        """A block's anchors and the candidates, as native code takes them."""
        return (
            address(self.x, rows), address(self.x_squares, rows), self.y.data_ptr(), self.y_squares.data_ptr(),
            self.x.shape[1], self.exact,
        )  # fmt: skip

    def run(self, weigh: Weigh, grad_x: Tensor, grad_other: Tensor) -> None:
        """Weigh every block; fill the gradients that have rows."""
        grad_x.zero_()
        grad_other.zero_()
        anchors, candidates = self.x.shape[0], self.y.shape[0]
        if not anchors or not candidates:
            return
        wanted = grad_x.shape[0] or grad_other.shape[0]
        buffer = self.x.new_empty((self.rows, candidates))
        for first in range(0, anchors, self.rows):
            rows = slice(first, min(first + self.rows, anchors))
            block = buffer[: rows.stop - first]
            if not self.exact:
                torch.mm(self.x[rows], self.y.T, out=block)
            sums = weigh(rows, block)
            if not wanted:
                continue
            if self.exact or self.close:
                self._pull_close(rows, block, grad_x, grad_other)
            elif self.same:
                self._pull_same(rows, block, sums, grad_x)
            else:
                self._pull(rows, block, sums, grad_x, grad_other)

    def _pull_close(self, rows: slice, e: Tensor, grad_x: Tensor, grad_other: Tensor) -> None:
        """_pull where some x_i - y_j are small beside x_i: what e_ij x_i and e_ij y_j leave of each other is kept."""
        if self.x.dtype == torch.float32:
            e, x, y = e.double(), self.x[rows].double(), self.y.double()
            to_x, to_y = e.sum(1, keepdim=True) * x - e @ y, e.sum(0)[:, None] * y - e.T @ x
        else:
            to_x, to_y = torch.zeros_like(self.x[rows]), torch.zeros_like(self.y)
            step = max(1, BLOCK["torch"] // max(1, self.y.numel()))
            for i in range(0, len(e), step):
                pulls = e[i : i + step, :, None] * (self.x[rows][i : i + step, None] - self.y)
                to_x[i : i + step] = pulls.sum(1)
                to_y -= pulls.sum(0)
        if len(grad_x):
            grad_x[rows] += to_x
        if self.same and len(grad_x):
            grad_x += to_y
        elif len(grad_other):
            grad_other += to_y

    def _pull(self, rows: slice, e: Tensor, sums: Tensor, grad_x: Tensor, grad_other: Tensor) -> None:
        """Gradient of sum_ij w_ij d(x_i, y_j) with e_ij = w_ij / d_ij (euclidean), 2 w_ij (squared) or w_ij (dot).

        grad x_i = sum_j e_ij (x_i - y_j), grad y_j = sum_i e_ij (y_j - x_i); for dot without the terms of one's own.
        """
        if len(grad_x):
            torch.mm(e, self.y, out=grad_x[rows]).neg_()
            if not self.dot:
                grad_x[rows].addcmul_(sums[:, None], self.x[rows])
        if len(grad_other):
            torch.addmm(grad_other, e.T, self.x[rows], alpha=-1, out=grad_other)
            if not self.dot:
                grad_other.addcmul_(e.sum(0)[:, None], self.y)

    def _pull_same(self, rows: slice, e: Tensor, sums: Tensor, grad_x: Tensor) -> None:
        """Anchors are candidates too. All of them in one block: e + e^T, and one product in place of two."""
        if e.shape[0] < self.x.shape[0]:
            torch.addmm(grad_x[rows], e, self.y, alpha=-1, out=grad_x[rows])
            torch.addmm(grad_x, e.T, self.x[rows], alpha=-1, out=grad_x)
            if not self.dot:
                grad_x[rows].addcmul_(sums[:, None], self.x[rows])
                grad_x.addcmul_(e.sum(0)[:, None], self.x)
            return
        if self.backend == "cpp":
            self.native.triplet_symmetrise(*self.head, e.shape[0], e.data_ptr(), sums.data_ptr())
        else:
            e = e + e.T
            sums = e.sum(1)
        torch.mm(e, self.x, out=grad_x).neg_()
        if not self.dot:
            grad_x.addcmul_(sums[:, None], self.x)

    def distances(self, rows: slice, products: Tensor) -> Tensor:
        """Squared Euclidean, or minus the products."""
        if self.dot:
            return -products
        step = max(1, BLOCK["torch"] // max(1, self.x.shape[1]))
        if self.exact:
            return (self.x[rows, None] - self.y).square_().sum(2)
        both = self.x_squares[rows, None] + self.y_squares
        d2 = both - 2 * products
        close = self.is_close(rows, d2)
        if self.same:
            d2.diagonal(rows.start).fill_(0)
            close.diagonal(rows.start).fill_(False)
        if d2.device.type != "cpu":  # which pairs are close is not asked there: the caller would wait for the device
            return d2.masked_fill_(d2 <= 4 * torch.finfo(d2.dtype).eps * both, 0)
        for pairs in close.nonzero().split(step):
            i, j = pairs.unbind(1)
            d2[i, j] = (self.x[rows][i] - self.y[j]).square_().sum(1)
        return d2

    def is_close(self, rows: slice, d2: Tensor) -> Tensor:
        """Which squared distances are small beside the squares that they are the difference of."""
        return d2 <= CLOSE * (self.x_squares[rows, None] + self.y_squares)


def address(x: Tensor, rows: slice) -> int:
    """Of the first of these rows of a contiguous tensor: what x[rows].data_ptr() is, without a tensor made for it."""
    return x.data_ptr() + int(rows.start) * x.stride(0) * x.element_size()


def _origin(x: Tensor, y: Tensor) -> Tensor | None:
    """(d,) the median of some rows along coordinates where it is more than twice the median deviation, 0 elsewhere."""
    rows = torch.cat([v[:: -(-len(v) // SAMPLE)] for v in (x, y)]) if y is not x else x[:: -(-len(x) // SAMPLE)]
    middle = len(rows) // 2
    origin = rows.sort(dim=0).values[middle]
    # as many rows as lie within the median deviation lie nearer to the median than half of it
    far = ((rows - origin).abs_() < 0.5 * origin.abs()).sum(0) > middle
    if origin.device.type == "cpu" and not bool(far.any()):
        return None
    return torch.where(far, origin, 0)


def _native_origin(x: Tensor, y: Tensor) -> Tensor | None:
    """_origin in one call."""
    origin = torch.empty(x.shape[1], dtype=torch.float32, device="cpu")
    second = (y.shape[0], y.data_ptr()) if y is not x else (0, 0)
    moved = _dispatch.native().triplet_origin(x.shape[0], x.data_ptr(), *second, x.shape[1], origin.data_ptr())
    return origin if moved else None


def weights_of(
    d: Tensor, positive: Tensor, negative: Tensor, margin: float, mining: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances (R, N) and who is what -> weights (R, N); per row: sum of w d, triplets, open triplets.

    A positive weighs the number of its triplets that are open, a negative minus that.
    """
    limit = d + margin  # of a positive: its hinge with a negative below this is open
    infinity = float("inf")
    positives, negatives = positive.sum(1), negative.sum(1)
    both = (positives > 0) & (negatives > 0)
    if mining == "all":
        triplets = positives * negatives
        ends = limit.masked_fill(~positive, infinity).sort(dim=1).values
        above = (positives[:, None] - torch.searchsorted(ends, d, right=True)).clamp_(min=0)
        below = torch.searchsorted(d.masked_fill(~negative, infinity).sort(dim=1).values, limit)
        w = torch.where(positive, below, torch.where(negative, -above, 0))
    elif mining == "hard":
        triplets = both.long()
        p = d.masked_fill(~positive, -infinity).argmax(1, keepdim=True)
        n = d.masked_fill(~negative, infinity).argmin(1, keepdim=True)
        is_open = (both[:, None] & (d.gather(1, n) < limit.gather(1, p))).long()
        w = torch.zeros_like(positive, dtype=torch.int64).scatter_(1, p, is_open).scatter_add_(1, n, -is_open)
    elif mining == "hard_negative":
        triplets = torch.where(both, positives, 0)
        n = d.masked_fill(~negative, infinity).argmin(1, keepdim=True)
        w = (positive & both[:, None] & (d.gather(1, n) < limit)).long()
        w.scatter_add_(1, n, -w.sum(1, keepdim=True))
    else:
        ordered = d.masked_fill(~negative, infinity).sort(dim=1, stable=True)
        place = torch.searchsorted(ordered.values, d, right=True)  # of the nearest negative that is farther
        exists = positive & (place < negatives[:, None])
        triplets = exists.sum(1)
        place = place.clamp_(max=max(0, d.shape[1] - 1))
        w = (exists & (ordered.values.gather(1, place) < limit)).long()
        w.scatter_add_(1, ordered.indices.gather(1, place), -w)
    is_open = w.clamp(min=0).sum(1)
    w = w.to(d.dtype)
    return w, (w.double() * d.double()).sum(1), triplets, is_open
