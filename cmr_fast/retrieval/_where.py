"""Searching only among some codes: a mask, ids or a range of ids as rows of each part."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cmr_fast.errors import InputError
from cmr_fast.retrieval._checks import to_numpy
from cmr_fast.retrieval._ids import FIRST, LAST, check_ids, refuse_longer
from cmr_fast.retrieval._segments import Part

Rows = slice | np.ndarray  # rising rows of a part

_BYTES = 1 << 26  # of codes that are copied together


def selected_rows(where: Any, parts: Sequence[Part]) -> list[Rows]:
    """The rows of each part that `where` names.

    where    bool (ntotal,) in the order in which codes were added, or ids, each once: integers or a range of them

    Raises
    ------
    InputError
        For a mask of another length, and ids that are not in the index.
    """
    total = sum(map(len, parts))
    if isinstance(where, range):
        refuse_longer(where, total, f"where must name ids of the index, which are {total} at most")
        if not all(FIRST <= x <= LAST for x in (where.start, where.stop, where.step)):
            where = list(where)
    given = np.arange(where.start, where.stop, where.step) if isinstance(where, range) else to_numpy(where, "where")
    if given.dtype == bool:
        if given.shape != (total,) or np.ma.is_masked(where):
            raise InputError(
                f"where must be ({total},) bool, one for each code, or ids of the index, got bool {given.shape}"
            )
        ends = np.cumsum([len(part) for part in parts])
        return [_compact(np.flatnonzero(given[end - len(part) : end])) for end, part in zip(ends, parts, strict=True)]
    if given.dtype.kind not in "iu" and given.size:
        seen = f"{given.dtype} {given.shape}" if given.dtype != object else type(where).__name__
        raise InputError(f"where must be a bool mask, integer ids or a range of them, got {seen}")
    if not isinstance(where, range):
        try:
            given = np.sort(np.asarray(check_ids(given, None, any_sign=True), dtype=np.int64))
        except InputError as error:
            raise InputError(f"where: {error}") from error
    elif where.step < 0:
        given = given[::-1]
    rows = [part.rows_of(given) for part in parts]
    found = sum(map(len, rows))
    names = np.unique(np.concatenate([np.empty(0, np.int64), *map(Part.ids_of, parts, rows)])) if found else given[:0]
    if len(names) < len(given):
        unknown = np.setdiff1d(given, names)
        raise InputError(f"where must name ids of the index: {len(unknown)} are not, the first is {unknown[0]}")
    return [_compact(each) for each in rows]


def chosen(part: Part, rows: Rows) -> Iterator[Part]:
    """The rows of a part as parts of their own: in place where they follow on each other, else copied in blocks."""
    if isinstance(rows, slice):
        if rows.start < rows.stop:
            yield Part(part.codes[rows], part.ids[rows])
        return
    step = max(1, _BYTES // part.codes.shape[1])
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        yield Part(part.codes[block], part.ids_of(block))


def as_mask(rows: Rows, count: int) -> np.ndarray:
    """bool (count,): which rows."""
    mask = np.zeros(count, dtype=bool)
    mask[rows] = True
    return mask


def count_of(rows: Rows) -> int:
    """How many rows."""
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _compact(rows: np.ndarray) -> Rows:
    if len(rows) == 0:
        return slice(0, 0)
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first == len(rows) - 1 else rows
