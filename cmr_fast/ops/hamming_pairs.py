"""Joins of packed codes: all pairs within a Hamming radius, each once, in order, whole or in blocks."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmr_fast.errors import InputError
from cmr_fast.ops import _dispatch
from cmr_fast.ops._tensors import Array, as_codes, as_integer, as_tensor, check_codes, check_values, like_input
from cmr_fast.ops.hamming import hamming_range
from cmr_fast.ops.multi_index_range import (
    JOIN_MEMORY,
    BucketJoin,
    Hits,
    RangeTables,
    Sample,
    available,
    joined,
    kept,
    least_cost,
    scan_cost,
)

MAX_PAIRS = 1 << 28  # 12 bytes each
ROWS = 1 << 16
_FIRST_ROWS = 16
_PAIRS = 1 << 23  # of a block, about: rows with many partners come fewer at a time


class PairBlock(NamedTuple):
    """The pairs of rows first, first + 1, ...: those of row first + i are lims[i]:lims[i + 1]."""

    first: int
    lims: Any
    distances: Any
    indices: Any


def hamming_pairs(
    codes: Array,
    radius: int,
    other: Array | None = None,
    *,
    max_pairs: int = MAX_PAIRS,
    threads: int | None = None,
) -> tuple[Array, Array, Array]:
    """All pairs of codes within a Hamming radius: of a collection with itself, or of two.

    Parameters
    ----------
    codes : Tensor or numpy.ndarray
        uint8 (N, nbytes) packed codes.
    radius : int
        0 or more, inclusive. Small ones are joined by tables of substrings (multi-index hashing).
    other : Tensor or numpy.ndarray, optional
        uint8 (M, nbytes): pairs of a row of `codes` and one of these. None: pairs of two rows i < j of `codes`.
    max_pairs : int, optional
        More are refused: `hamming_pair_blocks` gives them in pieces. Default 2^28, 3.2 GB.
    threads : int, optional
        Of the native kernels; default all processors of this process. Results do not depend on it.

    Returns
    -------
    lims : Tensor or numpy.ndarray
        int64 (N + 1,): the partners of row i are lims[i]:lims[i + 1].
    distances : Tensor or numpy.ndarray
        int32 (T,).
    indices : Tensor or numpy.ndarray
        int64 (T,), rising for each i; above i without `other`.

    Raises
    ------
    InputError
        On codes, a radius or max_pairs of another kind, and more pairs than max_pairs.
    """
    most = as_integer(max_pairs, "max_pairs", 0)
    _, was_numpy = as_tensor(codes, "codes")
    queries, database, radius = _checked(codes, radius, other, threads)
    hits = _in_buckets(database, radius, most, threads) if other is None else None
    if hits is None:
        hits = _in_rows(queries, database, radius, other is None, most, threads)
    lims, distances, indices = (like_input(x, was_numpy) for x in hits)
    return lims, distances, indices


def hamming_pair_blocks(
    codes: Array,
    radius: int,
    other: Array | None = None,
    *,
    rows: int = ROWS,
    start: int = 0,
    threads: int | None = None,
) -> Iterator[PairBlock]:
    """The pairs of `hamming_pairs`, of some rows at a time: for joins whose result does not fit memory.

    Codes may be mapped from a file; tables for a join take up to five times their memory.

    Parameters
    ----------
    codes, radius, other, threads
        As in `hamming_pairs`.
    rows : int, optional
        Of a block, at most; fewer where they have many partners.
    start : int, optional
        The first row, to go on after an earlier block.

    Returns
    -------
    iterator of PairBlock
        first, lims, distances, indices: rows first, first + 1, ... of `codes`.

    Raises
    ------
    InputError
        On arguments of another kind.
    """
    _, was_numpy = as_tensor(codes, "codes")
    rows, start = as_integer(rows, "rows", 1), as_integer(start, "start", 0)
    queries, database, radius = _checked(codes, radius, other, threads)
    blocks = join(queries, database, radius, other is None, rows, start, threads)
    return (PairBlock(first, *(like_input(x, was_numpy) for x in hits)) for first, *hits in blocks)


def _checked(codes: Array, radius: int, other: Array | None, threads: int | None) -> tuple[Tensor, Tensor, int]:
    """Queries, database and radius of a join."""
    if other is None:
        database, _ = as_tensor(codes, "codes")
        check_codes(database, "codes")
        queries = database
    else:
        queries, database, _ = as_codes(codes, other, ("codes", "other"))
    check_values(queries, "codes")
    _dispatch.how(None, threads)
    return queries, database, min(as_integer(radius, "radius", 0), 8 * database.shape[1])


def _in_rows(q: Tensor, db: Tensor, radius: int, itself: bool, most: int, threads: int | None) -> Hits:
    blocks, total = [], 0
    for first, *hits in join(q, db, radius, itself, threads=threads):
        total += len(hits[1])
        _refuse_more(total, most, f"in the first {first + len(hits[0]) - 1} of {len(q)} rows")
        blocks.append((hits[0], hits[1], hits[2]))
    return joined(blocks)


def _in_buckets(db: Tensor, radius: int, most: int, threads: int | None) -> Hits | None:
    """Pairs by tables that read each bucket once; None: another way is cheaper."""
    buckets, n = bucket_join(db, radius), len(db)
    if buckets is None:
        return None
    found, near, total = [], [], 0
    for at, keys, distances in buckets.pairs(radius, threads):
        total += len(keys)
        _refuse_more(total, most, f"in the first {at / (n * (radius + 1)):.0%} of the search")
        found.append(keys)
        near.append(distances)
    keys, order = torch.cat(found).sort()  # a pair is there once
    lims = torch.zeros(n + 1, dtype=torch.int64, device="cpu")
    lims.index_add_(0, (keys >> 32) + 1, torch.ones_like(keys))
    torch.cumsum(lims, 0, out=lims)
    return lims, torch.cat(near)[order], keys & 0xFFFFFFFF


def _refuse_more(total: int, most: int, where: str) -> None:
    if total > most:
        raise InputError(
            f"the pairs must be at most max_pairs = {most}, got {total} {where}: expected hamming_pair_blocks, which "
            "holds one block of them at a time, or a larger max_pairs"
        )


def bucket_join(db: Tensor, radius: int) -> BucketJoin | None:
    """A join of codes with themselves that reads each bucket once; None: another way is cheaper.

    Parameters
    ----------
    db : Tensor
        uint8 (N, nbytes).
    radius : int
        Of the pairs.

    Returns
    -------
    BucketJoin or None
        Whose `pairs` are to be read.
    """
    if not available(db):
        return None
    scan = scan_cost(len(db), db.shape[1], len(db)) / 2
    if scan < least_cost(len(db)):
        return None
    sample = Sample(db)
    split, other = sample.for_pairs(radius, JOIN_MEMORY), sample.best(radius, JOIN_MEMORY)
    if split is None or 2 * split.share * scan + len(db) * split.build_cost > scan:
        return None
    if other is not None and 2 * split.share * scan + len(db) * split.build_cost > (
        other.share * scan + len(db) * other.build_cost
    ):
        return None
    return BucketJoin(db.contiguous(), split)


def join(
    q: Tensor,
    db: Tensor,
    radius: int,
    itself: bool,
    rows: int = ROWS,
    start: int = 0,
    threads: int | None = None,
    among: Tensor | None = None,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Blocks (first, lims, distances, indices) of a join whose arguments are checked.

    Parameters
    ----------
    q, db : Tensor
        uint8 (Q, nbytes) and (N, nbytes).
    radius : int
        Of the pairs.
    itself : bool
        q is db, and pairs are i < j.
    rows, start : int
        Of a block, and the first.
    threads : int, optional
        Default all processors of this process.
    among : Tensor, optional
        bool (N,): of a join with itself, the codes that take part.

    Yields
    ------
    tuple
        first, lims, distances, indices.
    """
    if start >= len(q):
        return
    tables = _tables(q, db, radius, itself, threads)
    first, step = start, min(rows, _FIRST_ROWS)
    while first < len(q):
        block = q[first : first + step].contiguous()
        asked = None if among is None else among[first : first + step]
        if tables is not None:
            hits = tables.range_search(
                block, radius, threads, allowed=among, after=first if itself else None, asked=asked
            )
        else:
            hits = _scanned(block, db, radius, first if itself else None, threads, among, asked)
        yield first, *hits
        first += step
        per_row = max(1, int(hits[0][-1]) // step)
        step = max(1, min(rows, 4 * step, _PAIRS // per_row))


def _tables(q: Tensor, db: Tensor, radius: int, itself: bool, threads: int | None) -> RangeTables | None:
    if not available(db):
        return None
    scan = scan_cost(len(db), db.shape[1], len(q)) / (2 if itself else 1)
    if scan < least_cost(len(db)):
        return None
    split = Sample(db, None if itself else q).best(radius, JOIN_MEMORY)
    if split is None or split.share * scan + len(db) * split.build_cost > scan:
        return None
    return RangeTables(db.contiguous(), split, threads)


def _scanned(
    q: Tensor,
    db: Tensor,
    radius: int,
    after: int | None,
    threads: int | None,
    among: Tensor | None,
    asked: Tensor | None,
) -> Hits:
    first = after or 0
    lims, distances, indices = hamming_range(q, db[first:], radius, tables=False, threads=threads)
    if after is None:
        return lims, distances, indices
    own = torch.arange(first, first + len(q), dtype=torch.int64, device=q.device)
    if asked is not None:  # those that take no part have no codes after them
        own = torch.where(asked, own, np.iinfo(np.int64).max)
    return kept((lims, distances, indices + first), among, own)
