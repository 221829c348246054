"""Checks of what indexes and evaluations are given."""

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops._tensors import MAX_BITS, as_tensor, check_codes, check_values, described, from_table
from cmr_fast.ops.multi_index import check_stray

Array = np.ndarray | Tensor

_ROWS = 1 << 20  # looked at together


def to_numpy(x: object, name: str = "x") -> np.ndarray:
    """Numbers, whatever holds them, as an array on the CPU; InputError for a tensor that numpy has no form of."""
    if isinstance(x, Tensor):
        if not (x.is_meta or x.layout != torch.strided or x.is_conj()):
            host = x.detach().cpu()
            with contextlib.suppress(TypeError):  # of bfloat16 and floats of 8 bits
                return np.asarray(host.numpy())
        raise InputError(f"{name} must be a dense tensor of values that numpy holds too, got {described(x)}")
    try:
        return from_table(x)
    except (TypeError, ValueError):  # rows of several lengths; tensors of another kind inside
        return np.empty((), dtype=object)


def like(x: np.ndarray, codes: object) -> Any:
    """`x` as a tensor on the device of `codes`, where these are a tensor."""
    return torch.from_numpy(x).to(codes.device) if isinstance(codes, Tensor) else x


def code_length(bits: object) -> int:
    """Bits of a code; InputError unless they are an integer from 1 to 4096."""
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 1 <= bits <= MAX_BITS:
        raise InputError(f"bits must be an integer from 1 to {MAX_BITS}, got {bits!r}")
    return int(bits)


def packed_codes(codes: object, name: str, bits: int) -> np.ndarray:
    """Packed codes of an index of `bits`, uint8 (N, ceil(bits / 8)), as they are in memory or in a file.

    Raises
    ------
    InputError
        For anything else, saying what it probably is.
    """
    nbytes = -(-bits // 8)
    plain = type(codes) is np.ndarray or isinstance(codes, np.memmap)
    x = codes if isinstance(codes, np.ndarray) and plain else None
    if x is None or x.dtype != np.uint8 or x.ndim != 2:
        tensor = as_tensor(codes, name)[0]
        check_codes(tensor, name)
        check_values(tensor, name)
        x = to_numpy(tensor)
    if x.shape[1] != nbytes:
        unpacked = ": are these bits, not packed yet? See pack_codes" if x.shape[1] == bits else ""
        raise InputError(f"{name} must have {bits} bits ({nbytes} bytes) a code, got {x.shape[1]} bytes{unpacked}")
    for start in range(0, len(x) if bits % 8 else 0, _ROWS):
        last = x[start : start + _ROWS, -1:]
        if (last >> bits % 8).any():
            check_stray(torch.from_numpy(np.array(last)), bits, name)
    return x


def check_code_arrays(q: Any, db: Any) -> tuple[Any, Any]:
    """Queries and database of an evaluation, both numpy or both torch; InputError unless packed, of one width."""
    kinds = []
    for name, codes in (("q", q), ("db", db)):
        tensor, was_numpy = as_tensor(codes, name)
        check_codes(tensor, name)
        check_values(tensor, name)
        kinds.append(was_numpy)
        if len(tensor) == 0:
            raise InputError(f"{name} must hold at least one code, got {_describe(codes)}")
    if q.shape[1] != db.shape[1]:
        raise InputError(f"q and db must have the same bits: q has {q.shape[1]} bytes a code, db has {db.shape[1]}")
    return (q, db) if kinds[0] == kinds[1] else (to_numpy(q), to_numpy(db))


def check_bits(bits: object, q: Array, db: Array) -> int:
    """The code length of an evaluation: that of the bytes, or `bits` where it fits them."""
    held = 8 * q.shape[1]
    if bits is None:
        return held
    number = code_length(bits)
    if not held - 8 < number <= held:
        unpacked = ": are these bits, not packed yet? See pack_codes" if q.shape[1] == number else ""
        raise InputError(f"codes of {q.shape[1]} bytes hold {held - 7} to {held} bits, got bits={number}{unpacked}")
    for name, codes in (("q", q), ("db", db)):
        check_stray(as_tensor(codes, name)[0], number, name)
    return number


def check_embeddings(query: object, database: object) -> tuple[Tensor, Tensor]:
    """Both as float64 (N, d) on one device; InputError unless they are finite numbers of one width."""
    out = []
    kinds = [str(getattr(values, "dtype", "")).removeprefix("torch.") for values in (query, database)]
    for name, kind, other in zip(("query", "database"), kinds, kinds[::-1], strict=True):
        if kind == "uint8" and "float" in other:
            raise InputError(
                f"{name} must be embeddings as the other side is, {other}, got uint8: are these packed codes? "
                "evaluate_codes compares those; pixels or counts go in as float"
            )
    for name, values in (("query", query), ("database", database)):
        if not isinstance(values, np.ndarray | Tensor) or values.ndim != 2 or 0 in values.shape:
            raise InputError(f"{name} must be (N, d) embeddings, N and d of 1 or more, got {_describe(values)}")
        if np.ma.is_masked(values) or (isinstance(values, Tensor) and values.layout != torch.strided):
            raise InputError(f"{name} must be a dense array without a mask, got {_describe(values)}")
        if values.is_complex() if isinstance(values, Tensor) else values.dtype.kind not in "biuf":
            raise InputError(f"{name} must hold real numbers, got {_describe(values)}")
        check_values(values, name)
        if isinstance(values, Tensor):
            x = (values if values.device.type == "cuda" else values.cpu()).detach().double()  # others may lack float64
        else:
            x = torch.from_numpy(np.asarray(values).astype(np.float64, order="C"))
        bad = ~torch.isfinite(x).all(dim=1)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise InputError(f"{name} must be finite: {int(bad.sum())} rows are not, the first is row {first}")
        out.append(x)
    if out[0].shape[1] != out[1].shape[1]:
        raise InputError(f"query and database must have one width, got {tuple(out[0].shape)} and {tuple(out[1].shape)}")
    return out[0], out[1].to(out[0].device)


def check_pairs(pairs: object, num_queries: int, size: int, exclude: np.ndarray | None) -> np.ndarray | None:
    """The database row of each query's partner, int64 (Q,); where none are given and sizes agree, row by row."""
    if pairs is None:
        return np.arange(size) if num_queries == size and exclude is None else None
    x = to_numpy(pairs, "pairs")
    if x.shape != (num_queries,) or x.dtype.kind not in "iu" or x.min() < 0 or x.max() >= size:
        raise InputError(f"pairs must be ({num_queries},) database rows from 0 to {size - 1}, got {x.dtype} {x.shape}")
    rows = x.astype(np.int64)
    if exclude is not None and (rows == exclude).any():
        first = int(np.flatnonzero(rows == exclude)[0])
        raise InputError(f"pairs must not be what exclude_self leaves out, got row {rows[first]} for query {first}")
    return rows


def check_exclude(exclude_self: object, num_queries: int, size: int) -> np.ndarray | None:
    """The database row that each query is, int64 (Q,), -1 for one that is not there; None where none is left out."""
    if exclude_self is None or (isinstance(exclude_self, bool | np.bool_) and not exclude_self):
        return None
    expected = f"exclude_self must be True, False or ({num_queries},) database rows from 0 to {size - 1} (-1: none)"
    if isinstance(exclude_self, bool | np.bool_):
        if num_queries != size:
            raise InputError(f"{expected}; True takes query i for database row i, got {num_queries} and {size} rows")
        rows = np.arange(size)
    else:
        x = to_numpy(exclude_self, "exclude_self")
        if x.shape != (num_queries,) or x.dtype.kind not in "iu" or x.min() < -1 or x.max() >= size:
            raise InputError(f"{expected}, got {x.dtype} {x.shape}")
        rows = x.astype(np.int64)
    if size == 1 and (rows == 0).any():
        raise InputError("the database must hold more than the query itself, got one row that exclude_self leaves out")
    return rows if (rows >= 0).any() else None


def _describe(x: object) -> str:
    if isinstance(x, np.ndarray | Tensor):
        masked = " with a mask" if np.ma.is_masked(x) else ""
        layout = f" {x.layout}" if isinstance(x, Tensor) and x.layout != torch.strided else ""
        return f"{x.dtype}{layout} {tuple(x.shape)}{masked}"
    kind = f"{type(x).__module__.partition('.')[0]} {type(x).__name__}"
    if hasattr(x, "toarray"):
        return f"a sparse {kind}: expected x.toarray()"
    return f"{kind}: expected x.to_numpy()" if hasattr(x, "to_numpy") else type(x).__name__
