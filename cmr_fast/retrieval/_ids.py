"""Ids: checking those given, and knowing which there are without a look at every one of them."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cmr_fast.errors import InputError
from cmr_fast.retrieval._checks import to_numpy

_BLOCK = 1 << 20
FIRST, LAST = np.iinfo(np.int64).min, np.iinfo(np.int64).max
_Intervals = tuple[np.ndarray, np.ndarray]  # first and last ids, both rising


class IdSet:
    """A set of int64 ids that takes m more in O(m log N), amortised, however they are ordered.

    Runs of disjoint intervals; a run is merged into the one before it unless that is twice as long.
    """

    def __init__(self, pieces: Iterable[np.ndarray | range] = ()) -> None:
        self._runs: list[_Intervals] = []
        for piece in pieces:
            self.add(piece)

    def add(self, ids: np.ndarray | range) -> None:
        """Add ids, some of them perhaps several times, none of which is in the set."""
        if len(ids) == 0:
            return
        if isinstance(ids, range):
            self._runs.append((np.array([ids.start]), np.array([ids.stop - 1])))
        else:
            ids = np.unique(ids)
            self._runs.append(_joined(ids, ids))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            firsts, lasts = (np.concatenate(x) for x in zip(self._runs.pop(), self._runs.pop(), strict=True))
            order = np.argsort(firsts, kind="stable")
            self._runs.append(_joined(firsts[order], lasts[order]))

    def discard(self, ids: np.ndarray) -> None:
        """Take ids out; those that are not in the set change nothing."""
        for i, run in enumerate(self._runs):
            cut = np.unique(ids[_inside(run, ids)])
            # both sides of every cut, sorted: still one first per last, some empty; the ends of int64 have one side
            below, above = cut[cut > FIRST], cut[cut < LAST]
            firsts = np.sort(np.concatenate([run[0][len(cut) - len(below) :], above + 1]))
            lasts = np.sort(np.concatenate([run[1][: len(run[1]) - len(cut) + len(above)], below - 1]))
            self._runs[i] = (firsts[firsts <= lasts], lasts[firsts <= lasts])
        self._runs = [run for run in self._runs if len(run[0])]

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """bool (M,): which of `ids` are in the set."""
        mask = np.zeros(len(ids), dtype=bool)
        for run in self._runs:
            mask |= _inside(run, ids)
        return mask

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(firsts.nbytes + lasts.nbytes for firsts, lasts in self._runs)


def _inside(run: _Intervals, ids: np.ndarray) -> np.ndarray:
    at = np.searchsorted(run[0], ids, side="right") - 1
    return np.asarray((at >= 0) & (ids <= run[1][at]))


def _joined(firsts: np.ndarray, lasts: np.ndarray) -> _Intervals:
    """Disjoint intervals in order -> the same ids in the fewest intervals."""
    breaks = firsts[1:] != lasts[:-1] + 1
    return firsts[np.concatenate([[True], breaks])], lasts[np.concatenate([breaks, [True]])]


def check_ids(ids: Any, count: int | None, any_sign: bool = False) -> np.ndarray | range:
    """ids -> int64 (count,), or the range that they are; InputError unless they are integers >= 0, each there once.

    Rising ids are checked in blocks: an array mapped from a file stays there. Others are sorted in memory.

    any_sign    take the whole of int64, for ids that an index from elsewhere may hold
    """
    if count is not None:
        refuse_longer(ids, count, f"ids must be integers ({count},)")
    x = to_numpy(ids, "ids")
    if np.ma.is_masked(ids):
        raise InputError("ids must not be masked, got a masked array")
    if x.size == 0:
        x = x.astype(np.int64)
    if x.ndim != 1 or x.dtype.kind not in "iu" or (count is not None and len(x) != count):
        of = f" ({type(ids).__name__})" if x.dtype == object else ""
        raise InputError(f"ids must be integers ({'M' if count is None else count},), got {x.dtype} {x.shape}{of}")
    if len(x) == 0:
        return range(0)
    first, last = int(x.min()), int(x.max())
    if not any_sign and (first < 0 or last >= LAST):
        raise InputError(f"ids must be from 0 to 2^63 - 2, got {first} to {last} (-1 is what searches pad with)")
    if last > LAST:
        raise InputError(f"ids must be int64, got {last}")
    if not all((block[1:] > block[:-1]).all() for block in _overlapping(x)):
        values, counts = np.unique(x, return_counts=True)
        if len(values) != len(x):
            raise InputError(f"ids must not repeat: {len(x) - len(values)} do, the first is {values[counts > 1][0]}")
    elif first >= 0 and last < LAST and last - first == len(x) - 1:
        return range(first, last + 1)
    return x.astype(np.int64, copy=False)


def refuse_longer(ids: object, count: int, expected: str) -> None:
    """InputError for a range of more ids than there can be, which need not fit memory."""
    if isinstance(ids, range) and ids[count:]:
        raise InputError(f"{expected}, got {ids}")


def counted_on(next_id: int, count: int) -> range:
    """So many ids from `next_id` on."""
    if next_id > LAST - count:
        raise InputError(f"no ids left to count on from {next_id}: pass ids=")
    return range(next_id, next_id + count)


def lowest(ids: np.ndarray | range) -> int:
    """The lowest of some ids."""
    return ids.start if isinstance(ids, range) else int(ids.min())


def next_after(next_id: int, ids: np.ndarray | range) -> int:
    """The id to count on from once there are `ids` too; at most 2^63 - 1, from which nothing counts on."""
    return min(max(next_id, (ids.stop - 1 if isinstance(ids, range) else int(ids.max())) + 1), LAST)


def refuse_known(ids: np.ndarray | range, known: IdSet) -> None:
    """InputError where an id is in the set already."""
    for start in range(0, len(ids), _BLOCK):
        block = np.asarray(ids[start : start + _BLOCK])
        repeated = block[known.contains(block)]
        if len(repeated):
            raise InputError(f"ids must be new: {len(repeated)} are in the index already, the first is {repeated[0]}")


def _overlapping(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[start : start + _BLOCK + 1] for start in range(0, len(x), _BLOCK))
