"""Margin losses over all triplets of a batch or over mined ones, and ACMR's separable terms: no list of triplets.

Every loss here is linear in the distances as long as no triplet changes sides of its hinge: row i of its weights W
depends on row i of the distances D and on the labels alone. So blocks of anchors go one after the other: one product
gives their distances, the weights over all triplets take a sort and a search in each row, and one or two products give
the gradient. Nothing larger than a block is ever held. The gradient is made in the forward pass, where the weights are
at hand; the backward op scales it.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._dispatch import check_finite
from cmr_fast.ops._library import LIBRARY, refuse_twice, register
from cmr_fast.ops._tensors import Array, as_tensor, like_input
from cmr_fast.ops.cuda import hamming as hamming_cuda

Mining = Literal["all", "hard", "hard_negative", "semihard"]
Distance = Literal["euclidean", "squared", "cosine", "dot"]
Reduction = Literal["mean", "mean_nonzero", "sum"]
MINING = ("all", "hard", "hard_negative", "semihard")
DISTANCES = ("euclidean", "squared", "dot")
REDUCTIONS = ("mean", "mean_nonzero", "sum")
MAX_ITEMS = 1 << 24  # weights are counts, and float32 counts exactly up to here
MAX_CUDA_CANDIDATES = 4096  # a row is sorted in shared memory
_BLOCK = {"cpp": 1 << 22, "cuda": 1 << 24, "torch": 1 << 20}  # distances held at once
_EXACT = 25  # up to so many rows torch.cdist takes differences
_CLOSE = 1 / 64  # squared distances up to this share of |x|^2 + |y|^2 are made from differences: kClose of the kernels
_SAMPLE = 17  # rows that the origin is chosen by


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
) -> Any:
    """Triplet margin loss of a batch: a scalar made of max(0, d(a, p) - d(a, n) + margin) over triplets (a, p, n).

    x               float (B, d) anchors. float16 and bfloat16 are computed in float32
    labels          int (B,) class ids: positive where equal; or (B, C) multi-hot: positive where a label is shared
    margin          in units of the distance
    mining          all            every triplet, exactly, in O(B^2 log B)
                    hard           per anchor its farthest positive and its nearest negative (Hermans et al. 2017)
                    hard_negative  per positive pair the anchor's nearest negative: VSE++'s max of hinges
                    semihard       per positive pair the nearest negative that is farther than the positive (FaceNet);
                                   a pair without one makes no triplet
    other           float (M, d) candidates of the other modality: anchors are rows of x, positives and negatives rows
                    of `other`. Without it they are the other rows of x; an anchor is never its own positive
    other_labels    their labels, of the same kind; left out: those of x, row by row
    distance        euclidean, squared (Euclidean), cosine (1 - cosine), or dot (minus the inner product)
    reduction       mean over all triplets of the mining, over those whose hinge is above 0, or the sum
    returns         a scalar of x's dtype (float32 for half precision), differentiable in x and other

    A batch without a triplet (no positives, no negatives, nothing at all) gives 0 and a gradient of zeros. The hinge
    is open where d(a, n) < d(a, p) + margin, rounded to the dtype: a tie counts nothing and has no gradient. Of equal
    distances, mining takes the lower index. Distances of 0 have a gradient of 0.
    """
    anchors, was_numpy = as_tensor(x, "x")
    candidates = None if other is None else as_tensor(other, "other")[0]
    if mining not in MINING:
        raise InputError(f"mining must be one of {', '.join(MINING)}, got {mining!r}")
    if distance not in (*DISTANCES, "cosine"):
        raise InputError(f"distance must be one of euclidean, squared, cosine, dot, got {distance!r}")
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    margin = _as_number(margin, "margin")
    anchors, candidates = _check_embeddings(anchors, candidates, "x", "other")
    if other is None and other_labels is not None:
        raise InputError("other_labels needs other: without it positives and negatives are rows of x")
    mine = _as_relevance(labels, anchors, "labels", "x")
    theirs = None
    if candidates is not None and other_labels is not None:
        theirs = _as_relevance(other_labels, candidates, "other_labels", "other")
        if mine.shape[1:] != theirs.shape[1:]:
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
    grad = torch.is_grad_enabled()
    loss = torch.ops.cmr_fast.triplet_margin(
        anchors, candidates, mine, theirs, margin, MINING.index(mining), DISTANCES.index(distance),
        REDUCTIONS.index(reduction), grad and anchors.requires_grad,
        grad and candidates is not None and candidates.requires_grad, *_dispatch.how(backend, threads),
    )[0]  # fmt: skip
    return like_input(loss, was_numpy)


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

    image, text   float (B, d), row i of both from pair i. float16 and bfloat16 are computed in float32
    labels        int (B,) class ids, or (B, C) multi-hot: relevant = at least one label shared
    margin        the paper's mu, in units of distance
    weight        the paper's lambda, of the hinge on negatives

    With D_ij = ||image_i - text_j||, P_i relevant and N_i irrelevant texts of image i, the terms of Eq. 4 separate:

        sum_{j,k} [D_ij + weight * max(0, margin - D_ik)]
            = N_i * sum_{j relevant} D_ij + weight * P_i * sum_{k irrelevant} max(0, margin - D_ik)

    Eq. 5 is the same on D transposed. Returns a scalar, differentiable in image and text:
    sum    both directions, all anchors, as in Eq. 4-6
    mean   per anchor, mean relevant D + weight * mean irrelevant hinge (what a triplet contributes on average), then
           the mean over anchors that have a triplet, summed over both directions; 0 if there is no triplet

    Distances of 0 have a gradient of 0, and so has a hinge at its kink.
    """
    image, text = as_tensor(image, "image")[0], as_tensor(text, "text")[0]
    if image.ndim != 2 or image.shape != text.shape:
        raise InputError(f"image and text must both be (B, d), got {_shape(image)} and {_shape(text)}")
    if reduction not in ("sum", "mean"):
        raise InputError(f"reduction must be sum or mean, got {reduction!r}")
    margin, weight = _as_number(margin, "margin"), _as_number(weight, "weight")
    image, partner = _check_embeddings(image, text, "image", "text")
    assert partner is not None
    text = partner
    relevance = _as_relevance(labels, image, "labels", "image")
    grad = torch.is_grad_enabled()
    return torch.ops.cmr_fast.acmr_triplet(
        image, text, relevance, margin, weight, reduction == "mean", grad and image.requires_grad,
        grad and text.requires_grad, *_dispatch.how(backend, threads),
    )[0]  # fmt: skip


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape)


def _as_number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be a number, got {value!r}") from error
    if not abs(number) < float("inf"):
        raise InputError(f"{name} must be finite, got {number}")
    return number


def _check_embeddings(x: Tensor, other: Tensor | None, name: str, other_name: str) -> tuple[Tensor, Tensor | None]:
    """Both as float32 or float64."""
    for value, called in ((x, name), (other, other_name)):
        if value is None:
            continue
        if value.ndim != 2 or not value.is_floating_point():
            raise InputError(f"{called} must be float (N, d), got {value.dtype} {tuple(value.shape)}")
        if len(value) > MAX_ITEMS:
            raise InputError(f"{called} must have at most {MAX_ITEMS} rows, got {len(value)}")
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
    if len(given) != len(items) or given.device != items.device:
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
    packed = torch.ops.cmr_fast.pack_bits(given if given.dtype == torch.bool else given > 0)
    words = packed.new_zeros((len(packed), -(-packed.shape[1] // 8) * 8))
    words[:, : packed.shape[1]] = packed
    return words.view(torch.int64)


def _planes(labels: Tensor) -> Tensor:
    """(N,) as it is; (N, W) -> (W, N)."""
    return (labels if labels.ndim == 1 else labels.T).contiguous()


def _relevant(mine: Tensor, theirs: Tensor) -> Tensor:
    """bool (B, N) of class ids, or of packed labels."""
    if mine.ndim == 1:
        return mine[:, None] == theirs
    shared = torch.zeros((len(mine), len(theirs)), dtype=torch.bool, device=mine.device)
    for a, b in zip(mine.T, theirs.T, strict=True):
        shared |= (a[:, None] & b) != 0
    return shared


def _unfit(x: Tensor, candidates: int) -> dict[str, str]:
    unfit = {}
    if x.dtype != torch.float32:
        unfit = dict.fromkeys(("cpp", "cuda"), f"it computes in float32, x is {x.dtype}")
    elif candidates > MAX_CUDA_CANDIDATES:
        unfit["cuda"] = f"it sorts rows of at most {MAX_CUDA_CANDIDATES} candidates, these have {candidates}"
    return unfit


# weigh(rows, block): inner products of a block of anchors with all candidates in (nothing where the sweep is exact); e
# in their place, its row sums back
Weigh = Callable[[slice, Tensor], Tensor]


class _Sweep:
    """Blocks of anchors against all candidates: products, weights, and the gradient that these give.

    Squared distances are |x|^2 + |y|^2 - 2 x y; where that is up to _CLOSE of |x|^2 + |y|^2 its digits are lost, and
    they are made again from differences. Batches of which torch.cdist takes differences are `exact`: so do we. The
    origin is moved only along coordinates whose values lie far from 0 beside their spread, and to one of these values,
    so that the difference is exact: equal distances stay equal, and a few far rows do not move it.
    """

    def __init__(self, x: Tensor, other: Tensor | None, backend: str, distance: int, threads: int | None) -> None:
        self.same, self.dot, self.backend = other is None, distance == 2, backend
        y = x if other is None else other
        self.exact = not self.dot and max(len(x), len(y)) <= _EXACT
        if not self.dot and not self.exact and len(x) and len(y):
            origin = _origin(x, y)
            if origin is not None:
                x, y = x - origin, y if other is None else y - origin
        self.x = x.contiguous()
        self.y = self.x if self.same else y.contiguous()
        self.x_squares = self.x.square().sum(1)
        self.y_squares = self.x_squares if self.same else self.y.square().sum(1)
        self.rows = max(1, min(len(x), _BLOCK[backend] // max(1, len(y))))
        self.close = torch.zeros(len(x), dtype=torch.int64, device=x.device)  # close pairs of a row that have a weight
        self.head: tuple[Any, ...] = ()
        if backend == "cpp":
            self.native, self.head = _dispatch.native(), (_dispatch.choose_isa(), _dispatch.choose_threads(threads))
            size = self.native.triplet_workspace(self.rows, len(y), self.head[1])
            self.workspace = torch.empty(size, dtype=torch.uint8, device="cpu")
        elif backend == "cuda":
            device = hamming_cuda.device_of(x)
            self.native = _dispatch.native_cuda()
            self.head = (self.native.Queue(device.index, device.stream),)

    def points(self, rows: slice) -> tuple[int, int, int, int, int, bool]:
        """A block's anchors and the candidates, as native code takes them."""
        return (
            self.x[rows].data_ptr(), self.x_squares[rows].data_ptr(), self.y.data_ptr(), self.y_squares.data_ptr(),
            self.x.shape[1], self.exact,
        )  # fmt: skip

    def run(self, weigh: Weigh, grad_x: Tensor, grad_other: Tensor) -> None:
        """Weigh every block; fill the gradients that have rows."""
        grad_x.zero_()
        grad_other.zero_()
        if not len(self.x) or not len(self.y):
            return
        buffer = self.x.new_empty((self.rows, len(self.y)))
        for first in range(0, len(self.x), self.rows):
            rows = slice(first, min(first + self.rows, len(self.x)))
            block = buffer[: rows.stop - first]
            if not self.exact:
                torch.mm(self.x[rows], self.y.T, out=block)
            sums = weigh(rows, block)
            if not len(grad_x) and not len(grad_other):
                continue
            if self.exact or (self.x.device.type == "cpu" and not self.dot and bool(self.close[rows].any())):
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
            step = max(1, _BLOCK["torch"] // max(1, self.y.numel()))
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
        """Gradient of sum_ij w_ij d(x_i, y_j) with e_ij = w_ij / d_ij (euclidean), 2 w_ij (squared) or w_ij (dot):

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
        if len(e) < len(self.x):
            torch.addmm(grad_x[rows], e, self.y, alpha=-1, out=grad_x[rows])
            torch.addmm(grad_x, e.T, self.x[rows], alpha=-1, out=grad_x)
            if not self.dot:
                grad_x[rows].addcmul_(sums[:, None], self.x[rows])
                grad_x.addcmul_(e.sum(0)[:, None], self.x)
            return
        if self.backend == "cpp":
            self.native.triplet_symmetrise(*self.head, len(e), e.data_ptr(), sums.data_ptr())
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
        step = max(1, _BLOCK["torch"] // max(1, self.x.shape[1]))
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
        return d2 <= _CLOSE * (self.x_squares[rows, None] + self.y_squares)


def _origin(x: Tensor, y: Tensor) -> Tensor | None:
    """(d,) the median of some rows along coordinates where it is more than twice the median deviation, 0 elsewhere."""
    rows = torch.cat([v[:: -(-len(v) // _SAMPLE)] for v in (x, y)]) if y is not x else x[:: -(-len(x) // _SAMPLE)]
    middle = len(rows) // 2
    origin = rows.sort(dim=0).values[middle]
    spread = (rows - origin).abs_().sort(dim=0).values[middle]
    origin = torch.where(origin.abs() > 2 * spread, origin, 0)
    return origin if origin.device.type != "cpu" or bool(origin.any()) else None


def _outputs(x: Tensor, other: Tensor | None, grad_x: bool, grad_other: bool) -> tuple[Tensor, Tensor, Tensor]:
    others = len(other) if other is not None and grad_other else 0
    return x.new_empty(()), x.new_empty((len(x) if grad_x else 0, x.shape[1])), x.new_empty((others, x.shape[1]))


def _triplet_margin(
    x: Tensor,
    other: Tensor | None,
    labels: Tensor,
    other_labels: Tensor | None,
    margin: float,
    mining: int,
    distance: int,
    reduction: int,
    needs_grad_x: bool,
    needs_grad_other: bool,
    backend: str | None,
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x if other is None else other
    their_labels = labels if other_labels is None else other_labels
    chosen = _dispatch.choose_backend("triplet_margin", x.device.type, backend, _unfit(x, len(y)))
    _, grad_x, grad_other = _outputs(x, other, needs_grad_x, needs_grad_other)
    losses = torch.zeros(len(x), dtype=torch.float64, device=x.device)  # sum of the open hinges of an anchor
    counts = torch.zeros((2, len(x)), dtype=torch.int64, device=x.device)  # its triplets, and those of them open
    sweep = _Sweep(x, other, chosen, distance, threads)

    if chosen == "torch":

        def weigh(rows: slice, block: Tensor) -> Tensor:
            d = sweep.distances(rows, block)
            close = sweep.is_close(rows, d) if distance != 2 else None
            if distance != 2:
                d = d.clamp_(min=0)
            if distance == 0:
                d = d.sqrt_()
            positive = _relevant(labels[rows], their_labels)
            negative = ~positive
            if other is None:
                positive.diagonal(rows.start).fill_(False)
            w, losses[rows], counts[0, rows], counts[1, rows] = _weights(d, positive, negative, margin, mining)
            if close is not None:
                sweep.close[rows] = (close & (w != 0)).sum(1)
            if distance == 0:
                w = torch.where(d == 0, 0, w / d)
            elif distance == 1:
                w = w * 2
            block.copy_(w)
            return block.sum(1)
    else:
        mine, planes = labels.contiguous(), _planes(their_labels)
        words = 1 if labels.ndim == 1 else labels.shape[1]
        sums = x.new_empty(len(x))
        shape = (len(y), words, labels.ndim == 1, margin, mining, distance, needs_grad_x or needs_grad_other)

        def weigh(rows: slice, block: Tensor) -> Tensor:
            tail = (sweep.close[rows].data_ptr(), sweep.workspace.data_ptr()) if chosen == "cpp" else ()
            sweep.native.triplet_weigh(
                *sweep.head, len(block), *shape, rows.start if other is None else -1, block.data_ptr(),
                sweep.points(rows), mine[rows].data_ptr(), planes.data_ptr(), losses[rows].data_ptr(),
                counts[0, rows].data_ptr(), counts[1, rows].data_ptr(), sums[rows].data_ptr(), *tail,
            )  # fmt: skip
            return sums[rows]

    sweep.run(weigh, grad_x, grad_other)
    loss = losses.sum()
    if reduction < 2:
        number = counts[reduction].sum().clamp(min=1)
        loss = loss / number
        for grad in (grad_x, grad_other):
            grad.div_(number)
    return loss.to(x.dtype), grad_x, grad_other


def _weights(
    d: Tensor, positive: Tensor, negative: Tensor, margin: float, mining: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances (R, N) and who is what -> weights (R, N); per row: sum of open hinges, triplets, open triplets.

    A positive weighs the number of its triplets that are open, a negative minus that.
    """
    limit = d + margin  # of a positive: its hinge with a negative below this is open
    infinity = float("inf")
    positives, negatives = positive.sum(1), negative.sum(1)
    both = (positives > 0) & (negatives > 0)
    if MINING[mining] == "all":
        triplets = positives * negatives
        ends = limit.masked_fill(~positive, infinity).sort(dim=1).values
        above = (positives[:, None] - torch.searchsorted(ends, d, right=True)).clamp_(min=0)
        found = torch.searchsorted(d.masked_fill(~negative, infinity).sort(dim=1).values, limit)
        w = torch.where(positive, found, torch.where(negative, -above, 0))
    elif MINING[mining] == "hard":
        triplets = both.long()
        p = d.masked_fill(~positive, -infinity).argmax(1, keepdim=True)
        n = d.masked_fill(~negative, infinity).argmin(1, keepdim=True)
        is_open = (both[:, None] & (d.gather(1, n) < limit.gather(1, p))).long()
        w = torch.zeros_like(positive, dtype=torch.int64).scatter_(1, p, is_open).scatter_add_(1, n, -is_open)
    elif MINING[mining] == "hard_negative":
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
    loss = (w.double() * torch.where(positive, limit, d).double()).sum(1)
    return w, loss, triplets, is_open


def _acmr_triplet(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    margin: float,
    weight: float,
    mean: bool,
    needs_grad_image: bool,
    needs_grad_text: bool,
    backend: str | None,
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight of D_ij is near_i + near_j where relevant, else -(far_i + far_j) where its hinge is open."""
    size = len(image)
    chosen = _dispatch.choose_backend("acmr_triplet", image.device.type, backend, _unfit(image, size))
    _, grad_image, grad_text = _outputs(image, text, needs_grad_image, needs_grad_text)
    sweep = _Sweep(image, text, chosen, DISTANCES.index("euclidean"), threads)
    losses = torch.zeros(size, dtype=torch.float64, device=image.device)
    near, far, sums = image.new_empty((3, size))
    if chosen == "torch":
        positives = torch.zeros(size, dtype=image.dtype, device=image.device)
        for first in range(0, size, sweep.rows):
            rows = slice(first, first + sweep.rows)
            positives[rows] = _relevant(labels[rows], labels).sum(1).to(image.dtype)
        negatives = size - positives
        near, far = negatives, weight * positives
        if mean:
            usable = (positives * negatives > 0).to(image.dtype)
            usable = usable / usable.sum().clamp(min=1)
            near, far = usable / positives.clamp(min=1), weight * usable / negatives.clamp(min=1)

        def weigh(rows: slice, block: Tensor) -> Tensor:
            d2 = sweep.distances(rows, block)
            close = sweep.is_close(rows, d2)
            d = d2.clamp_(min=0).sqrt_()
            pull, push = near[rows, None] + near, far[rows, None] + far
            relevant = _relevant(labels[rows], labels)
            hinge = (margin - d).clamp(min=0)
            losses[rows] = torch.where(relevant, pull * d, push * hinge).double().sum(1)
            w = torch.where(relevant, pull, torch.where(hinge > 0, -push, 0))
            sweep.close[rows] = (close & (w != 0)).sum(1)
            block.copy_(torch.where(d == 0, 0, w / d))
            return block.sum(1)
    else:
        mine, planes = labels.contiguous(), _planes(labels)
        relevance = (1 if labels.ndim == 1 else labels.shape[1], labels.ndim == 1)
        counts = torch.empty(size, dtype=torch.int64, device="cpu")
        sweep.native.triplet_acmr_factors(
            *sweep.head, size, *relevance, mine.data_ptr(), planes.data_ptr(), weight, mean, counts.data_ptr(),
            near.data_ptr(), far.data_ptr(),
        )  # fmt: skip

        def weigh(rows: slice, block: Tensor) -> Tensor:
            sweep.native.triplet_acmr(
                *sweep.head, len(block), size, *relevance, margin, near.data_ptr(), far.data_ptr(), rows.start,
                needs_grad_image or needs_grad_text, block.data_ptr(), sweep.points(rows), mine[rows].data_ptr(),
                planes.data_ptr(), losses[rows].data_ptr(), sums[rows].data_ptr(), sweep.close[rows].data_ptr(),
                sweep.workspace.data_ptr(),
            )  # fmt: skip
            return sums[rows]

    sweep.run(weigh, grad_image, grad_text)
    return losses.sum().to(image.dtype), grad_image, grad_text


def _keep_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output[1:])


def _backward(inputs: int) -> Callable:
    """For ops of `inputs` arguments whose first two are differentiable and whose outputs are (loss, grad, grad)."""

    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        first, second = torch.ops.cmr_fast.triplet_margin_backward(grad, *ctx.saved_tensors)
        needed = ctx.needs_input_grad
        return (first if needed[0] else None, second if needed[1] else None) + (None,) * (inputs - 2)

    return backward


register(
    "triplet_margin(Tensor x, Tensor? other, Tensor labels, Tensor? other_labels, float margin, int mining, "
    "int distance, int reduction, bool needs_grad_x, bool needs_grad_other, str? backend, int? threads) "
    "-> (Tensor, Tensor, Tensor)",
    _triplet_margin,
    lambda x, other, *rest: _outputs(x, other, rest[6], rest[7]),
)
register(
    "acmr_triplet(Tensor image, Tensor text, Tensor labels, float margin, float weight, bool mean, "
    "bool needs_grad_image, bool needs_grad_text, str? backend, int? threads) -> (Tensor, Tensor, Tensor)",
    _acmr_triplet,
    lambda image, text, *rest: _outputs(image, text, rest[4], rest[5]),
)
register(
    "triplet_margin_backward(Tensor grad, Tensor grad_x, Tensor grad_other) -> (Tensor, Tensor)",
    lambda grad, grad_x, grad_other: (grad * grad_x, grad * grad_other),
    lambda grad, grad_x, grad_other: (torch.empty_like(grad_x), torch.empty_like(grad_other)),
)


torch.library.register_autograd("cmr_fast::triplet_margin_backward", refuse_twice, lib=LIBRARY)
for name, arguments in (("triplet_margin", 12), ("acmr_triplet", 10)):
    torch.library.register_autograd(
        f"cmr_fast::{name}", _backward(arguments), setup_context=_keep_gradients, lib=LIBRARY
    )
