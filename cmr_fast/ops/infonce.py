"""Contrastive losses over every pair of a batch, in O(N) memory: InfoNCE, the sigmoid loss, a Jensen-Shannon critic.

Similarities exist one tile at a time: torch multiplies the tile, a fused epilogue takes from it what rows and columns
need or turns it into the gradient, and torch multiplies that with the features. Forward is one product, backward three
(the tile again, and a gradient to either side); what of the similarities fits KEEP_BYTES is not computed twice.
Panels of rows are shared out to threads, tiles of a column are added in the order of their panels: results depend
neither on the number of threads nor on the instruction set.
"""

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._library import LIBRARY, register

Positives = Tensor | tuple[Tensor, Tensor] | None
Reduction = Literal["mean", "sum", "none"]
Direction = Literal["both", "image", "text"]

ROWS, COLUMNS = 512, 1024  # of a tile
KEEP_BYTES = 64 << 20  # of similarities that wait for the backward pass
TORCH_PAIRS = 1 << 22  # of a block of the portable path
_CPP_DTYPES = (torch.float32, torch.bfloat16)


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    offset: int = 0,
    positives: Positives = None,
    direction: Direction = "both",
    reduction: Reduction = "mean",
    backend: str | None = None,
    threads: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """CLIP's loss (MAT Eq. 1, both directions halved) on logits z_ij = logit_scale * image_i . text_j.

    image, text    (n, d) and (m, d), one dtype and device; usually of unit length, which is not done here
    logit_scale    number or tensor of one element: 1 / temperature
    logit_bias     as open_clip passes it: a softmax does not see it, its gradient is 0
    offset         text i + offset is the positive of image i, 0 <= offset <= m - n (a rank's share of a large batch)
    positives      instead of one positive each:
                   int64 ids (n,), or a pair of them (n,) and (m,): positive where equal, all alike
                   bool (n, m), or float (n, m) of 0 or more: each row (column) is divided by its sum
    direction      "image": each image among the texts; "text": each text among the images; "both": their mean
    reduction      "mean" over the images and over the texts that have a positive; "sum" (for both: halved); "none":
                   losses (n,) of the images and (m,) of the texts, empty where `direction` leaves them out

    An image (text) without a positive has the loss 0, no gradient, and does not count in the mean; without a negative
    its loss is 0 by itself; the mean over none is 0. The loss is float32 (float64 for float64 features), computed so
    for float16 and bfloat16 features as well. Raises InputError on shapes, dtypes or devices that disagree.
    """
    scale = _inputs(image, text, logit_scale)
    image_ids, text_ids, weights = _positives(image, text, offset, positives)
    if direction not in ("both", "image", "text"):
        raise InputError(f"direction must be both, image or text, got {direction!r}")
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction must be mean, sum or none, got {reduction!r}")
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (image, text, scale))
    found = torch.ops.cmr_fast.infonce(
        image, text, scale, image_ids, text_ids, weights, offset, direction != "text", direction != "image",
        _rows_to_keep(image, text) if needs_gradient else 0, backend, threads,
    )  # fmt: skip
    losses, stats = found[:2], found[2:4]
    if reduction == "none":
        return losses[0], losses[1]
    total = losses[0].sum(dtype=torch.float64) * 0
    for loss, stat in zip(losses, stats, strict=True):
        part = loss.sum(dtype=torch.float64)
        total = total + (part / (stat[3] > 0).sum().clamp(min=1) if reduction == "mean" else part)
    total = (total / 2 if direction == "both" else total).to(scale.dtype)
    if isinstance(logit_bias, Tensor):
        total = total + 0 * logit_bias.sum().to(total.dtype)
    return total


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    offset: int | None = 0,
    positives: Positives = None,
    reduction: Literal["mean", "sum"] = "mean",
    backend: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """SigLIP's loss: softplus(-z_ij) of positives and softplus(z_ij) of all other pairs, summed; "mean" divides by n.

    z_ij = logit_scale * image_i . text_j + logit_bias. Arguments as for info_nce, but positives weigh 1 each, so
    float ones are refused; offset None: there are none (another rank's texts). The gradient is made in the same pass.
    """
    scale = _inputs(image, text, logit_scale)
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction must be mean or sum, got {reduction!r}")
    if offset is not None or positives is not None:
        image_ids, text_ids, mask = _positives(image, text, offset or 0, positives)
    else:
        image_ids = text_ids = mask = None
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"positives of the sigmoid loss must be ids or bool, got {mask.dtype}")
    each = 1.0 / max(1, len(image)) if reduction == "mean" else 1.0
    bias = _scalar(0.0 if logit_bias is None else logit_bias, image, "logit_bias")
    place = len(text) if offset is None else offset  # past the last column: no diagonal
    return _sigmoid(image, text, scale, bias, (image_ids, text_ids, mask), place, each, each, backend, threads)


def js_critic(
    image: Tensor,
    text: Tensor,
    *,
    marginals: Literal["all", "permutation"] = "all",
    backend: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """CMIMH's Jensen-Shannon bound (Eq. 5) from a separable critic, T_ij = image_i . text_j; at most 2 log 2.

        2 log 2 - mean over pairs of softplus(-T_ii) - mean over the product of marginals of softplus(T_ij)

    image, text    (B, d), B >= 2, row i of both from pair i
    marginals      "all": the B (B - 1) pairs i != j; "permutation": B of them, by a random cycle
    """
    scale = _inputs(image, text, 1.0)
    count = len(image)
    if image.shape != text.shape or count < 2:
        raise InputError(f"image and text must both be (B, d) with B >= 2, got {_shapes(image, text)}")
    if marginals not in ("all", "permutation"):
        raise InputError(f"marginals must be all or permutation, got {marginals!r}")
    if marginals == "all":
        none, bias = (None, None, None), torch.zeros_like(scale)
        total = _sigmoid(image, text, scale, bias, none, 0, 1 / count, 1 / (count * (count - 1)), backend, threads)
    else:
        cycle = torch.randperm(count, device=image.device)
        joint, apart = (image * text).sum(1), (image[cycle] * text[cycle.roll(1)]).sum(1)
        total = F.softplus(-joint).mean() + F.softplus(apart).mean()
    return 2 * math.log(2) - total


def _sigmoid(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: tuple[Tensor | None, ...], offset: int,
    positive: float, negative: float, backend: str | None, threads: int | None,
) -> Tensor:  # fmt: skip
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (image, text, scale, bias))
    return torch.ops.cmr_fast.sigmoid_pairs(
        image, text, scale, bias, *positives, offset, positive, negative, gradients, backend, threads
    )[0]


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(x.shape)) for x in tensors)


def _inputs(image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Refuse what does not fit; the scale as a tensor () in the dtype that the loss is computed in."""
    for x, name in ((image, "image"), (text, "text")):
        if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
            seen = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"{name} must be a floating-point tensor (N, d), got {seen}")
    if image.shape[1] != text.shape[1]:
        raise InputError(f"image and text must have one width, got {_shapes(image, text)}")
    if image.dtype != text.dtype or image.device != text.device:
        raise InputError(
            f"image and text must agree in dtype and device, got {image.dtype} on {image.device} and "
            f"{text.dtype} on {text.device}"
        )
    return _scalar(logit_scale, image, "logit_scale")


def _scalar(x: Tensor | float, like: Tensor, name: str) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if not isinstance(x, Tensor):
        return torch.full((), x, dtype=dtype, device=like.device)
    if x.numel() != 1 or not x.is_floating_point():
        raise InputError(f"{name} must be a number or a tensor of one float, got {x.dtype} {tuple(x.shape)}")
    if x.device != like.device:
        raise InputError(f"{name} must be on {like.device} as the features are, got {x.device}")
    return x.reshape(()).to(dtype)


def _positives(
    image: Tensor, text: Tensor, offset: int, positives: Positives
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> image_ids, text_ids, weights as the op takes them; all None is the diagonal."""
    n, m = len(image), len(text)
    if positives is None:
        if not isinstance(offset, int):
            raise InputError(f"offset must be an integer, got {offset!r}")
        if offset == 0 and n > m:
            raise InputError(f"each image needs its text: expected at least {n} texts, got {m} (or give positives)")
        if not 0 <= offset <= m - n:
            raise InputError(f"offset must be from 0 to {m - n}, so that each of {n} images has its text among {m}, "
                             f"got {offset}")  # fmt: skip
        return None, None, None
    if offset:
        raise InputError(f"offset is for one positive each: it must be 0 where positives are given, got {offset}")
    ids = positives if isinstance(positives, tuple) else (positives, positives)
    for x in ids:
        if not isinstance(x, Tensor) or x.device != image.device:
            seen = f"one on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"positives must be tensors on {image.device}, got {seen}")
    first, second = ids
    if isinstance(positives, tuple) or first.ndim == 1:
        if first.dtype != torch.int64 or second.dtype != torch.int64 or first.shape != (n,) or second.shape != (m,):
            raise InputError(
                f"ids of positives must be int64 ({n},) and ({m},), got {first.dtype} {tuple(first.shape)} and "
                f"{second.dtype} {tuple(second.shape)}"
            )
        return first, second, None
    if first.shape != (n, m) or not (first.dtype == torch.bool or first.is_floating_point()):
        raise InputError(f"positives must be bool or float ({n}, {m}), got {first.dtype} {tuple(first.shape)}")
    if first.dtype != torch.bool and first.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = first.aminmax() if first.numel() else (first.new_zeros(()), first.new_zeros(()))
        if not 0 <= float(low) <= float(high) < math.inf:
            raise InputError(f"weights of positives must be finite and 0 or more, got {float(low)} to {float(high)}")
    return None, None, first.detach()


def _rows_to_keep(image: Tensor, text: Tensor) -> int:
    """How many rows of similarities the forward pass of the cpp backend leaves to the backward pass."""
    if image.device.type != "cpu" or image.dtype not in _CPP_DTYPES or len(text) == 0:
        return 0
    rows = KEEP_BYTES // (len(text) * image.element_size())
    return len(image) if rows >= len(image) else rows // ROWS * ROWS


class _Pairs(NamedTuple):
    """Which pairs are positives."""

    image_ids: Tensor | None
    text_ids: Tensor | None
    weights: Tensor | None
    offset: int

    def tile(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor | None:
        """(rows, columns) contiguous; None for a diagonal."""
        if self.weights is not None:
            return self.weights[rows, columns].to(dtype).contiguous()
        if self.image_ids is not None and self.text_ids is not None:
            return (self.image_ids[rows, None] == self.text_ids[columns]).to(dtype)
        return None

    def dense(self, rows: slice, columns: slice, like: Tensor) -> Tensor:
        """The same, a diagonal written out."""
        found = self.tile(rows, columns, like.dtype)
        if found is None:
            row, column = (torch.arange(x.start, x.stop, device=like.device) for x in (rows, columns))
            found = (row[:, None] + self.offset == column).to(like.dtype)
        return found


# Rows of the statistics (4, N) of one direction, `sum` as its logarithm once the forward pass is over.
# max, sum of exp(z - max), sum of weight * z, sum of weight


def _losses(stats: Tensor) -> Tensor:
    most, logsum, positive, weight = stats
    return torch.where(weight > 0, (most - positive / weight) + logsum, 0.0)


def _coefficients(gradient: Tensor, stats: Tensor) -> Tensor:
    """(4, N): max, logsum, and what the softmax and the weights of a row are multiplied by in the gradient."""
    most, logsum, _, weight = stats
    gradient = torch.where(weight > 0, gradient, 0.0)
    return torch.stack([most, logsum, gradient, gradient / torch.where(weight > 0, weight, 1.0)])


def _infonce(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    weights: Tensor | None,
    offset: int,
    rows: bool,
    columns: bool,
    keep: int,
    backend: str | None,
    threads: int | None,
) -> tuple[Tensor, ...]:
    """-> losses of rows (n,) and of columns (m,), their statistics (4, n) and (4, m), kept similarities.

    Lenient where the public function is not: the diagonal i + offset may lie partly or wholly outside.
    """
    _dispatch.check_finite(image=image, text=text, logit_scale=scale, positives=weights)
    *_, row_stats, column_stats, kept = _infonce_outputs(image, text, scale, rows, columns, keep)
    for stats in (row_stats, column_stats):
        stats.zero_()
        stats[0] = -math.inf
    pairs = _Pairs(image_ids, text_ids, weights, offset)
    if len(image) and len(text):
        chosen = _dispatch.choose_backend("infonce", image.device.type, backend, _unfit(image, pairs))
        forward = {"cpp": _cpp_forward, "torch": _torch_forward}.get(chosen) or _triton().forward
        with torch.autocast(image.device.type, enabled=False):
            forward(image.detach(), text.detach(), scale, pairs, row_stats, column_stats, kept, threads)
    for stats in (row_stats, column_stats):
        stats[1].log_()
    return _losses(row_stats), _losses(column_stats), row_stats, column_stats, kept


def _infonce_backward(
    row_gradient: Tensor,
    column_gradient: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    weights: Tensor | None,
    offset: int,
    row_stats: Tensor,
    column_stats: Tensor,
    kept: Tensor,
    backend: str | None,
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of image, text and scale. The statistics may be those of a larger batch than these rows, columns."""
    directions = _coefficients(row_gradient, row_stats), _coefficients(column_gradient, column_stats)
    if not len(image) or not len(text):
        return torch.zeros_like(image), torch.zeros_like(text), torch.zeros_like(scale)
    pairs = _Pairs(image_ids, text_ids, weights, offset)
    chosen = _dispatch.choose_backend("infonce", image.device.type, backend, _unfit(image, pairs))
    backward = {"cpp": _cpp_backward, "torch": _torch_backward}.get(chosen) or _triton().backward
    with torch.autocast(image.device.type, enabled=False):
        return backward(image.detach(), text.detach(), scale, pairs, *directions, kept, threads)


def _sigmoid_pairs(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    mask: Tensor | None,
    offset: int,
    positive: float,
    negative: float,
    gradients: bool,
    backend: str | None,
    threads: int | None,
) -> tuple[Tensor, ...]:
    """-> loss (), and where `gradients` its gradients with respect to image, text, scale, bias (else empty).

    positive * sum over positives of softplus(-z) + negative * sum over the others of softplus(z)
    """
    _dispatch.check_finite(image=image, text=text, logit_scale=scale, logit_bias=bias)
    pairs = _Pairs(image_ids, text_ids, mask, offset)
    if not len(image) or not len(text):
        outputs = _sigmoid_outputs(image, text, scale, bias, gradients)
        return tuple(x.zero_() for x in outputs)
    chosen = _dispatch.choose_backend("sigmoid_pairs", image.device.type, backend, _unfit(image, pairs))
    run = {"cpp": _cpp_sigmoid, "torch": _torch_sigmoid}.get(chosen) or _triton().sigmoid
    with torch.autocast(image.device.type, enabled=False):
        return run(image.detach(), text.detach(), scale, bias, pairs, (positive, negative), gradients, threads)


def _triton() -> Any:
    from cmr_fast.ops.triton import infonce as kernels

    return kernels


def _unfit(image: Tensor, pairs: _Pairs) -> dict[str, str]:
    reasons = {}
    if image.dtype not in _CPP_DTYPES:
        reasons["cpp"] = f"it computes on float32 and bfloat16, the features are {image.dtype}"
    if image.dtype not in (*_CPP_DTYPES, torch.float16):
        reasons["triton"] = f"it computes on float32, bfloat16 and float16, the features are {image.dtype}"
    elif pairs.image_ids is not None or pairs.weights is not None:
        reasons["triton"] = "it takes one positive per image, by offset, not ids or weights of positives"
    elif image.shape[1] == 0:
        reasons["triton"] = "the features have no width"
    return reasons


# The cpp backend: torch's products and a native epilogue, tile by tile.


@functools.cache
def _workers(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads whose products use one processor each. They are of this process: a fork does not keep them."""
    outside, all_there = torch.get_num_threads(), threading.Barrier(threads)

    def use_one_processor() -> None:
        torch.get_num_threads()  # the first question of a thread sets it to the global number: not after ours
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, "cmr_fast", use_one_processor)
    list(pool.map(lambda _: all_there.wait(), range(threads)))
    torch.set_num_threads(outside)
    return pool


class _Panels:
    """Panels of rows, each walked along its tiles, several at a time; panel i never passes panel i - 1 in `turn`."""

    def __init__(self, n: int, m: int, threads: int | None) -> None:
        self.rows = [slice(i, min(n, i + ROWS)) for i in range(0, n, ROWS)]
        self.columns = [slice(i, min(m, i + COLUMNS)) for i in range(0, m, COLUMNS)]
        self.threads = min(_dispatch.choose_threads(threads), len(self.rows))
        self.done = [0] * len(self.rows)
        self.changed = threading.Condition()
        self.failed = False

    @contextmanager
    def turn(self, panel: int, tile: int) -> Iterator[None]:
        """Run the body after that of the panel before for the same tile."""
        if panel and self.done[panel - 1] <= tile:
            with self.changed:
                self.changed.wait_for(lambda: self.failed or self.done[panel - 1] > tile)
            if self.failed:
                raise RuntimeError("another panel failed")
        yield
        with self.changed:
            self.done[panel] = tile + 1
            self.changed.notify_all()

    def run(self, body: Callable[[int, int], None]) -> None:
        """body(panel, slot), slot < threads; raises what the first body to fail raises."""
        panels = itertools.count()

        def work(slot: int) -> None:
            with torch.no_grad():
                while (panel := next(panels)) < len(self.rows):
                    try:
                        body(panel, slot)
                    except BaseException:
                        with self.changed:
                            self.failed = True
                            self.changed.notify_all()
                        raise

        pool = _workers(self.threads, os.getpid())
        for future in [pool.submit(work, slot) for slot in range(self.threads)]:
            future.result()


class _Tiles:
    """What the native passes share: contiguous features, a tile and scratch for each thread, the native arguments."""

    def __init__(
        self, image: Tensor, text: Tensor, scale: Tensor, pairs: _Pairs, kept: Tensor, panels: _Panels
    ) -> None:
        self.image, self.text = image.contiguous(), text.contiguous()
        self.scale, self.pairs, self.kept, self.panels = float(scale), pairs, kept, panels
        self.native, self.isa = _dispatch.native(), _dispatch.choose_isa()
        self.bf16 = image.dtype == torch.bfloat16
        rows, columns = min(ROWS, len(image)), min(COLUMNS, len(text))
        self.buffers = image.new_empty((panels.threads, rows * columns))
        self.scratch = torch.empty((panels.threads, 2 * (columns + 15)), dtype=torch.float32)

    def similarities(self, panel: int, tile: int, slot: int, again: bool = False) -> tuple[Tensor, Tensor]:
        """(rows, columns) products, kept ones as they are, and a tensor of that shape for the gradient."""
        rows, columns = self.panels.rows[panel], self.panels.columns[tile]
        height, width, m = rows.stop - rows.start, columns.stop - columns.start, len(self.text)
        own = self.buffers[slot, : height * width].view(height, width)
        if rows.stop * m <= len(self.kept):
            start = rows.start * m + columns.start * height
            s = self.kept[start : start + height * width].view(height, width)
            if again:
                return s, own
        else:
            s = own
        torch.mm(self.image[rows], self.text[columns].T, out=s)
        return s, own

    def described(self, s: Tensor, panel: int, tile: int) -> tuple[tuple[int | bool, ...], Tensor | None]:
        """The tile as the native code takes it, and the weights that it points to."""
        rows, columns = self.panels.rows[panel], self.panels.columns[tile]
        weights = self.pairs.tile(rows, columns, torch.float32)
        return (
            s.data_ptr(), self.bf16, *s.shape, 0 if weights is None else weights.data_ptr(),
            rows.start + self.pairs.offset - columns.start,
        ), weights  # fmt: skip


def _pointers(arrays: Tensor, part: slice) -> list[int]:
    """Addresses of the four rows of (4, N) from part.start on; zeros where N is 0, a direction not asked for."""
    if not arrays.shape[1]:
        return [0] * 4
    return [arrays.data_ptr() + arrays.element_size() * (i * arrays.shape[1] + part.start) for i in range(4)]


def _cpp_forward(
    image: Tensor, text: Tensor, scale: Tensor, pairs: _Pairs, row_stats: Tensor, column_stats: Tensor, kept: Tensor,
    threads: int | None,
) -> None:  # fmt: skip
    panels = _Panels(len(image), len(text), threads)
    tiles = _Tiles(image, text, scale, pairs, kept, panels)

    def body(panel: int, slot: int) -> None:
        for tile, columns in enumerate(panels.columns):
            s, _ = tiles.similarities(panel, tile, slot)
            arguments, _weights = tiles.described(s, panel, tile)
            with panels.turn(panel, tile):
                tiles.native.infonce_forward(
                    tiles.isa, arguments, tiles.scale, _pointers(row_stats, panels.rows[panel]),
                    _pointers(column_stats, columns), tiles.scratch[slot].data_ptr(),
                )  # fmt: skip

    panels.run(body)


class _Gradients:
    """Gradients of the products' sides from tiles of the logits' gradient; those of text are summed up in order."""

    def __init__(self, tiles: _Tiles) -> None:
        self.tiles, self.panels = tiles, tiles.panels
        self.image = torch.empty_like(tiles.image)
        self.text = torch.zeros(tiles.text.shape, dtype=torch.float32)
        self.dots = [0.0] * len(self.panels.rows)
        self.sums = torch.empty((self.panels.threads, min(ROWS, len(self.image)), self.image.shape[1]))

    def panel(self, panel: int, slot: int, gradient: Callable[[int], Tensor]) -> None:
        """Add panel's tiles, whose gradient is gradient(tile)."""
        rows = self.panels.rows[panel]
        x, own = self.tiles.image[rows], self.sums[slot, : rows.stop - rows.start].zero_()
        for tile, columns in enumerate(self.panels.columns):
            g = gradient(tile)
            y, other = self.tiles.text[columns], self.text[columns]
            if self.tiles.bf16:
                own += g @ y
                part = g.T @ x
                with self.panels.turn(panel, tile):
                    other += part
            else:
                own.addmm_(g, y)
                with self.panels.turn(panel, tile):
                    other.addmm_(g.T, x)
        self.dots[panel] = float((own * x).sum(1).sum(dtype=torch.float64))
        torch.mul(own, self.tiles.scale, out=self.image[rows]) if not self.tiles.bf16 else self.image[rows].copy_(
            own.mul_(self.tiles.scale)
        )

    def result(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image, self.text.mul_(self.tiles.scale).to(self.image.dtype), scale.new_tensor(sum(self.dots))


def _cpp_backward(
    image: Tensor, text: Tensor, scale: Tensor, pairs: _Pairs, row_arrays: Tensor, column_arrays: Tensor, kept: Tensor,
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    panels = _Panels(len(image), len(text), threads)
    tiles = _Tiles(image, text, scale, pairs, kept, panels)
    gradients = _Gradients(tiles)

    def body(panel: int, slot: int) -> None:
        def gradient(tile: int) -> Tensor:
            s, out = tiles.similarities(panel, tile, slot, again=True)
            arguments, _weights = tiles.described(s, panel, tile)
            tiles.native.infonce_gradient(
                tiles.isa, arguments, tiles.scale, _pointers(row_arrays, panels.rows[panel]),
                _pointers(column_arrays, panels.columns[tile]), out.data_ptr(),
            )  # fmt: skip
            return out

        gradients.panel(panel, slot, gradient)

    panels.run(body)
    return gradients.result(scale)


def _cpp_sigmoid(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairs: _Pairs, each: tuple[float, float],
    wants_gradients: bool, threads: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    panels = _Panels(len(image), len(text), threads)
    tiles = _Tiles(image, text, scale, pairs, image.new_empty(0), panels)
    gradients = _Gradients(tiles) if wants_gradients else None
    sums = torch.zeros((len(panels.rows), len(panels.columns), 3), dtype=torch.float64)
    shift = float(bias)

    def body(panel: int, slot: int) -> None:
        def gradient(tile: int) -> Tensor:
            s, out = tiles.similarities(panel, tile, slot)
            arguments, _weights = tiles.described(s, panel, tile)
            tiles.native.infonce_sigmoid(
                tiles.isa, arguments, tiles.scale, shift, *each, sums[panel, tile].data_ptr(),
                0 if gradients is None else out.data_ptr(),
            )  # fmt: skip
            return out

        if gradients is not None:
            gradients.panel(panel, slot, gradient)
        else:
            for tile in range(len(panels.columns)):
                gradient(tile)

    panels.run(body)
    positive, negative, slope = (math.fsum(x) for x in sums.flatten(0, 1).T.tolist())
    loss = scale.new_tensor(each[0] * positive + each[1] * negative)
    if gradients is None:
        return loss, *_sigmoid_outputs(image, text, scale, bias, False)[1:]
    return loss, *gradients.result(scale), bias.new_tensor(slope)


# The portable path: blocks of whole rows, in float32 at least.


def _torch_blocks(image: Tensor, text: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """rows, their features, all of the other side, (rows, m) scaled products."""
    height = max(1, TORCH_PAIRS // len(text))
    y = text.to(scale.dtype)
    for start in range(0, len(image), height):
        rows = slice(start, min(len(image), start + height))
        x = image[rows].to(scale.dtype)
        yield rows, x, y, (x @ y.T) * scale


def _torch_forward(
    image: Tensor, text: Tensor, scale: Tensor, pairs: _Pairs, row_stats: Tensor, column_stats: Tensor, kept: Tensor,
    threads: int | None,
) -> None:  # fmt: skip
    kept.zero_()  # this path computes everything again
    columns = slice(0, len(text))
    for rows, _, _, z in _torch_blocks(image, text, scale):
        weights = pairs.dense(rows, columns, z)
        pulled = torch.where(weights != 0, weights * z, 0.0)
        for stats, dim in ((row_stats[:, rows], 1), (column_stats, 0)):
            if not stats.shape[1]:
                continue
            most = torch.maximum(stats[0], z.amax(dim))
            stats[1] = stats[1] * (stats[0] - most).exp() + (z - most.unsqueeze(dim)).exp().sum(dim)
            stats[0] = most
            stats[2] += pulled.sum(dim)
            stats[3] += weights.sum(dim)


def _torch_backward(
    image: Tensor, text: Tensor, scale: Tensor, pairs: _Pairs, row_arrays: Tensor, column_arrays: Tensor, kept: Tensor,
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    columns = slice(0, len(text))

    def gradient(rows: slice, z: Tensor) -> Tensor:
        g = -pairs.dense(rows, columns, z)
        pulls = z.new_zeros(())
        softmax = torch.zeros_like(z)
        for arrays, dim in ((row_arrays[:, rows], 1), (column_arrays, 0)):
            if arrays.shape[1]:
                most, logsum, grad, pull = arrays.unsqueeze(dim + 1)
                softmax += grad * (z - most - logsum).exp()
                pulls = pulls + pull
        return softmax + g * pulls

    return _torch_gradients(image, text, scale, gradient)


def _torch_gradients(
    image: Tensor, text: Tensor, scale: Tensor, gradient: Callable[[slice, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    of_image, of_text = torch.empty_like(image), torch.zeros(text.shape, dtype=scale.dtype, device=text.device)
    of_scale = torch.zeros((), dtype=torch.float64, device=scale.device)
    for rows, x, y, z in _torch_blocks(image, text, scale):
        g = gradient(rows, z)
        own = g @ y
        of_text += g.T @ x
        of_scale += (own * x).sum(dtype=torch.float64)
        of_image[rows] = own * scale
    return of_image, (of_text * scale).to(text.dtype), of_scale.to(scale.dtype)


def _torch_sigmoid(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairs: _Pairs, each: tuple[float, float],
    wants_gradients: bool, threads: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    columns = slice(0, len(text))
    loss, slope = (torch.zeros((), dtype=torch.float64, device=scale.device) for _ in range(2))

    def gradient(rows: slice, z: Tensor) -> Tensor:
        positive = pairs.dense(rows, columns, z) != 0
        x = torch.where(positive, -z - bias, z + bias)
        of_positive, of_negative = z.new_tensor(each)
        weight = torch.where(positive, of_positive, of_negative)
        loss.add_((weight * F.softplus(x)).sum(dtype=torch.float64))
        g = torch.where(positive, -weight, weight) * x.sigmoid()
        slope.add_(g.sum(dtype=torch.float64))
        return g

    if not wants_gradients:
        for rows, _, _, z in _torch_blocks(image, text, scale):
            gradient(rows, z)
        return loss.to(scale.dtype), *_sigmoid_outputs(image, text, scale, bias, False)[1:]
    found = _torch_gradients(image, text, scale, gradient)
    return loss.to(scale.dtype), *found, slope.to(bias.dtype)


def _infonce_outputs(
    image: Tensor, text: Tensor, scale: Tensor, rows: bool, columns: bool, keep: int
) -> tuple[Tensor, ...]:
    n, m = image.shape[0] if rows else 0, text.shape[0] if columns else 0
    return (
        scale.new_empty(n), scale.new_empty(m), scale.new_empty((4, n)), scale.new_empty((4, m)),
        image.new_empty(keep * text.shape[0]),
    )  # fmt: skip


def _sigmoid_outputs(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of = [torch.empty_like(x) if gradients else x.new_empty(0) for x in (image, text, scale, bias)]
    return scale.new_empty(()), of[0], of[1], of[2], of[3]


register(
    "infonce(Tensor image, Tensor text, Tensor scale, Tensor? image_ids, Tensor? text_ids, Tensor? weights, "
    "int offset, bool rows, bool columns, int keep, str? backend, int? threads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _infonce,
    lambda image, text, scale, image_ids, text_ids, weights, offset, rows, columns, keep, backend, threads: (
        _infonce_outputs(image, text, scale, rows, columns, keep)
    ),
)
register(
    "infonce_backward(Tensor row_gradient, Tensor column_gradient, Tensor image, Tensor text, Tensor scale, "
    "Tensor? image_ids, Tensor? text_ids, Tensor? weights, int offset, Tensor row_stats, Tensor column_stats, "
    "Tensor kept, str? backend, int? threads) -> (Tensor, Tensor, Tensor)",
    _infonce_backward,
    lambda row_gradient, column_gradient, image, text, scale, *rest: (
        torch.empty_like(image, memory_format=torch.contiguous_format),
        torch.empty_like(text, memory_format=torch.contiguous_format),
        torch.empty_like(scale),
    ),
)
register(
    "sigmoid_pairs(Tensor image, Tensor text, Tensor scale, Tensor bias, Tensor? image_ids, Tensor? text_ids, "
    "Tensor? mask, int offset, float positive, float negative, bool gradients, str? backend, int? threads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sigmoid_pairs,
    lambda image, text, scale, bias, image_ids, text_ids, mask, offset, positive, negative, gradients, *rest: (
        _sigmoid_outputs(image, text, scale, bias, gradients)
    ),
)


def _refuse_twice(ctx: Any, *_: Tensor) -> None:
    raise InputError("this loss can be differentiated once, got a second derivative")


def _infonce_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    image, text, scale, image_ids, text_ids, weights, ctx.offset, _, _, _, ctx.backend, ctx.threads = inputs
    ctx.save_for_backward(image, text, scale, image_ids, text_ids, weights, *output[2:])
    ctx.set_materialize_grads(False)


def _infonce_gradient(ctx: Any, of_rows: Tensor | None, of_columns: Tensor | None, *_: Any) -> tuple[Any, ...]:
    image, text, scale, image_ids, text_ids, weights, row_stats, column_stats, kept = ctx.saved_tensors
    of_rows = torch.zeros_like(row_stats[0]) if of_rows is None else of_rows
    of_columns = torch.zeros_like(column_stats[0]) if of_columns is None else of_columns
    found = torch.ops.cmr_fast.infonce_backward(
        of_rows, of_columns, image, text, scale, image_ids, text_ids, weights, ctx.offset, row_stats, column_stats,
        kept, ctx.backend, ctx.threads,
    )  # fmt: skip
    return *found, *[None] * 9


def _sigmoid_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.gradients = inputs[10]


def _sigmoid_gradient(ctx: Any, of_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    if not ctx.gradients:
        raise RuntimeError("cmr_fast::sigmoid_pairs was called with gradients=False")
    found = [of_loss * x if x.ndim == 0 else of_loss.to(x.dtype) * x for x in ctx.saved_tensors]
    if torch.is_grad_enabled():  # create_graph: what was saved knows nothing of the inputs
        found = [_Once.apply(x) for x in found]
    return *found, *[None] * 9


class _Once(torch.autograd.Function):
    """x, whose gradient is refused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        _refuse_twice(ctx)


torch.library.register_autograd("cmr_fast::infonce", _infonce_gradient, setup_context=_infonce_context, lib=LIBRARY)
torch.library.register_autograd("cmr_fast::infonce_backward", _refuse_twice, lib=LIBRARY)
torch.library.register_autograd(
    "cmr_fast::sigmoid_pairs", _sigmoid_gradient, setup_context=_sigmoid_context, lib=LIBRARY
)
