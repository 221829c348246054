"""The tiles of ops/info_nce.py: the passes of its cpp and torch backends over every pair of a batch.

cpp      torch multiplies a tile, the native epilogue takes from it what rows and columns need or turns it into the
         gradient in place, and torch multiplies that. Panels of rows are shared out to threads; tiles of a column are
         added in the order of their panels, so results depend on no number of threads
torch    blocks of whole rows, in float32 at least
"""

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cmr_fast.ops import _dispatch

ROWS, COLUMNS = 512, 1024  # of a tile
KEEP_BYTES = 64 << 20  # of similarities that wait for the backward pass
TORCH_PAIRS = 1 << 22  # of a block of the portable path
CPP_DTYPES = (torch.float32, torch.bfloat16)


def info_nce_outputs(
    image: Tensor, text: Tensor, scale: Tensor, rows: bool, columns: bool, keep: int
) -> tuple[Tensor, ...]:
    n, m = image.shape[0] if rows else 0, text.shape[0] if columns else 0
    return (
        scale.new_empty(n), scale.new_empty(m), scale.new_empty((4, n)), scale.new_empty((4, m)),
        image.new_empty(keep * text.shape[0]),
    )  # fmt: skip


def sigmoid_outputs(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of = [x.new_empty(x.shape if gradients else 0) for x in (image, text, scale, bias)]
    return scale.new_empty(()), of[0], of[1], of[2], of[3]


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) with all digits: torch's own is x from 20 on, which costs float64 half of them."""
    return -F.logsigmoid(-x)


def rows_to_keep(image: Tensor, text: Tensor) -> int:
    """How many rows of similarities the forward pass of the cpp backend leaves to the backward pass."""
    if image.device.type != "cpu" or image.dtype not in CPP_DTYPES or len(text) == 0:
        return 0
    rows = KEEP_BYTES // (len(text) * image.element_size())
    return len(image) if rows >= len(image) else rows // ROWS * ROWS


class Pairs(NamedTuple):
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
        weights = self.tile(rows, columns, like.dtype)
        if weights is None:
            row, column = (
                torch.arange(x.start, x.stop, dtype=torch.int64, device=like.device) for x in (rows, columns)
            )
            weights = (row[:, None] + self.offset == column).to(like.dtype)
        return weights


class _Workers:
    """Threads whose products use one processor each: one pool in a process, as large as the largest call asked for."""

    def __init__(self) -> None:
        self.forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """A fork keeps neither the threads nor who held the lock."""
        self.lock, self.size = threading.Lock(), 0
        self.pool: ThreadPoolExecutor | None = None

    def start(self, work: Callable[[int], None], count: int) -> list[Future[None]]:
        """work(0) to work(count - 1), each on a thread of its own unless other calls have them all."""
        with self.lock:  # no pool is shut down between its choice and the last submit
            if self.pool is None or self.size < count:
                if self.pool is not None:
                    self.pool.shutdown(wait=False)  # what it was given, it does
                self.pool, self.size = self._made(count), count
            return [self.pool.submit(work, slot) for slot in range(count)]

    @staticmethod
    def _made(count: int) -> ThreadPoolExecutor:
        outside, all_there = torch.get_num_threads(), threading.Barrier(count)

        def use_one_processor() -> None:
            torch.get_num_threads()  # the first question of a thread sets it to the global number: not after ours
            torch.set_num_threads(1)

        pool = ThreadPoolExecutor(count, "cmr_fast", use_one_processor)
        list(pool.map(lambda _: all_there.wait(), range(count)))
        torch.set_num_threads(outside)
        return pool


_workers = _Workers()


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
        inference = torch.is_inference_mode_enabled()  # of this thread alone; tensors made here are written to there

        def work(slot: int) -> None:
            with torch.inference_mode(inference), torch.no_grad():
                while (panel := next(panels)) < len(self.rows):
                    try:
                        body(panel, slot)
                    except BaseException:
                        with self.changed:
                            self.failed = True
                            self.changed.notify_all()
                        raise

        for future in _workers.start(work, self.threads):
            future.result()


class _Tiles:
    """What the native passes share: contiguous features, a tile and scratch for each thread, the native arguments."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, pairs: Pairs, kept: Tensor, panels: _Panels) -> None:
        self.image, self.text = image.contiguous(), text.contiguous()
        self.scale, self.pairs, self.kept, self.panels = float(scale), pairs, kept, panels
        self.native, self.isa = _dispatch.native(), _dispatch.choose_isa()
        self.bf16 = image.dtype == torch.bfloat16
        rows, columns = min(ROWS, len(image)), min(COLUMNS, len(text))
        self.buffers = image.new_empty((panels.threads, rows * columns))
        scratch = self.native.infonce_scratch(columns)
        self.scratch = torch.empty((panels.threads, scratch), dtype=torch.uint8, device=image.device)

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


def cpp_forward(
    image: Tensor, text: Tensor, scale: Tensor, pairs: Pairs, row_stats: Tensor, column_stats: Tensor, kept: Tensor,
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
        self.text = torch.zeros(tiles.text.shape, dtype=torch.float32, device=tiles.text.device)
        self.dots = [0.0] * len(self.panels.rows)
        shape = (self.panels.threads, min(ROWS, len(self.image)), self.image.shape[1])
        self.sums = torch.empty(shape, dtype=torch.float32, device=self.image.device)

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


def cpp_backward(
    image: Tensor, text: Tensor, scale: Tensor, pairs: Pairs, row_arrays: Tensor, column_arrays: Tensor, kept: Tensor,
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


def cpp_sigmoid(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, each: tuple[float, float],
    wants_gradients: bool, threads: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    panels = _Panels(len(image), len(text), threads)
    tiles = _Tiles(image, text, scale, pairs, image.new_empty(0), panels)
    gradients = _Gradients(tiles) if wants_gradients else None
    sums = torch.zeros((len(panels.rows), len(panels.columns), 3), dtype=torch.float64, device="cpu")
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
        return loss, *sigmoid_outputs(image, text, scale, bias, False)[1:]
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


def torch_forward(
    image: Tensor, text: Tensor, scale: Tensor, pairs: Pairs, row_stats: Tensor, column_stats: Tensor, kept: Tensor,
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


def torch_backward(
    image: Tensor, text: Tensor, scale: Tensor, pairs: Pairs, row_arrays: Tensor, column_arrays: Tensor, kept: Tensor,
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
    of_image = image.new_empty(image.shape)
    of_text = torch.zeros(text.shape, dtype=scale.dtype, device=text.device)
    of_scale = torch.zeros((), dtype=torch.float64, device=scale.device)
    for rows, x, y, z in _torch_blocks(image, text, scale):
        g = gradient(rows, z)
        own = g @ y
        of_text += g.T @ x
        of_scale += (own * x).sum(dtype=torch.float64)
        of_image[rows] = own * scale
    return of_image, (of_text * scale).to(text.dtype), of_scale.to(scale.dtype)


def torch_sigmoid(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, each: tuple[float, float],
    wants_gradients: bool, threads: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    columns = slice(0, len(text))
    loss, slope = (torch.zeros((), dtype=torch.float64, device=scale.device) for _ in range(2))

    def gradient(rows: slice, z: Tensor) -> Tensor:
        positive = pairs.dense(rows, columns, z) != 0
        x = torch.where(positive, -z - bias, z + bias)
        of_positive, of_negative = z.new_tensor(each)
        weight = torch.where(positive, of_positive, of_negative)
        loss.add_((weight * softplus(x)).sum(dtype=torch.float64))
        g = torch.where(positive, -weight, weight) * x.sigmoid()
        slope.add_(g.sum(dtype=torch.float64))
        return g

    if not wants_gradients:
        for rows, _, _, z in _torch_blocks(image, text, scale):
            gradient(rows, z)
        return loss.to(scale.dtype), *sigmoid_outputs(image, text, scale, bias, False)[1:]
    gradients = _torch_gradients(image, text, scale, gradient)
    return loss.to(scale.dtype), *gradients, slope.to(bias.dtype)
