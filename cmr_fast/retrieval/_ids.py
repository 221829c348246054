"""Ids: checking those given, and knowing which there are without a look at every one of them."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from cmr_fast.errors import InputError

_BLOCK = 1 << 20
_Intervals = tuple[np.ndarray, np.ndarray]  # starts and stops, both rising: ids from start to stop - 1


class IdSet:
    """A set of ids that takes m more in O(m log N), amortised, however they are ordered.

    Runs of disjoint intervals; a run is merged into the one before it unless that is twice as long.
    """

    def __init__(self, pieces: Iterable[np.ndarray | range] = ()) -> None:
        self._runs: list[_Intervals] = []
        for piece in pieces:
            self.add(piece)

    def add(self, ids: np.ndarray | range) -> None:
        """Add ids that are not in the set: a range, or an array without repetitions."""
        if len(ids) == 0:
            return
        if isinstance(ids, range):
            self._runs.append((np.array([ids.start]), np.array([ids.stop])))
        else:
            ids = np.sort(ids)
            self._runs.append(_joined(ids, ids + 1))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            starts, stops = (np.concatenate(x) for x in zip(self._runs.pop(), self._runs.pop(), strict=True))
            order = np.argsort(starts, kind="stable")
            self._runs.append(_joined(starts[order], stops[order]))

    def discard(self, ids: np.ndarray) -> None:
        """Take ids out; those that are not in the set change nothing."""
        for i, run in enumerate(self._runs):
            cut = ids[_inside(run, ids)]
            # both sides of every cut, sorted: still one start per stop, some of them empty
            starts, stops = np.sort(np.concatenate([run[0], cut + 1])), np.sort(np.concatenate([run[1], cut]))
            self._runs[i] = (starts[starts < stops], stops[starts < stops])
        self._runs = [run for run in self._runs if len(run[0])]

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """bool (M,): which of `ids` are in the set."""
        found = np.zeros(len(ids), dtype=bool)
        for run in self._runs:
            found |= _inside(run, ids)
        return found

    @property
    def nbytes(self) -> int:
        return sum(starts.nbytes + stops.nbytes for starts, stops in self._runs)


def _inside(run: _Intervals, ids: np.ndarray) -> np.ndarray:
    at = np.searchsorted(run[0], ids, side="right") - 1
    return (at >= 0) & (ids < run[1][at])


def _joined(starts: np.ndarray, stops: np.ndarray) -> _Intervals:
    """Disjoint intervals in order -> the same ids in the fewest intervals."""
    breaks = starts[1:] != stops[:-1]
    return starts[np.concatenate([[True], breaks])], stops[np.concatenate([breaks, [True]])]


def check_ids(ids: Any, count: int | None) -> np.ndarray | range:
    """ids -> int64 (count,), or the range that they are; InputError unless they are integers >= 0, each there once.

    Rising ids are checked in blocks: an array mapped from a file stays there. Others are sorted in memory.
    """
    x = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if x.size == 0:
        x = x.astype(np.int64)
    if x.ndim != 1 or x.dtype.kind not in "iu" or (count is not None and len(x) != count):
        raise InputError(f"ids must be integers ({'M' if count is None else count},), got {x.dtype} {x.shape}")
    if len(x) == 0:
        return range(0)
    first, last = int(x.min()), int(x.max())
    if first < 0 or last >= np.iinfo(np.int64).max:
        raise InputError(f"ids must be from 0 to 2^63 - 2, got {first} to {last}")
    if not all((block[1:] > block[:-1]).all() for block in _overlapping(x)):
        values, counts = np.unique(x, return_counts=True)
        if len(values) != len(x):
            raise InputError(f"ids must not repeat: {len(x) - len(values)} do, the first is {values[counts > 1][0]}")
    elif last - first == len(x) - 1:
        return range(first, last + 1)
    return x.astype(np.int64, copy=False)


def refuse_known(ids: np.ndarray | range, known: IdSet) -> None:
    """InputError where an id is in the set already."""
    for start in range(0, len(ids), _BLOCK):
        block = np.asarray(ids[start : start + _BLOCK])
        found = block[known.contains(block)]
        if len(found):
            raise InputError(f"ids must be new: {len(found)} are in the index already, the first is {found[0]}")


def _overlapping(x: np.ndarray) -> Iterator[np.ndarray]:
    return (x[start : start + _BLOCK + 1] for start in range(0, len(x), _BLOCK))
