"""InfoNCE and the sigmoid loss on a GPU, in two forms; ops/info_nce.py says what they compute.

    z_ij  = scale * image_i . text_j
    dS_ij = g_i exp(z_ij - lse_i) + g'_j exp(z_ij - lse'_j) - [j = i + offset] (pull_i + pull'_j)
    d_image = scale * dS @ text,  d_text = scale * dS^T @ image,  d_scale = sum_i image_i . (dS @ text)_i

"onepass"  no product leaves the chip. Forward: a program walks a part of rows x a part of columns; a row's max and sum
           of exponentials stay in registers along it, a column's in that program's own partials, O(N) in all.
           Backward: one kernel run for either side, which multiplies a tile again and adds dS @ other in registers.
           1 + 4 products of N^2 D, more where d is wider than the SLICE that registers hold: 4 is then 2 + 2 d / SLICE.
"chunked"  torch (cuBLAS) multiplies a chunk of rows into CHUNK_BYTES; the kernels read it once for the statistics, or
           turn it into dS in place; torch multiplies that with either side. 1 + 3 products of N^2 D.

Bound: the products, at the tensor cores' rate for 16-bit features; of "chunked" also 2 + 4 passes over N^2 numbers.
Deterministic: every partial has one writer, and partials are added in one order. The products of "chunked" are rounded
to the dtype of the features, as those of eager torch are; "onepass" keeps float32. dS is divided by its largest factor
before it is rounded, so that float16 holds it. float32 products are TF32 where torch.backends.cuda.matmul.allow_tf32.
Not measured on a GPU yet: the block sizes and the rule in `form` are estimates.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmr_fast.errors import InputError

FORMS = ("onepass", "chunked")
CHUNK_BYTES = 256 << 20  # of products in the chunked form
BLOCK = 64  # rows and columns of a tile
PARTS = {"onepass": (16, 16), "chunked": (16, 64)}  # of rows and of columns, one program each


def form(d: int) -> str:
    """CMR_FAST_INFONCE_FORM, else "chunked" from 512 features on, where a gradient tile leaves the registers."""
    forced = os.environ.get("CMR_FAST_INFONCE_FORM") or None
    if forced is None:
        return "chunked" if d >= 512 else "onepass"
    if forced not in FORMS:
        raise InputError(f"CMR_FAST_INFONCE_FORM must be {' or '.join(FORMS)}, got {forced!r}")
    return forced


@triton.jit
def _products(
    image, text, products, rows, columns, n, m, d, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) float32, read from `products` (n, m) where GIVEN; 0 outside."""
    left, right = rows.to(tl.int64), columns.to(tl.int64)
    if GIVEN:
        inside = (rows < n)[:, None] & (columns < m)[None, :]
        s = tl.load(products + left[:, None] * m + right[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        s = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, d, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            a = tl.load(image + left[:, None] * d + k[None, :], mask=(rows < n)[:, None] & (k < d)[None, :], other=0.0)
            b = tl.load(
                text + right[None, :] * d + k[:, None], mask=(columns < m)[None, :] & (k < d)[:, None], other=0.0
            )
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            s = tl.dot(a, b, s, input_precision=PRECISION)
    return s


@triton.jit
def _stats(
    image, text, products, scale, n, m, d, offset, row_parts, column_parts, diagonal, rows_each, columns_each,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Max and sum of exponentials of a part: row_parts (parts of columns, 2, n), column_parts (parts of rows, 2, m)."""
    row_part, column_part = tl.program_id(0), tl.program_id(1)
    factor = tl.load(scale)
    of_rows = row_parts + column_part.to(tl.int64) * 2 * n
    of_columns = column_parts + row_part.to(tl.int64) * 2 * m
    first_row, first_column = row_part * rows_each, column_part * columns_each
    for row0 in range(first_row, min(n, first_row + rows_each), BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        most = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for column0 in range(first_column, min(m, first_column + columns_each), BLOCK_N):
            columns = column0 + tl.arange(0, BLOCK_N)
            s = _products(
                image, text, products, rows, columns, n, m, d, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, WIDEN, GIVEN
            )  # fmt: skip
            z = tl.where((rows < n)[:, None] & (columns < m)[None, :], s * factor, float("-inf"))

            more = tl.maximum(most, tl.max(z, 1))
            base = tl.where(more == float("-inf"), 0.0, more)  # a row outside
            total = total * tl.exp(most - base) + tl.sum(tl.exp(z - base[:, None]), 1)
            most = more

            seen = (columns < m) & (row0 > first_row)
            before = tl.load(of_columns + columns, mask=seen, other=float("-inf"))
            more_down = tl.maximum(before, tl.max(z, 0))
            base_down = tl.where(more_down == float("-inf"), 0.0, more_down)
            down = tl.load(of_columns + m + columns, mask=seen, other=0.0) * tl.exp(before - base_down)
            down += tl.sum(tl.exp(z - base_down[None, :]), 0)
            tl.debug_barrier()  # no thread writes what another has yet to read, nor reads what is not yet written
            tl.store(of_columns + columns, more_down, mask=columns < m)
            tl.store(of_columns + m + columns, down, mask=columns < m)
            tl.debug_barrier()

            if (row0 + offset < column0 + BLOCK_N) & (row0 + offset + BLOCK_M > column0):
                own = rows + offset
                here = (rows < n) & (own >= column0) & (own < column0 + BLOCK_N) & (own < m)
                positive = tl.sum(tl.where(own[:, None] == columns[None, :], z, 0.0), 1)
                tl.store(diagonal + rows, positive, mask=here)
        tl.store(of_rows + rows, most, mask=rows < n)
        tl.store(of_rows + n + rows, total, mask=rows < n)


@triton.jit
def _gradient(
    s, factor, rows, columns, n, m, offset, row_arrays, row_stride, column_arrays, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dS of a tile of products, 0 outside. Arrays hold max, logsum, g, pull, a stride apart."""
    z = s * factor
    g = tl.zeros_like(z)
    pull = tl.zeros_like(z)
    if ROWS:
        within = rows < n
        most = tl.load(row_arrays + rows, mask=within, other=0.0)
        logsum = tl.load(row_arrays + row_stride + rows, mask=within, other=0.0)
        up = tl.load(row_arrays + 2 * row_stride + rows, mask=within, other=0.0)
        g += up[:, None] * tl.exp(z - most[:, None] - logsum[:, None])
        pull += tl.load(row_arrays + 3 * row_stride + rows, mask=within, other=0.0)[:, None]
    if COLUMNS:
        within = columns < m
        most = tl.load(column_arrays + columns, mask=within, other=0.0)
        logsum = tl.load(column_arrays + column_stride + columns, mask=within, other=0.0)
        up = tl.load(column_arrays + 2 * column_stride + columns, mask=within, other=0.0)
        g += up[None, :] * tl.exp(z - most[None, :] - logsum[None, :])
        pull += tl.load(column_arrays + 3 * column_stride + columns, mask=within, other=0.0)[None, :]
    g -= tl.where((rows + offset)[:, None] == columns[None, :], pull, 0.0)
    return tl.where((rows < n)[:, None] & (columns < m)[None, :], g, 0.0)


@triton.jit
def _side(
    image, text, scale, unit, n, m, d, offset, row_arrays, column_arrays, of_image, dots,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The gradient of `image`, a slice of its features; dots (slices, n) are that slice's share of image_i . d_i."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    factor = tl.load(scale)
    own = tl.zeros((BLOCK_M, SLICE), dtype=tl.float32)
    for column0 in range(0, m, BLOCK_N):
        columns = column0 + tl.arange(0, BLOCK_N)
        s = _products(image, text, image, rows, columns, n, m, d, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, WIDEN, False)
        g = _gradient(s, factor, rows, columns, n, m, offset, row_arrays, n, column_arrays, m, ROWS, COLUMNS)
        inside = (columns < m)[:, None] & (features < d)[None, :]
        y = tl.load(text + columns.to(tl.int64)[:, None] * d + features[None, :], mask=inside, other=0.0)
        g = g.to(y.dtype)
        if WIDEN:
            g, y = g.to(tl.float32), y.to(tl.float32)
        own = tl.dot(g, y, own, input_precision=PRECISION)
    inside = (rows < n)[:, None] & (features < d)[None, :]
    place = rows.to(tl.int64)[:, None] * d + features[None, :]
    own *= tl.load(unit)
    x = tl.load(image + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dots + tl.program_id(1).to(tl.int64) * n + rows, tl.sum(own * x, 1), mask=rows < n)
    tl.store(of_image + place, (own * factor).to(of_image.dtype.element_ty), mask=inside)


@triton.jit
def _to_gradient(
    products, scale, n, m, offset, row_arrays, row_stride, column_arrays,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """products (n, m) become dS in place."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = rows.to(tl.int64)[:, None] * m + columns[None, :]
    inside = (rows < n)[:, None] & (columns < m)[None, :]
    s = tl.load(products + place, mask=inside, other=0.0).to(tl.float32)
    g = _gradient(
        s, tl.load(scale), rows, columns, n, m, offset, row_arrays, row_stride, column_arrays, m, ROWS, COLUMNS
    )  # fmt: skip
    tl.store(products + place, g.to(products.dtype.element_ty), mask=inside)


@triton.jit
def _to_sigmoid(
    products, scale, bias, n, m, offset, positive, negative, sums,
    GRADIENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The loss and the sum of dS of a tile to sums (tiles, 2); products (n, m) become dS in place where GRADIENT."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = rows.to(tl.int64)[:, None] * m + columns[None, :]
    inside = (rows < n)[:, None] & (columns < m)[None, :]
    z = tl.load(products + place, mask=inside, other=0.0).to(tl.float32) * tl.load(scale) + tl.load(bias)
    own = (rows + offset)[:, None] == columns[None, :]
    x = tl.where(own, -z, z)
    weight = tl.where(inside, tl.where(own, positive, negative), 0.0)
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))  # e may be far below eps
    g = weight * tl.where(x >= 0, 1.0, e) / u
    g = tl.where(own, -g, g)
    tile = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(sums + tile, tl.sum(tl.sum(weight * (tl.maximum(x, 0.0) + log1p), 1), 0))
    tl.store(sums + tile + 1, tl.sum(tl.sum(g, 1), 0))
    if GRADIENT:
        tl.store(products + place, g.to(products.dtype.element_ty), mask=inside)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _options(x: Tensor) -> dict[str, Any]:
    """Block sizes and the precision of products of features x."""
    tf32 = x.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return {
        "BLOCK_M": BLOCK, "BLOCK_N": BLOCK, "BLOCK_K": min(64, max(16, triton.next_power_of_2(x.shape[1]))),
        "PRECISION": "tf32" if tf32 else "ieee",
        "WIDEN": not x.is_cuda,  # the interpreter multiplies the bits of bfloat16 as integers (triton 3.8)
    }  # fmt: skip


def _chunks(image: Tensor, text: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """rows, their products (rows, m) in the dtype of the features. The memory is the same for every chunk."""
    m = len(text)
    height = min(len(image), max(BLOCK, CHUNK_BYTES // (m * image.element_size()) // BLOCK * BLOCK))
    memory = image.new_empty((height, m))
    for start in range(0, len(image), height):
        rows = slice(start, min(len(image), start + height))
        yield rows, torch.mm(image[rows], text.T, out=memory[: rows.stop - start])


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """In float32, which is how it is summed."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _merge(stats: Tensor, parts: Tensor) -> None:
    """Merge parts (P, 2, N) into the max and the sum of stats (4, N)."""
    most = torch.maximum(stats[0], parts[:, 0].amax(0))
    stats[1] = stats[1] * (stats[0] - most).exp() + (parts[:, 1] * (parts[:, 0] - most).exp()).sum(0)
    stats[0] = most


def _partial(
    image: Tensor, text: Tensor, scale: Tensor, products: Tensor | None, offset: int, diagonal: Tensor
) -> tuple[Tensor, Tensor]:
    n, m, d = len(image), len(text), image.shape[1]
    row_parts, column_parts = PARTS["onepass" if products is None else "chunked"]
    rows_each = BLOCK * _ceil(_ceil(n, BLOCK), row_parts)
    columns_each = BLOCK * _ceil(_ceil(m, BLOCK), column_parts)
    grid = _ceil(n, rows_each), _ceil(m, columns_each)  # none of them is empty
    of_rows, of_columns = scale.new_empty((grid[1], 2, n)), scale.new_empty((grid[0], 2, m))
    _stats[grid](
        image, text, image if products is None else products, scale, n, m, d, offset, of_rows, of_columns, diagonal,
        rows_each, columns_each, GIVEN=products is not None, **_options(image),
    )  # fmt: skip
    return of_rows, of_columns


def forward(
    image: Tensor, text: Tensor, scale: Tensor, pairs: Any, row_stats: Tensor, column_stats: Tensor, kept: Tensor,
    threads: int | None,
) -> None:  # fmt: skip
    """Fill the statistics of ops/info_nce.py, the sums not yet as their logarithms."""
    image, text = image.contiguous(), text.contiguous()
    n, m = len(image), len(text)
    offset = max(-n, min(m, pairs.offset))  # no diagonal is no diagonal, however far
    diagonal = scale.new_empty(n)
    whole = form(image.shape[1]) == "onepass"
    for rows, products in [(slice(0, n), None)] if whole else _chunks(image, text):
        of_rows, of_columns = _partial(image[rows], text, scale, products, offset + rows.start, diagonal[rows])
        if row_stats.shape[1]:
            _merge(row_stats[:, rows], of_rows)
        if column_stats.shape[1]:
            _merge(column_stats, of_columns)
    first, last = max(0, -offset), min(n, m - offset)
    if first < last:
        for stats, shift in ((row_stats, 0), (column_stats, offset)):
            if stats.shape[1]:
                stats[2, first + shift : last + shift] = diagonal[first:last]
                stats[3, first + shift : last + shift] = 1


def _in_units(row_arrays: Tensor, column_arrays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arrays with g and pull divided by the largest |g|, and that."""
    unit = torch.cat([row_arrays[2], column_arrays[2]]).abs().amax()
    unit = torch.where(unit > 0, unit, 1.0)
    rows, columns = (torch.cat([x[:2], x[2:] / unit]) for x in (row_arrays, column_arrays))
    return rows, columns, unit


def backward(
    image: Tensor, text: Tensor, scale: Tensor, pairs: Any, row_arrays: Tensor, column_arrays: Tensor, kept: Tensor,
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of image, text and scale, from arrays of max, logsum, g, pull."""
    image, text = image.contiguous(), text.contiguous()
    n, m, d = len(image), len(text), image.shape[1]
    offset = max(-n, min(m, pairs.offset))
    row_arrays, column_arrays, unit = _in_units(row_arrays, column_arrays)
    sides = {"ROWS": row_arrays.shape[1] > 0, "COLUMNS": column_arrays.shape[1] > 0}
    if form(d) == "onepass":
        of_image, of_scale = _one_side(image, text, scale, unit, offset, row_arrays, column_arrays)
        of_text, _ = _one_side(text, image, scale, unit, -offset, column_arrays, row_arrays)
        return of_image, of_text, of_scale

    def to_gradient(rows: slice, products: Tensor) -> None:
        h = len(products)
        _to_gradient[_ceil(h, BLOCK), _ceil(m, BLOCK)](
            products, scale, h, m, offset + rows.start, row_arrays[:, rows] if sides["ROWS"] else row_arrays,
            n, column_arrays, **sides, BLOCK_M=BLOCK, BLOCK_N=BLOCK,
        )  # fmt: skip

    return _by_chunks(image, text, scale, unit, to_gradient)


def _one_side(
    image: Tensor, text: Tensor, scale: Tensor, unit: Tensor, offset: int, row_arrays: Tensor, column_arrays: Tensor
) -> tuple[Tensor, Tensor]:
    """-> gradients of image and of scale."""
    n, m, d = len(image), len(text), image.shape[1]
    width = min(128 if image.dtype == torch.float32 else 256, max(16, triton.next_power_of_2(d)))
    of_image, dots = torch.empty_like(image), scale.new_empty((_ceil(d, width), n))
    _side[_ceil(n, BLOCK), _ceil(d, width)](
        image, text, scale, unit, n, m, d, offset, row_arrays, column_arrays, of_image, dots,
        ROWS=row_arrays.shape[1] > 0, COLUMNS=column_arrays.shape[1] > 0, SLICE=width,
        num_warps=8 if width > 64 else 4, **_options(image),
    )  # fmt: skip
    return of_image, dots.sum(dtype=torch.float64).to(scale.dtype)


def _by_chunks(
    image: Tensor, text: Tensor, scale: Tensor, unit: Tensor | float, to_gradient: Any
) -> tuple[Tensor, Tensor, Tensor]:
    of_image, of_text = torch.empty_like(image), torch.zeros_like(text, dtype=torch.float32)
    of_scale = torch.zeros((), dtype=torch.float64, device=scale.device)
    for rows, products in _chunks(image, text):
        to_gradient(rows, products)
        own = _mm(products, text)
        of_text += _mm(products.T, image[rows])
        of_scale += (own * image[rows]).sum(dtype=torch.float64)
        of_image[rows] = own.mul_(scale * unit)
    return of_image, of_text.mul_(scale * unit).to(text.dtype), (of_scale * unit).to(scale.dtype)


def sigmoid(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, pairs: Any, each: tuple[float, float], gradients: bool,
    threads: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> loss and its gradients with respect to image, text, scale and bias, empty unless `gradients`; chunked."""
    image, text = image.contiguous(), text.contiguous()
    n, m = len(image), len(text)
    offset = max(-n, min(m, pairs.offset))
    unit = max(map(abs, each)) or 1.0
    total = torch.zeros(2, dtype=torch.float64, device=scale.device)

    def to_gradient(rows: slice, products: Tensor) -> None:
        grid = _ceil(len(products), BLOCK), _ceil(m, BLOCK)
        sums = scale.new_empty((grid[0] * grid[1], 2))
        _to_sigmoid[grid](
            products, scale, bias, len(products), m, offset + rows.start, each[0] / unit, each[1] / unit, sums,
            GRADIENT=gradients, BLOCK_M=BLOCK, BLOCK_N=BLOCK,
        )  # fmt: skip
        total.add_(sums.sum(0, dtype=torch.float64))

    if gradients:
        of_inputs = _by_chunks(image, text, scale, unit, to_gradient)
    else:
        for rows, products in _chunks(image, text):
            to_gradient(rows, products)
        of_inputs = (image.new_empty(0), text.new_empty(0), scale.new_empty(0))
    loss, slope = (total * unit).to(scale.dtype)
    return loss.clone(), *of_inputs, slope.clone() if gradients else bias.new_empty(0)
