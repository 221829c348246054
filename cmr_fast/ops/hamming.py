"""Packed-bit Hamming distance: pack, unpack, exact top-k, range search, distance tables.

Codes are uint8 rows of ceil(bits / 8) bytes, bit j in byte j // 8 at position j % 8: the bytes of faiss's binary
indexes. Unused bits of the last byte must be 0. Widths from 1 to 4096 bits. Results are exact and ties go to the
lower index, whatever the backend, the instruction set and the number of threads.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._library import register
from cmr_fast.ops._tensors import MAX_BITS as MAX_BITS  # where others look for it
from cmr_fast.ops._tensors import (
    MAX_K,
    Array,
    as_codes,
    as_integer,
    as_number,
    as_tensor,
    check_codes,
    check_values,
    like_input,
    neighbour_arrays,
    neighbours,
)
from cmr_fast.ops.cuda import hamming as hamming_cuda
from cmr_fast.ops.multi_index_range import scan_range, tables_for

_BYTE = np.dtype(np.uint8)
LITTLE = 1 << 17  # pairs of codes that are compared before another thread is awake
_TORCH_BLOCK = 1 << 22  # distances held at once by the torch path


def pack_codes(x: Array, threshold: float | None = None) -> Array:
    """Pack rows of bits.

    Parameters
    ----------
    x : Tensor or numpy.ndarray
        (N, bits), 1 to 4096 bits. bool and integers: bit = x > 0, of {0, 1} or {-1, 1}. Floats: bit = x >= 0, or
        x >= threshold. Floats that are all 0 or 1 are ambiguous: `>= 0` would set every bit, so they need
        `threshold=0.5` said.
    threshold : float, optional
        For floats.

    Returns
    -------
    Tensor or numpy.ndarray
        uint8 (N, ceil(bits / 8)), of the kind that went in and on its device.

    Raises
    ------
    InputError
        On other shapes and dtypes, NaN, other integers than bits, and floats that are all 0 or 1.
    """
    values, was_numpy = as_tensor(x, "x")
    if values.ndim != 2 or not 1 <= values.shape[1] <= MAX_BITS:
        raise InputError(f"x must be (N, bits) with 1 to {MAX_BITS} bits, got shape {tuple(values.shape)}")
    if values.is_complex():
        raise InputError(f"x must be bool, integer or float, got {values.dtype}")
    if threshold is not None:
        if isinstance(threshold, (np.ndarray, Tensor)) and threshold.ndim:
            raise InputError(
                f"threshold must be a finite number, got one of shape {tuple(threshold.shape)}: expected "
                "pack_codes(x - threshold, threshold=0) for one of each bit"
            )
        threshold = as_number(threshold, "threshold")
    if values.is_meta:  # nothing to look at
        bits = values >= (0.0 if threshold is None else threshold) if values.is_floating_point() else values > 0
    elif values.is_floating_point():
        if bool(torch.isnan(values).any()):
            raise InputError("x must not hold NaN: a NaN has no sign to pack")
        if threshold is None and values.numel() and bool(((values == 0) | (values == 1)).all()):
            raise InputError(
                "x is float and every value is 0 or 1, so `x >= 0` would set every bit: expected threshold=0.5 to pack "
                "{0, 1} bits, or threshold=0 where >= 0 is really meant"
            )
        bits = values >= (0.0 if threshold is None else threshold)
    else:
        if threshold is not None:
            raise InputError(f"threshold is for floats; {values.dtype} is packed by x > 0, got threshold={threshold}")
        bits = values if values.dtype == torch.bool else _signs_of_integers(values)
    codes: Array = like_input(torch.ops.cmr_fast.pack_codes(bits), was_numpy)
    return codes


def _signs_of_integers(values: Tensor) -> Tensor:
    """bool: x > 0 of {0, 1} and {-1, 1}; other integers are something else than bits."""
    dtype = values.dtype
    if dtype in _COMPARED:  # torch compares no others of no sign than uint8
        values = values.to(_COMPARED[dtype])
    if values.numel():
        low, high = (int(x) for x in values.aminmax())
        if low < -1 or high > 1:
            raise InputError(
                f"x must hold bits, {{0, 1}} or {{-1, 1}}, got {dtype} from {low} to {high}: packed codes are "
                "used as they are, and of numbers x > 0 is packed"
            )
    return values > 0


_COMPARED = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.float64}


def unpack_codes(codes: Array, bits: int) -> Array:
    """Unpack rows of bits: `pack_codes` backwards.

    Parameters
    ----------
    codes : Tensor or numpy.ndarray
        uint8 (N, ceil(bits / 8)).
    bits : int
        Of a code.

    Returns
    -------
    Tensor or numpy.ndarray
        uint8 (N, bits) of 0 and 1, of the kind that went in.

    Raises
    ------
    InputError
        On codes of another kind or width.
    """
    packed, was_numpy = as_tensor(codes, "codes")
    check_codes(packed, "codes")
    bits = as_integer(bits, "bits", 1, MAX_BITS)
    if packed.shape[1] != -(-bits // 8):
        raise InputError(f"{bits} bits need codes of {-(-bits // 8)} bytes, got shape {tuple(packed.shape)}")
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    unpacked = ((packed[:, :, None] >> shifts) & 1).reshape(len(packed), -1)[:, :bits].contiguous()
    result: Array = like_input(unpacked, was_numpy)
    return result


def hamming_topk(
    q: Array, db: Array, k: int, *, bits: int | None = None, backend: str | None = None, threads: int | None = None
) -> tuple[Array, Array]:
    """The k nearest database codes of every query, exactly.

    Parameters
    ----------
    q, db : Tensor or numpy.ndarray
        uint8 (Q, nbytes) and (N, nbytes) packed codes, on one device.
    k : int
        1 or more; k > N pads with index -1 and distance bits + 1.
    bits : int, optional
        Code length where it is not 8 * nbytes (it only sets the padding distance).
    backend : {"cpp", "cuda", "torch"}, optional
        Forces one; the device chooses otherwise.
    threads : int, optional
        Of the native kernels; default all processors of this process. Results do not depend on it.

    Returns
    -------
    distances : Tensor or numpy.ndarray
        int32 (Q, k).
    indices : Tensor or numpy.ndarray
        int64 (Q, k); rows of both are sorted by (distance, index).

    Raises
    ------
    InputError
        On codes, k or bits of another kind, and a backend that cannot run.
    """
    backend, threads = _dispatch.how(backend, threads)
    if plain(q, db) and (isa := _dispatch.isa_of_arrays("hamming_topk", backend)):
        return topk_of_arrays(isa, q, db, as_integer(k, "k", 1, MAX_K), _check_bits(bits, db.shape[1]), threads)
    queries, database, was_numpy = as_codes(q, db)
    k = as_integer(k, "k", 1, MAX_K)
    bits = _check_bits(bits, database.shape[1])
    # numpy arrays are part of no graph: they spare themselves torch's dispatcher
    search = _TOPK if was_numpy else torch.ops.cmr_fast.hamming_topk
    distances, indices = search(queries, database, k, bits, backend, threads)
    return like_input(distances, was_numpy), like_input(indices, was_numpy)


def plain(q: object, db: object) -> bool:
    """Whether both are packed codes of one width, in numpy arrays that are used as they are."""
    if type(q) is not np.ndarray or type(db) is not np.ndarray or q.ndim != 2 or db.ndim != 2:
        return False
    width = db.shape[1]
    return (
        q.dtype == _BYTE
        and db.dtype == _BYTE
        and q.shape[1] == width
        and 1 <= width <= MAX_BITS // 8
        and q.flags.c_contiguous
        and db.flags.c_contiguous
    )


def topk_of_arrays(isa: str, q: Any, db: Any, k: int, bits: int, threads: int | None) -> tuple[Any, Any]:
    """`_topk` of `plain` arrays on the native kernels without torch, whose calls cost more than a small scan."""
    count, size = len(q), len(db)
    distances, indices = neighbour_arrays(count, k, bits, k > size)
    native = _dispatch.native()
    if threads is None and (count * size > LITTLE or native.forced()):
        threads = _dispatch.choose_threads()
    native.hamming_topk_of_arrays(isa, q, db, k, threads or 1, distances, indices)
    return distances, indices


def hamming_range(
    q: Array,
    db: Array,
    radius: int,
    *,
    strict: bool = False,
    tables: bool = True,
    backend: str | None = None,
    threads: int | None = None,
) -> tuple[Array, Array, Array]:
    """Every database code at distance <= radius of each query: the triple of faiss's range_search.

    faiss leaves its radius out (distance < radius): faiss radius = ours + 1, or the same with `strict=True`.

    Where a small radius and many queries promise that it pays, tables of substrings are built for this call
    (multi-index hashing; up to 1.5 times the memory of the codes) and looked up instead of scanning.

    Parameters
    ----------
    q, db : Tensor or numpy.ndarray
        uint8 (Q, nbytes) and (N, nbytes) packed codes, on one device.
    radius : int
        0 or more; inclusive, where faiss takes distances below its radius.
    strict : bool, optional
        True: distance < radius, as faiss has it; within radius 0 there is nothing.
    tables : bool, optional
        False: only scan. Results do not depend on it.
    backend : {"cpp", "cuda", "torch"}, optional
        Forces one; the device chooses otherwise.
    threads : int, optional
        Of the native kernels; default all processors of this process. Results do not depend on it.

    Returns
    -------
    lims : Tensor or numpy.ndarray
        int64 (Q + 1,): the hits of query i are lims[i]:lims[i + 1].
    distances : Tensor or numpy.ndarray
        int32 (T,).
    indices : Tensor or numpy.ndarray
        int64 (T,), rising within a query.

    Raises
    ------
    InputError
        On codes or a radius of another kind, and a backend that cannot run.
    """
    queries, database, was_numpy = as_codes(q, db)
    check_values(queries, "q")  # as many results as they say
    radius = min(closed_radius(radius, strict), 8 * database.shape[1])
    if radius < 0:
        radius, database = 0, database[:0]
    if not isinstance(tables, bool):
        raise InputError(f"tables must be True or False, got {tables!r}")
    result = torch.ops.cmr_fast.hamming_range(queries, database, radius, tables, *_dispatch.how(backend, threads))
    lims, distances, indices = (like_input(r, was_numpy) for r in result)
    return lims, distances, indices


def hamming_distances(q: Array, db: Array, *, backend: str | None = None, threads: int | None = None) -> Array:
    """The whole table of distances: for small cases, it takes 4 * Q * N bytes.

    Parameters
    ----------
    q, db : Tensor or numpy.ndarray
        uint8 (Q, nbytes) and (N, nbytes) packed codes, on one device.
    backend : {"cpp", "cuda", "torch"}, optional
        Forces one; the device chooses otherwise.
    threads : int, optional
        Of the native kernels; default all processors of this process. Results do not depend on it.

    Returns
    -------
    Tensor or numpy.ndarray
        int32 (Q, N).

    Raises
    ------
    InputError
        On codes of another kind, and a backend that cannot run.
    """
    queries, database, was_numpy = as_codes(q, db)
    table = torch.ops.cmr_fast.hamming_distances(queries, database, *_dispatch.how(backend, threads))
    result: Array = like_input(table, was_numpy)
    return result


def _check_bits(bits: int | None, nbytes: int) -> int:
    if bits is None:
        return 8 * nbytes
    number = as_integer(bits, "bits", 1, MAX_BITS)
    if not 8 * (nbytes - 1) < number <= 8 * nbytes:
        raise InputError(f"codes of {nbytes} bytes hold {8 * nbytes - 7} to {8 * nbytes} bits, got bits={bits!r}")
    return number


def closed_radius(radius: object, strict: object) -> int:
    """The radius r of distance <= r; -1 where distance < 0 was asked for."""
    if not isinstance(strict, bool):
        raise InputError(f"strict must be True or False, got {strict!r}")
    return as_integer(radius, "radius", 0) - strict


def _pack_codes(bits: Tensor) -> Tensor:
    if bits.device.type == "cpu":
        return torch.from_numpy(np.ascontiguousarray(np.packbits(bits.numpy(), axis=1, bitorder="little")))
    n, width = bits.shape
    nbytes = -(-width // 8)
    if width % 8:
        bits = torch.nn.functional.pad(bits, (0, 8 * nbytes - width))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits.reshape(n, nbytes, 8).to(torch.uint8) * weights).sum(dim=2, dtype=torch.uint8).contiguous()


def _topk(q: Tensor, db: Tensor, k: int, bits: int, backend: str | None, threads: int | None) -> tuple[Tensor, Tensor]:
    count, size = q.shape[0], db.shape[0]
    distances, indices = neighbours(count, k, bits, q.device, k > size)
    chosen = _dispatch.choose_backend("hamming_topk", q.device.type, backend)
    if chosen == "cuda":
        hamming_cuda.topk(q, db, k, distances, indices)
        return distances, indices
    if chosen == "cpp":
        q, db = q.contiguous(), db.contiguous()
        native, isa = _dispatch.native(), _dispatch.choose_isa()
        shape = (count, size, db.shape[1], k, _dispatch.choose_threads(threads))
        workspace = torch.empty(native.hamming_topk_workspace(isa, *shape), dtype=torch.uint8, device="cpu")
        native.hamming_topk(
            isa, q.data_ptr(), db.data_ptr(), *shape, distances.data_ptr(), indices.data_ptr(), workspace.data_ptr()
        )
        return distances, indices
    kept = min(k, size)
    for start, table in _torch_blocks(q, db):
        # (distance, index) in one integer: its k smallest are the k nearest, ties to the lower index
        keys = table.long() * size + torch.arange(size, dtype=torch.int64, device=q.device)
        best = keys.topk(kept, dim=1, largest=False, sorted=True).values
        distances[start : start + len(table), :kept] = (best // size).int()
        indices[start : start + len(table), :kept] = best % size
    return distances, indices


def _range(
    q: Tensor, db: Tensor, radius: int, with_tables: bool, backend: str | None, threads: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = _dispatch.choose_backend("hamming_range", q.device.type, backend)
    if chosen == "cuda":
        return hamming_cuda.range_search(q, db, radius)
    if chosen == "cpp":
        q, db = q.contiguous(), db.contiguous()
        tables = tables_for(q, db, radius, threads) if with_tables else None
        return scan_range(q, db, radius, threads) if tables is None else tables.range_search(q, radius, threads)
    lims = torch.zeros(len(q) + 1, dtype=torch.int64, device=q.device)
    parts = []
    near = torch.empty(0, dtype=torch.bool, device=q.device)
    for start, table in _torch_blocks(q, db):
        near = torch.le(table, radius, out=near.resize_(table.shape))
        lims[start + 1 : start + 1 + len(table)] = near.sum(dim=1)
        rows, columns = near.nonzero().unbind(1)
        parts.append((table[rows, columns], columns))
    distances = torch.cat([p[0] for p in parts]) if parts else lims.new_empty(0, dtype=torch.int32)
    indices = torch.cat([p[1] for p in parts]) if parts else lims.new_empty(0)
    return lims.cumsum(0), distances, indices


def _distances(q: Tensor, db: Tensor, backend: str | None, threads: int | None) -> Tensor:
    try:
        out = torch.empty((len(q), len(db)), dtype=torch.int32, device=q.device)
    except RuntimeError as error:
        raise InputError(
            f"q and db must be few enough for the table to be held: {len(q)} by {len(db)} distances take "
            f"{4 * len(q) * len(db)} bytes, more than there are on {q.device}; expected fewer rows of q at a time"
        ) from error
    chosen = _dispatch.choose_backend("hamming_distances", q.device.type, backend)
    if chosen == "cuda":
        hamming_cuda.table(q, db, out)
        return out
    if chosen == "cpp":
        q, db = q.contiguous(), db.contiguous()
        shape = (len(q), len(db), db.shape[1], _dispatch.choose_threads(threads))
        _dispatch.native().hamming_distances(
            _dispatch.choose_isa(), q.data_ptr(), db.data_ptr(), *shape, out.data_ptr()
        )
        return out
    for start, table in _torch_blocks(q, db):
        out[start : start + len(table)] = table
    return out


def _torch_blocks(q: Tensor, db: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of the distance table, int32, by products of +-1: exact in float32 up to 2^24 bits.

    Each is overwritten by the next.
    """
    if len(q) == 0 or len(db) == 0:
        return
    bits = 8 * db.shape[1]
    signs = _signs(db).T
    step = min(len(q), max(1, _TORCH_BLOCK // len(db)))
    # filled anew for each block: freed ones would be cut up by what is kept of them, and the heap would grow
    products = torch.empty((step, len(db)), dtype=torch.float32, device=q.device)
    table = torch.empty((step, len(db)), dtype=torch.int32, device=q.device)
    for start in range(0, len(q), step):
        rows = min(step, len(q) - start)
        torch.mm(_signs(q[start : start + rows]), signs, out=products[:rows])
        yield start, table[:rows].copy_(products[:rows].neg_().add_(bits).div_(2))


def _signs(codes: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (((codes[:, :, None] >> shifts) & 1).float() * 2 - 1).reshape(len(codes), -1)


def _fake_range(
    q: Tensor, db: Tensor, radius: int, tables: bool, backend: str | None, threads: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.library.get_ctx().new_dynamic_size()
    return (
        q.new_empty(q.shape[0] + 1, dtype=torch.int64),
        q.new_empty(total, dtype=torch.int32),
        q.new_empty(total, dtype=torch.int64),
    )


register(
    "pack_codes(Tensor bits) -> Tensor",
    _pack_codes,
    lambda bits: bits.new_empty((bits.shape[0], (bits.shape[1] + 7) // 8), dtype=torch.uint8),
)
_TOPK = register(
    "hamming_topk(Tensor q, Tensor db, int k, int bits, str? backend, int? threads) -> (Tensor, Tensor)",
    _topk,
    lambda q, db, k, bits, backend, threads: (
        q.new_empty((q.shape[0], k), dtype=torch.int32),
        q.new_empty((q.shape[0], k), dtype=torch.int64),
    ),
)
register(
    "hamming_range(Tensor q, Tensor db, int radius, bool tables, str? backend, int? threads) "
    "-> (Tensor, Tensor, Tensor)",
    _range,
    _fake_range,
)
register(
    "hamming_distances(Tensor q, Tensor db, str? backend, int? threads) -> Tensor",
    _distances,
    lambda q, db, backend, threads: q.new_empty((q.shape[0], db.shape[0]), dtype=torch.int32),
)
